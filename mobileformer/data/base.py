"""What every data set of images is to the trainer: a length, and samples, pairs of image and target, by index."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from mobileformer.data.image import MODES

__all__ = ["MODES", "ArraySource", "DataError", "Source", "Split", "check_channels", "place"]

Split = Literal["train", "val", "test", "all"]


class DataError(ValueError):
    """A data set that cannot be used; the message says which file or folder, and what was expected there."""


class Source(Protocol):
    """Images and what is known of each, by index.

    | name | what |
    |---|---|
    | classes | the names of the classes; a label is a position in it |
    | channels | of every image: 1 (mode "L") or 3 (mode "RGB") |
    | source[index] | (image, label), or for another task than classification (image, whatever its transform takes as |
    | | target); raises `ImageError`, which names the file, where an image is broken |
    | aspects | a source may have them: width / height of every image; then `training_batches` makes its batches of |
    | | images that are all upright, or all broad |
    """

    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def channels(self) -> int: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> tuple[Image.Image, Any]: ...


class ArraySource:
    """A data set that fits in memory, as one array.

    | name | shape | dtype, unit |
    |---|---|---|
    | images | (N, H, W) or (N, H, W, 3) | uint8 |
    | labels | (N,) | integers, positions in `classes` |

    `channels` is that of the array unless given; grey becomes RGB and RGB becomes grey (ITU-R 601) where it differs.

    Raises:
        DataError: a shape, dtype or label that does not fit; the message starts with `name`.
    """

    def __init__(
        self,
        images: npt.NDArray[np.uint8],
        labels: npt.ArrayLike,
        classes: Sequence[str],
        *,
        channels: int | None = None,
        name: str = "array",
    ) -> None:
        grey = images.ndim == 3
        if images.dtype != np.uint8 or not (grey or (images.ndim == 4 and images.shape[3] == 3)):
            raise DataError(
                f"{name}: images: expected uint8 of shape (N, H, W) or (N, H, W, 3), got {images.dtype} {images.shape}"
            )
        labels = np.asarray(labels)
        if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
            raise DataError(f"{name}: expected {len(images)} integers as labels, got {labels.dtype} {labels.shape}")
        if len(labels) and (labels.min() < 0 or labels.max() >= len(classes)):
            raise DataError(
                f"{name}: labels from {labels.min()} to {labels.max()}, expected 0 to {len(classes) - 1}: "
                f"there are {len(classes)} classes"
            )
        self.images = images
        self.labels: list[int] = labels.tolist()
        self.name = name
        self.classes = tuple(classes)
        self.channels = check_channels(channels) or (1 if grey else 3)
        self._convert = MODES[self.channels] if self.channels != (1 if grey else 3) else None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image = Image.fromarray(self.images[index])
        return (image if self._convert is None else image.convert(self._convert)), self.labels[index]

    def digest(self) -> str:
        """Of the labels and the images' sizes."""
        labels = np.asarray(self.labels, np.int64).tobytes()
        return hashlib.sha256(repr(self.images.shape).encode() + labels).hexdigest()


def place(source: Any) -> str:
    """Where a source's images are from, in words; names that are no text escaped."""
    name = getattr(source, "name", None)
    return (name if isinstance(name, str) else type(source).__name__).encode(errors="backslashreplace").decode()


def check_channels(channels: int | None) -> int | None:
    """The argument, or ValueError: images have 1 or 3 channels."""
    if channels not in (None, 1, 3):
        raise ValueError(f"channels: an image has 1 or 3 of them, got {channels}")
    return channels
