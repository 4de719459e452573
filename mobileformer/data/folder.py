"""Image folders: a folder for each split, in it a folder for each class, in it (or deeper) the images."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

from mobileformer.data.base import DataError, Split, check_channels
from mobileformer.data.image import SUFFIXES, decode_image

__all__ = ["SPLIT_FOLDERS", "FolderSource", "find_split"]

SPLIT_FOLDERS: dict[Split, tuple[str, ...]] = {"train": ("train", "training"), "val": ("val", "validation", "test")}
SHOWN = 5  # names in a message


class FolderSource:
    """One split of an image folder; nothing but the names is held in memory.

    Classes are the sorted names of the folders, labels their positions; images lie sorted by class and path. Hidden
    files, and those without an image's suffix, are left out. `channels` is 3 unless given.

    Raises:
        DataError: no folder for the split, no class in it, a class without images, or, where the other split is
            there, other classes in that.
    """

    def __init__(self, path: str | os.PathLike[str], split: Split, *, channels: int | None = None) -> None:
        root = Path(path)
        folder = find_split(root, split)
        if folder is None:
            raise DataError(f"{root}: no folder for {split}, expected one of {', '.join(SPLIT_FOLDERS[split])}")
        self.classes = _classes(folder)
        other = find_split(root, "val" if split == "train" else "train")
        if other is not None:
            _compare(folder, self.classes, other, _classes(other))
        self.channels = check_channels(channels) or 3
        self.folder = folder
        files: list[bytes] = []
        self._labels: list[int] = []
        for label, name in enumerate(self.classes):
            found = _images(folder / name, name)
            if not found:
                raise DataError(f"{folder / name}: no image in this class (looked for {' '.join(sorted(SUFFIXES))})")
            files += map(os.fsencode, found)
            self._labels += [label] * len(found)
        # One array of bytes: a million strings would be some 100 MB, in every process that loads.
        self._files = np.array(files)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Decode one image; raises ImageError, which names its file."""
        path = self.folder / os.fsdecode(bytes(self._files[index]))
        return decode_image(path, channels=self.channels), self._labels[index]


def find_split(root: Path, split: Split) -> Path | None:
    """The folder of a split, by the first of its names that is there."""
    return next((root / name for name in SPLIT_FOLDERS[split] if (root / name).is_dir()), None)


def _classes(folder: Path) -> tuple[str, ...]:
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise DataError(f"{folder}: no folder for any class, expected one for each, with its images")
    return tuple(names)


def _compare(folder: Path, classes: tuple[str, ...], other: Path, others: tuple[str, ...]) -> None:
    for here, there, names in (
        (folder, other, sorted(set(classes) - set(others))),
        (other, folder, sorted(set(others) - set(classes))),
    ):
        if names:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            raise DataError(f"{there}: lacks classes that {here} has: {', '.join(names[:SHOWN])}{more}")


def _images(folder: Path, name: str) -> list[str]:
    """Paths relative to the split's folder, sorted."""
    found: list[str] = []
    for here, subfolders, files in os.walk(folder, onerror=_unreadable):
        subfolders[:] = [subfolder for subfolder in subfolders if not subfolder.startswith(".")]
        inside = os.path.relpath(here, folder)
        prefix = name if inside == "." else os.path.join(name, inside)
        found += [
            os.path.join(prefix, file)
            for file in files
            if not file.startswith(".") and os.path.splitext(file)[1].lower() in SUFFIXES
        ]
    return sorted(found)


def _unreadable(error: OSError) -> None:
    raise DataError(f"{error.filename}: {error.strerror}") from error
