"""From an image to the network's input, for training (random) and for evaluation.

Everything random comes from the numpy generator of the call, so that a sample's augmentation depends on nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image

from mobileformer.data.base import MODES
from mobileformer.data.image import CROP_FRACTION, preprocess
from mobileformer.data.randaugment import RandAugment

__all__ = ["EvaluationTransform", "ImageTransform", "TrainTransform"]

Crop = Literal["random-resized", "shift"]
Interpolation = Literal["bilinear", "bicubic", "random"]
Fill = Literal["pixel", "constant"]

BILINEAR, BICUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC
FILTERS = {"bilinear": (BILINEAR,), "bicubic": (BICUBIC,), "random": (BILINEAR, BICUBIC)}
ATTEMPTS = 10  # to draw a box that fits, of crops and of erasing
ERASED_AREA, ERASED_ASPECT = (0.02, 1 / 3), (0.3, 1 / 0.3)


class ImageTransform(Protocol):
    """(image, generator) -> float32 of `shape`, which is (C, size, size)."""

    @property
    def shape(self) -> tuple[int, int, int]: ...
    def __call__(self, image: Image.Image, rng: np.random.Generator, /) -> npt.NDArray[np.float32]: ...


class TrainTransform:
    """Crop, resize, flip, RandAugment, y = (x / 255 - mean) / std, erasing; in this order.

    | name | meaning |
    |---|---|
    | size | side of the result in pixels |
    | mean, std | one number a channel, of pixels in 0 .. 1 |
    | crop | "random-resized": a box anywhere with a share of the area uniform in `scale` and the logarithm of its |
    | | aspect (width / height) uniform in that of `ratio`; "shift": the square in the middle, moved |
    | shift | in pixels of the image, uniform in -shift .. shift both ways; outside the image lie zeros |
    | flip | probability of left for right |
    | interpolation | of the resize to `size`; "random" tosses between the two |
    | randaugment | a policy such as "m9-mstd0.5", see `RandAugment`; None for none |
    | erase | probability that one box, 2 to 33 % of the area, height / width 0.3 to 3.3, is filled |
    | erase_mode | "pixel": N(0, 1) for every value; "constant": 0, which is the mean |

    A call takes (image, generator), a Pillow image of any size with mode "L" for one mean or "RGB" for three, and
    gives (C, size, size) float32.

    Source: the published recipes (timm 0.3.4). Crop: C. Szegedy et al., "Going deeper with convolutions", drawn as
    torchvision does. Erasing: Z. Zhong et al., "Random Erasing Data Augmentation".

    Raises:
        ValueError: a value out of range, by name; called: the mode of the image does not fit the means.
        ImportError: a policy is given, and neither timm nor torchvision can be imported.
    """

    def __init__(
        self,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        crop: Crop = "random-resized",
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        shift: int = 0,
        flip: float = 0.5,
        interpolation: Interpolation = "random",
        randaugment: str | None = None,
        erase: float = 0.0,
        erase_mode: Fill = "pixel",
    ) -> None:
        _check_size(size)
        _check_range("scale", scale, 1)
        _check_range("ratio", ratio, math.inf)
        _check_choice("crop", crop, get_args(Crop))
        _check_choice("interpolation", interpolation, get_args(Interpolation))
        _check_choice("erase_mode", erase_mode, get_args(Fill))
        for name, probability in (("flip", flip), ("erase", erase)):
            if not 0 <= probability <= 1:
                raise ValueError(f"{name}: expected a probability, got {probability}")
        if shift < 0:
            raise ValueError(f"shift: expected 0 pixels or more, got {shift}")
        self.size = size
        self.shape = (len(mean), size, size)
        self.mean, self.std = _moments(mean, std)
        self.crop: Crop = crop
        self.scale, self.ratio = scale, ratio
        self.shift, self.flip = shift, flip
        self.filters = FILTERS[interpolation]
        self.erase, self.erase_mode = erase, erase_mode
        self.augment = None
        if randaugment is not None:
            self.augment = RandAugment(randaugment, size=size, mean=self.mean, filters=self.filters)
        # (x / 255 - mean) / std as one product and one sum
        std32 = np.asarray(std, np.float64)[:, None, None]
        self._scale = (1 / (255 * std32)).astype(np.float32)
        self._offset = (-np.asarray(mean, np.float64)[:, None, None] / std32).astype(np.float32)

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> npt.NDArray[np.float32]:
        _check_mode(image, self.shape[0])
        image = self._cut(image, rng)
        if self.flip and rng.random() < self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.augment is not None:
            image = self.augment(image, rng)
        pixels = np.frombuffer(image.tobytes(), np.uint8).reshape(self.size, self.size, -1)
        result = np.empty(self.shape, np.float32)
        np.multiply(pixels.transpose(2, 0, 1), self._scale, out=result)
        result += self._offset
        if self.erase and rng.random() < self.erase:
            self._fill(result, rng)
        return result

    def _cut(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        if self.crop == "shift":
            box = self._moved_square(image.width, image.height, rng)
        else:
            box = self._random_box(image.width, image.height, rng)
        chosen = self.filters[_below(rng, len(self.filters))] if len(self.filters) > 1 else self.filters[0]
        if box != (0, 0, image.width, image.height):
            image = image.crop(box)  # zeros where the box reaches over the edge
        return image.resize((self.size, self.size), chosen)

    def _moved_square(self, width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        if self.shift:
            left += _below(rng, 2 * self.shift + 1) - self.shift
            top += _below(rng, 2 * self.shift + 1) - self.shift
        return left, top, left + side, top + side

    def _random_box(self, width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        logs = math.log(self.ratio[0]), math.log(self.ratio[1])
        for _ in range(ATTEMPTS):
            area = width * height * _between(rng, self.scale)
            aspect = math.exp(_between(rng, logs))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                left, top = _below(rng, width - w + 1), _below(rng, height - h + 1)
                return left, top, left + w, top + h
        # the largest box in the middle with an aspect that is allowed
        w, h = width, height
        if width < self.ratio[0] * height:
            h = round(width / self.ratio[0])
        elif width > self.ratio[1] * height:
            w = round(height * self.ratio[1])
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h

    def _fill(self, result: npt.NDArray[np.float32], rng: np.random.Generator) -> None:
        channels, size, _ = self.shape
        logs = math.log(ERASED_ASPECT[0]), math.log(ERASED_ASPECT[1])
        for _ in range(ATTEMPTS):
            area = size * size * _between(rng, ERASED_AREA)
            aspect = math.exp(_between(rng, logs))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h < size and w < size:
                top, left = _below(rng, size - h + 1), _below(rng, size - w + 1)
                noise = self.erase_mode == "pixel"
                fill = rng.standard_normal((channels, h, w), dtype=np.float32) if noise else np.float32(0)
                result[:, top : top + h, left : left + w] = fill
                return


class EvaluationTransform:
    """`preprocess`: short side to floor(size / crop_fraction), centre crop, y = (x / 255 - mean) / std.

    crop_fraction: 0.875 as published; 1 keeps the whole of a square image. A call takes (image, generator), of which
    the generator is not used, and gives (C, size, size) float32.

    Raises:
        ValueError: a value out of range; called: the mode of the image does not fit the means.
    """

    def __init__(
        self, size: int, mean: Sequence[float], std: Sequence[float], *, crop_fraction: float = CROP_FRACTION
    ) -> None:
        _check_size(size)
        if not 0 < crop_fraction <= 1:
            raise ValueError(f"crop_fraction: expected a number in (0, 1], got {crop_fraction}")
        self.size = size
        self.shape = (len(mean), size, size)
        self.mean, self.std = _moments(mean, std)
        self.crop_fraction = crop_fraction

    def __call__(self, image: Image.Image, rng: np.random.Generator | None = None) -> npt.NDArray[np.float32]:
        return preprocess(image, size=self.size, mean=self.mean, std=self.std, crop_fraction=self.crop_fraction)


def _between(rng: np.random.Generator, bounds: tuple[float, float]) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * rng.random()


def _below(rng: np.random.Generator, bound: int) -> int:
    # A third of the time that rng.integers takes, and as even: 2^-53 against bounds of some thousand pixels.
    return int(rng.random() * bound)


def _check_mode(image: Image.Image, channels: int) -> None:
    if image.mode != MODES[channels]:
        raise ValueError(f"image: mode {image.mode!r} does not fit {channels} means, expected {MODES[channels]!r}")


def _check_size(size: int) -> None:
    if size < 1:
        raise ValueError(f"size: expected at least 1 pixel, got {size}")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def _check_range(name: str, bounds: tuple[float, float], limit: float) -> None:
    if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1] <= limit or math.isinf(bounds[1]):
        raise ValueError(f"{name}: expected 0 < low <= high{'' if math.isinf(limit) else f' <= {limit}'}, got {bounds}")


def _moments(mean: Sequence[float], std: Sequence[float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if len(mean) != len(std) or len(mean) not in MODES:
        raise ValueError(f"mean and std: expected 1 or 3 numbers each, got {len(mean)} and {len(std)}")
    if not all(map(math.isfinite, mean)) or not all(math.isfinite(value) and value > 0 for value in std):
        raise ValueError(f"mean and std: expected finite numbers, std above 0, got {tuple(mean)} and {tuple(std)}")
    return tuple(mean), tuple(std)
