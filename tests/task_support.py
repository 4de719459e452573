"""A second task, which the package does not know: where the bright squares of an image are, any number of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from mobileformer.data.batch import Batch
from mobileformer.files.metadata import Metadata, encode
from mobileformer.files.replacing import replacing
from mobileformer.training import Figure, Recipe, TrainingError, World

SIDE = 16


class Squares:
    """Image k of `images` shows 1 + k % 3 squares of 4 pixels; the target is their left and top, (n,2) int."""

    classes = ("square",)
    channels = 1

    def __init__(self, images: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.corners = [rng.integers(0, SIDE - 4, (1 + index % 3, 2)) for index in range(images)]

    def __len__(self) -> int:
        return len(self.corners)

    def __getitem__(self, index: int) -> tuple[Image.Image, np.ndarray]:
        pixels = np.zeros((SIDE, SIDE), np.uint8)
        for left, top in self.corners[index]:
            pixels[top : top + 4, left : left + 4] = 255
        return Image.fromarray(pixels), self.corners[index]


class Turned:
    """Turns a sample left to right, squares and all, with a probability. A batch's y is one tensor for each image."""

    channels = 1

    def __init__(self, probability: float) -> None:
        self.probability = probability

    def __call__(self, sample: tuple[Image.Image, np.ndarray], rng: np.random.Generator) -> tuple[Any, Any]:
        image, corners = sample
        pixels = np.asarray(image, np.float32) / 255
        if rng.random() < self.probability:
            pixels, corners = pixels[:, ::-1].copy(), np.stack([SIDE - 4 - corners[:, 0], corners[:, 1]], 1)
        return pixels, corners

    def collate(self, samples: Iterable[tuple[Any, Any]], most: int) -> tuple[Tensor, list[Tensor]]:
        given = list(samples)
        assert len(given) <= most
        x = torch.from_numpy(np.array([pixels for pixels, _ in given], np.float32).reshape(-1, 1, SIDE, SIDE))
        return x, [torch.from_numpy(corners) for _, corners in given]


@dataclass(frozen=True, kw_only=True)
class SquaresRecipe(Recipe):
    task: str = "squares"
    turned: float = 0.5

    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {**Recipe.ranges, "turned": (0, 1)}


class FindSquares:
    """Learns the mean corner. The smaller the error, the better."""

    name: ClassVar[str] = "squares"
    recipe_type: ClassVar[type[Recipe]] = SquaresRecipe
    best_by: ClassVar[Figure] = Figure(key="error", title="Error", unit="pixels", higher_is_better=False)
    loss_unit: ClassVar[str] = "pixels"

    def __init__(self, training: Any, recipe: SquaresRecipe, weights: Path | None, *, use_fused: bool = True) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.model = nn.Sequential(
            nn.Conv2d(1, 8, 4, stride=4), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 2)
        )

    def rate_share(self, name: str) -> float:
        return 1.0

    def train_mode(self) -> None:
        self.model.train()

    def training_transform(self, size: int) -> Turned:
        return Turned(self.recipe.turned)

    def evaluation_transform(self, size: int) -> Turned:
        return Turned(0.0)

    def loss(self, forward: Any, batch: Batch, rng: np.random.Generator, device: torch.device) -> Mapping[str, Tensor]:
        error = (forward(batch.x.to(device)) - _mean_corners(batch)).abs().mean(0)
        return {"left": error[0], "top": error[1]}

    def score(self, model: Any, batches: Iterable[Batch], world: World) -> dict[str, float]:
        found = [(model(batch.x) - _mean_corners(batch)).abs().sum(1) for batch in batches if len(batch.index)]
        total, images = world.sum(sum(float(each.sum()) for each in found), sum(map(len, found)))
        if not images:
            raise TrainingError("validation: not one image could be read")
        return {"error": total / images, "loss": total / images}

    def in_words(self, figures: Mapping[str, float]) -> str:
        return f"off by {figures['error']:.2f} pixels"

    def describe(self, size: int) -> dict[str, Any]:
        return {"variant": self.recipe.variant, "num_classes": 1, "in_chans": 1}

    def save(self, model: Any, path: Path, size: int) -> None:
        metadata = Metadata(**self.describe(size), task=self.name)
        with replacing(path) as temporary:
            save_file(model.state_dict(), temporary, metadata=encode(metadata, form="mobileformer", version=1))


def _mean_corners(batch: Batch) -> Tensor:
    """(B,2); raises where an image and its squares have not been turned together."""
    for pixels, corners in zip(batch.x[:, 0], batch.y, strict=True):
        covered = torch.zeros_like(pixels)
        for left, top in corners.tolist():
            covered[top : top + 4, left : left + 4] = 1
        assert torch.equal(pixels, covered)
    return torch.stack([corners.float().mean(0) for corners in batch.y])
