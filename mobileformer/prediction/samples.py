"""A data set's images as the bytes that a network normalises itself."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from mobileformer.data.batch import class_of
from mobileformer.prediction.view import InputView

__all__ = ["LabelledPixels"]

Sample = tuple[npt.NDArray[np.uint8], int]


class LabelledPixels:
    """The `mobileformer.data.batch.Transform` of images with classes, as a network sees them, not yet normalised.

    `collate` gives x (B, size, size, C) uint8 and y (B) int64: a quarter of the memory, and nothing is computed here.
    """

    def __init__(self, view: InputView) -> None:
        self.view = view
        self.channels = len(view.mean)

    def __call__(self, sample: tuple[Image.Image, int], rng: np.random.Generator) -> Sample:
        image, label = sample
        return self.view.pixels(image), class_of(label)

    def collate(self, samples: Iterable[Sample], most: int) -> tuple[Tensor, Tensor]:
        x = np.empty((most, self.view.size, self.view.size, self.channels), np.uint8)
        labels: list[int] = []
        for pixels, label in samples:
            x[len(labels)] = pixels
            labels.append(label)
        return torch.from_numpy(x[: len(labels)]), torch.tensor(labels, dtype=torch.int64)
