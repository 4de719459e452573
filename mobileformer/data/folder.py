"""Image folders: a folder for each split, in it a folder for each class, in it (or deeper) the images.

Or the folders of the classes alone: then a fifth of each class, drawn once and for all, is the validation split.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from mobileformer.data.base import DataError, Split, check_channels
from mobileformer.data.image import SUFFIXES, decode_image, walk_images

__all__ = ["SPLIT_FOLDERS", "SPLIT_SHARE", "FolderSource", "find_split", "has_class_folders"]

# In any case of letters. A set without a validation split has its test split validated on, and that is told.
SPLIT_FOLDERS: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
SPLIT_SHARE = 0.2  # of each class, for validation, where there are folders of classes alone
SHOWN = 5  # names in a message


class FolderSource:
    """One split of an image folder; nothing but the names is held in memory.

    Classes are the sorted names of the folders, labels their positions; images lie sorted by class and path. Hidden
    files, and those without an image's suffix, are left out. Links to folders are followed, and each folder is read
    once for a class. `channels` is 3 unless given. `name` tells which folder it is.

    | split | images |
    |---|---|
    | train, val, test | of the folder with one of the names in `SPLIT_FOLDERS`; val is test/ where there is no other |
    | train, val | of class folders alone: four fifths and a fifth of each class, the same at every call |
    | all | of class folders alone: every image |

    partial: classes may be without images, and be missing in one of the splits; `classes` are then those of all.

    Raises:
        DataError: no folder for the split, or several; no class in it, a class without images, or, where the other
            split is there, other classes in that; a link that leads nowhere, or back to where it lies.
    """

    def __init__(
        self, path: str | os.PathLike[str], split: Split, *, channels: int | None = None, partial: bool = False
    ) -> None:
        root = Path(path)
        folder = None if split == "all" else find_split(root, split)
        alone = folder is None and not any(find_split(root, which) for which in SPLIT_FOLDERS)
        if alone and split != "test" and has_class_folders(root):
            folder = root
        if folder is None:
            names = SPLIT_FOLDERS.get(split, ())
            if split == "val":
                names += SPLIT_FOLDERS["test"]
            expected = f"expected one of {', '.join(names)}" if names else "that is for class folders without splits"
            raise DataError(f"{root}: no folder for {split}, {expected}")
        self.classes = _classes(folder)
        for which in () if alone else SPLIT_FOLDERS:
            other = find_split(root, which)
            if other is None or other == folder:
                continue
            others = _classes(other)
            if partial:
                self.classes = tuple(sorted({*self.classes, *others}))
            elif {split, which} == {"train", "val"}:
                _compare(folder, self.classes, other, others)
        self.channels = check_channels(channels) or 3
        self.folder = folder
        self.name = f"{folder}, {_share_in_words(split)}" if alone else str(folder)
        files: list[bytes] = []
        self._labels: list[int] = []
        for label, name in enumerate(self.classes):
            found = _images(folder, name)
            if alone and split != "all":
                found = _share(found, folder / name, split)
            if not found and not partial:
                raise DataError(f"{folder / name}: no image in this class (looked for {' '.join(sorted(SUFFIXES))})")
            files += map(os.fsencode, found)
            self._labels += [label] * len(found)
        if not files:
            raise DataError(f"{folder}: no image in any class (looked for {' '.join(sorted(SUFFIXES))})")
        # One array of bytes: a million strings would be some 100 MB, in every process that loads.
        self._files = np.array(files)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Decode one image; raises ImageError, which names its file."""
        path = self.folder / os.fsdecode(bytes(self._files[index]))
        return decode_image(path, channels=self.channels), self._labels[index]

    @property
    def present(self) -> frozenset[str]:
        """The classes that have images."""
        return frozenset(self.classes[label] for label in set(self._labels))

    def digest(self) -> str:
        """Of the images' names below the folder, in their order."""
        return hashlib.sha256(b"\0".join(self._files.tolist())).hexdigest()


def find_split(root: Path, split: Split) -> Path | None:
    """The folder of a split by its names in any case; "val" is the test split's where it has none of its own.

    Raises DataError where several folders have a name of the split.
    """
    if not root.is_dir():
        return None
    folders = {entry.name: entry.name.lower() for entry in _entries(root) if entry.is_dir()}
    for which in (split, "test") if split == "val" else (split,):
        found = sorted(name for name, lower in folders.items() if lower in SPLIT_FOLDERS.get(which, ()))
        if len(found) > 1:
            raise DataError(f"{root}: several folders for {which}, keep one: {', '.join(found)}")
        if found:
            return root / found[0]
    return None


def has_class_folders(root: Path) -> bool:
    """Whether a folder of this one has an image in it, or deeper."""
    if not root.is_dir():
        return False
    names = sorted(entry.name for entry in _entries(root) if entry.is_dir() and not entry.name.startswith("."))
    return any(next(_found(root / name), None) is not None for name in names)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror}") from error


def _classes(folder: Path) -> tuple[str, ...]:
    names = []
    for entry in _entries(folder):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            names.append(entry.name)
        elif entry.is_symlink() and not os.path.exists(entry.path):
            raise DataError(f"{entry.path}: a link that leads nowhere, maybe to a class")
    if not names:
        raise DataError(f"{folder}: no folder for any class, expected one for each, with its images")
    return tuple(sorted(names))


def _compare(folder: Path, classes: tuple[str, ...], other: Path, others: tuple[str, ...]) -> None:
    for here, there, names in (
        (folder, other, sorted(set(classes) - set(others))),
        (other, folder, sorted(set(others) - set(classes))),
    ):
        if names:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            raise DataError(f"{there}: lacks classes that {here} has: {', '.join(names[:SHOWN])}{more}")


def _images(folder: Path, name: str) -> list[str]:
    """Paths relative to the split's folder, sorted; none where the class has no folder."""
    if not (folder / name).is_dir():
        return []
    return sorted(os.path.join(name, file) for file in _found(folder / name))


def _found(folder: Path) -> Iterator[str]:
    """The images below a folder, relative to it. Raises DataError."""
    top = os.path.join(folder, "")
    try:
        for file in walk_images(top):
            yield file.removeprefix(top)
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}") from error


def _share(files: list[str], folder: Path, split: Split) -> list[str]:
    """The part of a class that belongs to the split, in the order of the names; decided by the names alone."""
    if len(files) < 2:
        raise DataError(f"{folder}: {len(files)} image in this class, a split into training and validation needs 2")
    seed = (0, zlib.crc32(os.fsencode(folder.name)))
    order = np.random.default_rng(seed).permutation(len(files))
    border = max(1, round(SPLIT_SHARE * len(files)))
    chosen = order[:border] if split == "val" else order[border:]
    return [files[index] for index in sorted(chosen)]


def _share_in_words(split: Split) -> str:
    part = {"train": "four fifths of each class", "val": "a fifth of each class", "all": "every image"}
    return part[split]
