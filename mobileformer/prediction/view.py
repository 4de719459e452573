"""From an image, whatever it comes as, to the bytes that a network sees of it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from mobileformer.data.image import (
    CROP_FRACTION,
    MODES,
    ImageError,
    centre_square,
    decode_image,
    find_images,
    with_channels,
)
from mobileformer.files.metadata import Metadata, WeightsError

__all__ = [
    "ImageLike",
    "InputView",
    "Picture",
    "input_view",
    "named_pictures",
    "normalisation",
    "opened",
    "pictures_in",
]

ImageLike = str | os.PathLike[str] | Image.Image | npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class InputView:
    """What a network sees of an image: the square in its middle, `size` pixels wide, and how that is normalised.

    The fields are the keyword arguments of `mobileformer.data.load_image`. C channels, one for each mean.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_fraction: float

    def pixels(self, image: ImageLike, name: str = "image") -> npt.NDArray[np.uint8]:
        """One image -> (size, size, C) uint8, resized and cropped, not normalised.

        ============  ==========================================================================================
        image         accepted
        ============  ==========================================================================================
        path          a file that `mobileformer.data.decode_image` reads
        Pillow image  of any mode; taken as upright
        array         uint8 (H,W) or (H,W,1) grey, (H,W,3) RGB
        ============  ==========================================================================================

        Raises ImageError, which begins with the file's name or `name`, for an image that cannot be used; TypeError for
        anything else, ValueError for an array of another shape.
        """
        channels = len(self.mean)
        square = np.asarray(centre_square(opened(image, channels, name), self.size, self.crop_fraction))
        return square.reshape(self.size, self.size, channels)


@dataclass(frozen=True, slots=True)
class Picture:
    """An image under a name of its own; or `problem`, why there is none, which becomes the error of its answer."""

    name: str
    image: ImageLike | None = None
    problem: str | None = None


def input_view(metadata: Metadata, name: str, size: int | None = None) -> InputView:
    """As the weights `name` were trained for, with `size` in place of their own where one is given.

    Raises WeightsError as `normalisation`.
    """
    mean, std = normalisation(metadata, name)
    return InputView(size or metadata.input_size or 224, mean, std, metadata.crop_fraction or CROP_FRACTION)


def normalisation(metadata: Metadata, name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std that the weights `name` were trained with.

    Raises WeightsError for weights that no image fits, and where they do not say what it is normalised with.
    """
    if metadata.in_chans not in MODES:
        raise WeightsError(f"{name}: takes {metadata.in_chans} channels, an image file has 1 or 3")
    if metadata.mean is None or metadata.std is None:
        raise WeightsError(
            f"{name}: does not say what its input is normalised with; write it again with "
            "mobileformer.save_weights(model, path, mean=..., std=...)"
        )
    return metadata.mean, metadata.std


def opened(image: ImageLike, channels: int, name: str) -> Image.Image:
    """One image, as `InputView.pixels` accepts it, as 8-bit "RGB" or "L", whole. Raises as that does."""
    if isinstance(image, str | os.PathLike):
        found = decode_image(image, channels=channels)
    elif isinstance(image, Image.Image):
        found = with_channels(image, channels, name)
    elif isinstance(image, np.ndarray):
        found = with_channels(_from_array(image, name), channels, name)
    else:
        raise TypeError(f"{name}: expected a path, a Pillow image or a uint8 array, got {type(image).__name__}")
    if not (found.width and found.height):
        raise ImageError(f"{name}: {found.width} x {found.height} pixels, so there is nothing to see")
    return found


def named_pictures(images: ImageLike | Picture | Iterable[ImageLike | Picture]) -> Iterator[Picture]:
    """Every image with a name: its path, what Pillow knows of it, or "image N", N its position from 0.

    A single image is one; an array (B,H,W,C) is B of them.
    """
    single = isinstance(images, str | os.PathLike | Image.Image | Picture)
    if single or (isinstance(images, np.ndarray) and images.ndim < 4):
        images = [images]  # type: ignore[list-item]
    for index, image in enumerate(images):  # type: ignore[arg-type]
        yield image if isinstance(image, Picture) else Picture(_name_of(image, index), image)  # type: ignore[arg-type]


def pictures_in(arguments: Sequence[str | os.PathLike[str]]) -> Iterator[Picture]:
    """The images that files, folders and patterns stand for, as `mobileformer.data.find_images` finds them."""
    for name, problem in find_images(arguments):
        yield Picture(name, None if problem else name, problem)


def _name_of(image: Any, index: int) -> str:
    if isinstance(image, str | os.PathLike):
        return os.fspath(image)  # type: ignore[return-value]
    return getattr(image, "filename", "") or f"image {index}"


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    if array.dtype != np.uint8:
        raise TypeError(f"{name}: expected an array of uint8, got {array.dtype}")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] == 3):
        raise ValueError(f"{name}: expected an array (H,W), (H,W,1) or (H,W,3), got shape {array.shape}")
    return Image.fromarray(np.ascontiguousarray(array))
