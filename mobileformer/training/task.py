"""What training asks of a task: all that differs between naming an image's class and, say, finding objects in it.

A run owns what is the same for all: the order of images, updates, learning rates, processes, checkpoints, the log. It
is handed a task and never asks which one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from mobileformer.data.batch import Batch, Transform
from mobileformer.data.transforms import ImageTransform
from mobileformer.training.recipe import Recipe
from mobileformer.training.world import World

__all__ = ["Figure", "Forward", "Task"]

Forward = Callable[..., Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A number that a validation ends in: its key in logs and results, and its words in pictures.

    higher_is_better: which of two is the better one, where this is what the best weights are chosen by.
    """

    key: str
    title: str
    unit: str
    higher_is_better: bool = True

    def is_better(self, value: float, than: float) -> bool:
        """Whether one value is strictly better than another. NaN stands for none: all others are better."""
        if math.isnan(value) or math.isnan(than):
            return not math.isnan(value)
        return value > than if self.higher_is_better else value < than


class Task(Protocol):
    """A task at work in one run: `task(training, recipe, weights, use_fused=True)` makes its network and all else.

    ==================  ===================================================================================
    of the class        what
    ==================  ===================================================================================
    name                in recipes (`task = "..."`) and in the metadata of weights
    recipe_type         the `Recipe` with the task's own keys
    best_by             the figure that the best weights are chosen by
    loss_unit           what the loss is, in words
    ==================  ===================================================================================

    ==================  ===================================================================================
    of a run            what
    ==================  ===================================================================================
    model               the network; model(x) without targets has to run too, for BatchNorm's statistics
    recipe              as given, but that the variant and what the initial weights say are filled in
    ==================  ===================================================================================

    To make it, the generator of torch is seeded with `recipe.seed` before the network is drawn. Raises TrainingError
    where the recipe, the data and the initial weights do not fit, and what reading those raises.
    """

    name: ClassVar[str]
    recipe_type: ClassVar[type[Recipe]]
    best_by: ClassVar[Figure]
    loss_unit: ClassVar[str]

    def __init__(self, training: Any, recipe: Any, weights: Path | None, *, use_fused: bool) -> None: ...

    @property
    def model(self) -> Any: ...
    @property
    def recipe(self) -> Recipe: ...

    def rate_share(self, name: str) -> float:
        """The learning rate of the parameter called `name`, as a share of the recipe's."""
        ...

    def train_mode(self) -> None:
        """Put the network into training mode, but for what the recipe freezes."""
        ...

    def training_transform(self, size: int) -> ImageTransform | Transform:
        """What a training sample goes through at this side in pixels, and how a batch is made of several."""
        ...

    def evaluation_transform(self, size: int) -> ImageTransform | Transform:
        """What a validation sample goes through at this side in pixels, and how a batch is made of several."""
        ...

    def loss(
        self, forward: Forward, batch: Batch, rng: np.random.Generator, device: torch.device
    ) -> Tensor | Mapping[str, Tensor]:
        """The mean loss of a batch, a scalar with a gradient; or its parts by name, the same at each call.

        forward: the network, in the recipe's precision and on all processes, called once; what it is given goes to
        `device` first, as batch.x is on the CPU. rng: all that is random besides dropout comes from it.
        """
        ...

    def score(self, model: Any, batches: Iterable[Batch], world: World) -> dict[str, float]:
        """The figures of a validation over all processes, each of which has a part of the batches.

        model: the network or its average, in evaluation mode; gradients are off. `best_by` and "loss" are among the
        figures. Raises TrainingError where not one sample could be read.
        """
        ...

    def in_words(self, figures: Mapping[str, float]) -> str:
        """The figures as a line for who watches."""
        ...

    def describe(self, size: int) -> dict[str, Any]:
        """The fields of `mobileformer.files.metadata.Metadata` that weights of this run have, as plain values."""
        ...

    def save(self, model: Any, path: Path, size: int) -> None:
        """Write the network, or its average, as weights that describe themselves: whole or not at all."""
        ...
