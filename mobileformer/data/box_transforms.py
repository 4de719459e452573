"""From an image with boxes to the network's input, for training (random) and for evaluation; the boxes move along.

Everything random comes from the numpy generator of the call, so that a sample's augmentation depends on nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from mobileformer.data.image import MODES, normalised

__all__ = ["BoxTransform", "BoxedImages", "fitted_size"]

MULTIPLE = 32  # of the padded height and width: the stride of the coarsest map
# Of the first resize, before the crop, which has no bound of its own: a strip of 1 x 10000 pixels stays small.
MAX_SIDE = 8192


@dataclass
class BoxedImages:
    """The y of a `Batch` of B padded images (B, C, H, W).

    | name | shape | dtype, unit |
    |---|---|---|
    | targets | B | {"boxes": (N, 4) float32 corners in pixels of the padded image, "labels": (N) int64} |
    | sizes | (B, 2) | int64, height and width of the part that is no padding |
    | original_sizes | (B, 2) | int64, height and width in the file |
    | image_ids | (B) | int64 |
    | truths | B, or none | the source's targets in pixels of the file, which a found box is judged by |
    """

    targets: list[dict[str, Tensor]]
    sizes: Tensor
    original_sizes: Tensor
    image_ids: Tensor
    truths: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device | str) -> BoxedImages:
        """The same with targets and sizes on a device; what is compared outside of the network stays."""
        targets = [{key: value.to(device, non_blocking=True) for key, value in one.items()} for one in self.targets]
        sizes = self.sizes.to(device, non_blocking=True)
        return BoxedImages(targets, sizes, self.original_sizes, self.image_ids, self.truths)

    def in_original(self, boxes: Tensor, index: int) -> Tensor:
        """Corners (n, 4) in pixels of image `index` of the batch -> in pixels of its file."""
        scale = (self.original_sizes[index] / self.sizes[index].cpu()).flip(0).repeat(2)
        return boxes * scale.to(boxes)


@dataclass
class _Sample:
    pixels: npt.NDArray[np.float32]
    boxes: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    original_size: tuple[int, int]
    truth: dict[str, Any]


class BoxTransform:
    """Flip, then resize; or, with `crop` as probability, first a smaller resize and a crop; y = (x / 255 - mean) / std.

    | name | meaning |
    |---|---|
    | mean, std | one number a channel, of pixels in 0 .. 1 |
    | flip | probability of left for right |
    | short_sides | one of these is drawn, and the short side becomes it; none keep the image's own size |
    | longest | the long side at most; the short one gives way |
    | crop | probability of the crop |
    | crop_short_sides | one of these is the short side before the crop; none keep the size |
    | crop_sides | (least, most) of height and of width of the crop, each drawn evenly, at most those of the image |
    | keep_truths | whether batches have `truths`, as an evaluation needs them |

    The defaults are DETR's for training; `BoxTransform.for_evaluation` flips and crops nothing.

    A call takes ((image, target), generator) as `CocoSource` has them. Boxes are cut at the edges of a crop, and those
    without an area left go, with their labels. `collate` pads to the batch's largest height and width, each rounded up
    to a multiple of 32, with zeros at the right and the bottom, and gives (B, C, H, W) float32 and `BoxedImages`.

    Source: N. Carion et al., "End-to-End Object Detection with Transformers", and its code.

    Raises:
        ValueError: a value out of range, by name; called: the mode of the image does not fit the means.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        flip: float = 0.5,
        short_sides: Sequence[int] = tuple(range(480, 801, 32)),
        longest: int = 1333,
        crop: float = 0.5,
        crop_short_sides: Sequence[int] = (400, 500, 600),
        crop_sides: tuple[int, int] = (384, 600),
        keep_truths: bool = False,
    ) -> None:
        if len(mean) != len(std) or len(mean) not in MODES:
            raise ValueError(f"mean and std: expected 1 or 3 numbers each, got {len(mean)} and {len(std)}")
        if not np.isfinite(mean).all() or not np.isfinite(std).all() or min(std) <= 0:
            raise ValueError(f"mean and std: expected finite numbers, std above 0, got {tuple(mean)} and {tuple(std)}")
        for name, probability in (("flip", flip), ("crop", crop)):
            if not 0 <= probability <= 1:
                raise ValueError(f"{name}: expected a probability, got {probability}")
        for name, sides in (("short_sides", short_sides), ("crop_short_sides", crop_short_sides)):
            if any(not 1 <= side <= MAX_SIDE for side in sides):
                raise ValueError(f"{name}: expected 1 to {MAX_SIDE} pixels, got {tuple(sides)}")
        if not 1 <= longest <= MAX_SIDE:
            raise ValueError(f"longest: expected 1 to {MAX_SIDE} pixels, got {longest}")
        if len(crop_sides) != 2 or not 1 <= crop_sides[0] <= crop_sides[1]:
            raise ValueError(f"crop_sides: expected 1 <= least <= most, got {crop_sides}")
        self.channels = len(mean)
        self.mean, self.std = tuple(mean), tuple(std)
        self.flip, self.crop, self.crop_sides = flip, crop, crop_sides
        self.short_sides, self.crop_short_sides = tuple(short_sides), tuple(crop_short_sides)
        self.longest, self.keep_truths = longest, keep_truths

    @classmethod
    def for_evaluation(
        cls, mean: Sequence[float], std: Sequence[float], *, short_side: int | None = 800, longest: int = 1333
    ) -> BoxTransform:
        """The whole image; its own size where `short_side` is None. Nothing is drawn, and `truths` are kept."""
        sides = () if short_side is None else (short_side,)
        return cls(mean, std, flip=0, crop=0, short_sides=sides, longest=longest, keep_truths=True)

    def __call__(self, sample: tuple[Image.Image, dict[str, Any]], rng: np.random.Generator) -> _Sample:
        image, target = sample
        if image.mode != MODES[self.channels]:
            wanted = MODES[self.channels]
            raise ValueError(f"image: mode {image.mode!r} does not fit {self.channels} means, expected {wanted!r}")
        original = (image.height, image.width)
        boxes, labels = target["boxes"].copy(), target["labels"]
        if self.flip and rng.random() < self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            boxes[:, 0::2] = image.width - boxes[:, 2::-2]
        if self.crop and rng.random() < self.crop:
            image, boxes = self._resized(image, boxes, self.crop_short_sides, MAX_SIDE, rng)
            image, boxes, labels = self._cut(image, boxes, labels, rng)
        image, boxes = self._resized(image, boxes, self.short_sides, self.longest, rng)
        pixels = normalised(np.asarray(image), self.mean, self.std)
        return _Sample(pixels, boxes, labels, original, target)

    def collate(self, samples: Iterable[_Sample], most: int) -> tuple[Tensor, BoxedImages]:
        found = list(samples)
        sizes = torch.tensor([one.pixels.shape[1:] for one in found], dtype=torch.int64).view(-1, 2)
        largest = sizes.max(0).values.tolist() if found else (MULTIPLE, MULTIPLE)
        height, width = (-(-side // MULTIPLE) * MULTIPLE for side in largest)
        x = np.zeros((len(found), self.channels, height, width), np.float32)
        for image, one in zip(x, found, strict=True):
            image[:, : one.pixels.shape[1], : one.pixels.shape[2]] = one.pixels
        # Arrays of a source share the memory of all its boxes, and torch would write into it: hence the copies
        targets = [{"boxes": torch.tensor(one.boxes), "labels": torch.tensor(one.labels)} for one in found]
        return torch.from_numpy(x), BoxedImages(
            targets=targets,
            sizes=sizes,
            original_sizes=torch.tensor([one.original_size for one in found], dtype=torch.int64).view(-1, 2),
            image_ids=torch.tensor([one.truth["image_id"] for one in found], dtype=torch.int64),
            truths=[one.truth for one in found] if self.keep_truths else [],
        )

    def _resized(
        self,
        image: Image.Image,
        boxes: npt.NDArray[np.float32],
        short_sides: tuple[int, ...],
        longest: int,
        rng: np.random.Generator,
    ) -> tuple[Image.Image, npt.NDArray[np.float32]]:
        if not short_sides:
            return image, boxes
        drawn = int(rng.integers(len(short_sides))) if len(short_sides) > 1 else 0
        size = fitted_size(image.width, image.height, short_sides[drawn], longest)
        if size == image.size:
            return image, boxes
        scale = np.array([size[0] / image.width, size[1] / image.height] * 2, np.float32)
        return image.resize(size, Image.Resampling.BILINEAR), boxes * scale

    def _cut(
        self,
        image: Image.Image,
        boxes: npt.NDArray[np.float32],
        labels: npt.NDArray[np.int64],
        rng: np.random.Generator,
    ) -> tuple[Image.Image, npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        least, most = self.crop_sides
        width, height = (
            int(rng.integers(min(least, side), min(most, side), endpoint=True)) for side in (image.width, image.height)
        )
        left = int(rng.integers(image.width - width, endpoint=True))
        top = int(rng.integers(image.height - height, endpoint=True))
        moved = boxes - np.array([left, top, left, top], np.float32)
        moved = np.clip(moved, 0, np.array([width, height, width, height], np.float32))
        stays = (moved[:, 2:] > moved[:, :2]).all(1)
        return image.crop((left, top, left + width, top + height)), moved[stays], labels[stays]


def fitted_size(width: int, height: int, short_side: int, longest: int) -> tuple[int, int]:
    """(width, height) with this short side, or the one with which the long side has `longest` pixels, and no more.

    Rounded as DETR does it, down.
    """
    low, high = min(width, height), max(width, height)
    if high / low * short_side > longest:
        short_side = max(1, round(longest * low / high))
    long_side = min(longest, max(1, int(short_side * high / low)))
    return (short_side, long_side) if width < height else (long_side, short_side)
