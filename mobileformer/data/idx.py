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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import numpy.typing as npt

from mobileformer.data.base import ArraySource, DataError, Split
from mobileformer.files.reading import open_regular

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
STEMS = {"train": "train", "val": "t10k", "test": "t10k"}
RAW_FOLDERS = ("", "raw", "FashionMNIST/raw", "MNIST/raw")
IMAGES, LABELS = "images", "labels"
RANK = {IMAGES: 3, LABELS: 1}
DEFLATE = 1032  # bytes at most that one packed byte stands for (zlib's technical details)


def open_idx(path: str | os.PathLike[str], split: Split, *, channels: int | None = None) -> ArraySource:
    """One split of a folder of IDX files, in memory: "val" is what those sets call t10k.

    Classes are Fashion-MNIST's ten names where the labels are those of that set, or the folder's name says so;
    else "0", "1", ... with at least ten of them, as many as both splits' labels need.

    "test" is t10k as well. Nothing is taken for a file but what its head and its size on disk allow.

    Raises:
        DataError: a file is missing, cut off, not IDX, or images and labels do not fit together.
    """
    if split not in STEMS:
        raise DataError(f"{os.fspath(path)}: IDX files have the splits {', '.join(STEMS)}, not {split}")
    folder = find_idx_folder(path)
    if folder is None:
        raise DataError(f"{os.fspath(path)}: no IDX files here, expected e.g. train-images-idx3-ubyte.gz")
    images_file, labels_file = (_require(folder, split, kind) for kind in (IMAGES, LABELS))
    count, labelled = _shape(images_file, IMAGES)[0], _shape(labels_file, LABELS)[0]
    if count != labelled:
        raise DataError(f"{images_file}: {count} images, but {labels_file.name} has {labelled} labels")
    if not count:
        raise DataError(f"{images_file}: no images in it")
    images, labels = _read(images_file, IMAGES), _read(labels_file, LABELS)
    other = _find(folder, "val" if split == "train" else "train", LABELS)
    every_label = [labels] if other is None else [labels, _read(other, LABELS)]
    count = max(10, *(int(some.max(initial=0)) + 1 for some in every_label))
    fashion = _is_fashion_mnist(folder, labels) and count == len(FASHION_MNIST)
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


def _shape(file: Path, kind: str) -> tuple[int, ...]:
    with _opened(file) as (stream, size, packed):
        return _head(file, kind, stream, size, packed)


def _read(file: Path, kind: str) -> npt.NDArray[np.uint8]:
    """Exactly the bytes that the head says. Pages of the array are taken as they are filled."""
    with _opened(file) as (stream, size, packed):
        shape = _head(file, kind, stream, size, packed)
        data = np.empty(math.prod(shape), np.uint8)
        view, done = data.data, 0
        while done < len(data) and (count := stream.readinto(view[done : done + 2**20])):  # type: ignore[attr-defined]
            done += count
        if done < len(data):
            raise _wrong_length(file, str(done), shape)
        if stream.read(1):
            raise _wrong_length(file, f"more than {len(data)}", shape)
    return data.reshape(shape)


def _head(file: Path, kind: str, stream: BinaryIO, size: int, packed: bool) -> tuple[int, ...]:
    """The shape, which the file is large enough for: `size` bytes on disk."""
    rank = RANK[kind]
    magic, length = 0x0800 | rank, 4 + 4 * rank  # 8: unsigned bytes
    head = stream.read(length)
    if len(head) < length:
        raise DataError(f"{file}: {len(head)} bytes, an IDX file of {kind} begins with {length}")
    found = int.from_bytes(head[:4], "big")
    if found != magic:
        raise DataError(f"{file}: begins with {found:#010x}, expected {magic:#010x}: not an IDX file of {kind}")
    shape = tuple(np.frombuffer(head, ">u4", rank, offset=4).tolist())
    if not packed and size - length != math.prod(shape):
        raise _wrong_length(file, str(size - length), shape)
    if packed and DEFLATE * size < math.prod(shape):
        raise _wrong_length(file, f"at most {DEFLATE * size}", shape)
    return shape


def _wrong_length(file: Path, found: str, shape: tuple[int, ...]) -> DataError:
    product = f"{' x '.join(map(str, shape))} = {math.prod(shape)}"
    return DataError(f"{file}: {found} bytes after the head, expected {product}: the file is cut off or damaged")


@contextmanager
def _opened(file: Path) -> Iterator[tuple[BinaryIO, int, bool]]:
    """(the bytes, unpacked; size of the file on disk; whether it is packed)."""
    try:
        with open_regular(file) as plain:
            packed = plain.read(2) == b"\x1f\x8b"
            plain.seek(0)
            size = os.fstat(plain.fileno()).st_size
            stream = cast(BinaryIO, gzip.GzipFile(fileobj=plain)) if packed else plain
            yield stream, size, packed
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{file}: cannot be unpacked, the file is cut off or damaged: {error}") from error


def _is_fashion_mnist(folder: Path, labels: npt.NDArray[np.uint8]) -> bool:
    if hashlib.sha256(labels.tobytes()).hexdigest() in FASHION_MNIST_LABELS.values():
        return True
    return any("fashion" in name.lower() for name in folder.resolve().parts[-3:])
