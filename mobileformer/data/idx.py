"""IDX files: MNIST, Fashion-MNIST and what else is laid out as they are.

A file is a magic number, the sizes as big-endian 32-bit integers, then the bytes (Y. LeCun, "The MNIST database of
handwritten digits"): 0x00000803 and N, H, W for images, 0x00000801 and N for labels. Each may be gzipped.

| where                           | who lays it out so                                          |
|---------------------------------|-------------------------------------------------------------|
| train-images-idx3-ubyte(.gz)    | the downloads, Debian's dataset-fashion-mnist               |
| train-images.idx3-ubyte(.gz)    | some mirrors                                                |
| FashionMNIST/raw/, MNIST/raw/   | torchvision's root folder                                   |
"""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mobileformer.data.base import ArraySource, DataError, Split

__all__ = ["FASHION_MNIST", "find_idx_folder", "open_idx"]

FASHION_MNIST = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
# SHA-256 of the label files, unpacked: the files themselves do not say which set they are.
FASHION_MNIST_LABELS = {
    "train": "657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7",
    "val": "3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9",
}
STEMS = {"train": "train", "val": "t10k"}
RAW_FOLDERS = ("", "raw", "FashionMNIST/raw", "MNIST/raw")
IMAGES, LABELS = "images", "labels"
RANK = {IMAGES: 3, LABELS: 1}


def open_idx(path: str | os.PathLike[str], split: Split, *, channels: int | None = None) -> ArraySource:
    """One split of a folder of IDX files, in memory: "val" is what those sets call t10k.

    Classes are Fashion-MNIST's ten names where the labels are those of that set, or the folder's name says so;
    else "0", "1", ... with at least ten of them, as many as both splits' labels need.

    Raises:
        DataError: a file is missing, cut off, not IDX, or images and labels do not fit together.
    """
    folder = find_idx_folder(path)
    if folder is None:
        raise DataError(f"{os.fspath(path)}: no IDX files here, expected e.g. train-images-idx3-ubyte.gz")
    images_file, labels_file = (_require(folder, split, kind) for kind in (IMAGES, LABELS))
    images, labels = _read(images_file, IMAGES), _read(labels_file, LABELS)
    if len(images) != len(labels):
        raise DataError(f"{images_file}: {len(images)} images, but {labels_file.name} has {len(labels)} labels")
    if not len(images):
        raise DataError(f"{images_file}: no images in it")
    other = _find(folder, "val" if split == "train" else "train", LABELS)
    every_label = [labels] if other is None else [labels, _read(other, LABELS)]
    count = max(10, *(int(some.max(initial=0)) + 1 for some in every_label))
    fashion = _is_fashion_mnist(folder, labels, split) and count == len(FASHION_MNIST)
    names = FASHION_MNIST if fashion else tuple(map(str, range(count)))
    return ArraySource(images, labels, names, channels=channels, name=str(images_file))


def find_idx_folder(path: str | os.PathLike[str]) -> Path | None:
    """The folder itself, or the one inside it where torchvision puts them, that has IDX files; None: neither has.

    Raises DataError where there are several.
    """
    root = Path(path)
    found = [
        folder
        for folder in map(root.joinpath, RAW_FOLDERS)
        if any(_find(folder, split, kind) for split in ("train", "val") for kind in (IMAGES, LABELS))
    ]
    if len(found) > 1:
        raise DataError(f"{root}: several data sets here, choose one: {', '.join(map(str, found))}")
    return found[0] if found else None


def _names(split: Split, kind: str) -> list[str]:
    stem, rank = f"{STEMS[split]}-{kind}", f"idx{RANK[kind]}-ubyte"
    return [f"{stem}{joint}{rank}{suffix}" for joint in "-." for suffix in ("", ".gz")]


def _find(folder: Path, split: Split, kind: str) -> Path | None:
    return next((folder / name for name in _names(split, kind) if (folder / name).is_file()), None)


def _require(folder: Path, split: Split, kind: str) -> Path:
    file = _find(folder, split, kind)
    if file is None:
        names = ", ".join(_names(split, kind))
        raise DataError(f"{folder}: the {kind} of {split} are missing, expected one of {names}")
    return file


def _read(file: Path, kind: str) -> npt.NDArray[np.uint8]:
    data = file.read_bytes()
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            raise DataError(f"{file}: cannot be unpacked, the file is cut off or damaged: {error}") from error
    rank = RANK[kind]
    magic, head = 0x0800 | rank, 4 + 4 * rank  # 8: unsigned bytes
    if len(data) < head:
        raise DataError(f"{file}: {len(data)} bytes, an IDX file of {kind} begins with {head}")
    found = int.from_bytes(data[:4], "big")
    if found != magic:
        raise DataError(f"{file}: begins with {found:#010x}, expected {magic:#010x}: not an IDX file of {kind}")
    shape = tuple(np.frombuffer(data, ">u4", rank, offset=4).tolist())
    if len(data) - head != math.prod(shape):
        raise DataError(
            f"{file}: {len(data) - head} bytes after the head, expected {' x '.join(map(str, shape))} = "
            f"{math.prod(shape)}: the file is cut off or damaged"
        )
    return np.frombuffer(data, np.uint8, offset=head).reshape(shape)


def _is_fashion_mnist(folder: Path, labels: npt.NDArray[np.uint8], split: Split) -> bool:
    if hashlib.sha256(labels.tobytes()).hexdigest() == FASHION_MNIST_LABELS[split]:
        return True
    return any("fashion" in name.lower() for name in folder.resolve().parts[-3:])
