"""Classification: the one class that an image is of. Cross-entropy on mixed images, top-1 and top-5 of a validation."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mobileformer.data.batch import Batch
from mobileformer.data.transforms import EvaluationTransform, TrainTransform
from mobileformer.evaluation.accuracy import Tally
from mobileformer.models import Model
from mobileformer.training.recipe import MAX_SIZE, Recipe, check_rising
from mobileformer.training.sources import normalisation
from mobileformer.training.state import TrainingError
from mobileformer.training.task import Figure, Forward
from mobileformer.training.world import World
from mobileformer.weights.load import load_weights, read_metadata, save_weights
from mobileformer.weights.stem import adapt_numbers

__all__ = ["Classification", "ClassificationRecipe", "mixup_loss"]


@dataclass(frozen=True, kw_only=True)
class ClassificationRecipe(Recipe):
    """The keys of `Recipe`, and these.

    ======================  ===================================================================================
    key                     meaning
    ======================  ===================================================================================
    label_smoothing, mixup  epsilon; alpha of the Beta distribution, 0 is off
    dropout                 before the last layer
    crop                    "random-resized" (`crop_scale`, `crop_ratio`) or "shift" (by `shift` pixels, zeros)
    randaugment             "" or a policy such as "m9-mstd0.5"
    erase, erase_mode       probability of one erased box; filled by "pixel" noise or a "constant" zero
    crop_fraction           of a validation image: the centre crop's share of the resized short side
    freeze                  with "features" the classifier is trained
    ======================  ===================================================================================

    Source of the seven published ones: the authors' README and timm 0.3.4's defaults.
    """

    task: str = "classification"
    label_smoothing: float = 0.1
    mixup: float = 0.0
    dropout: float = 0.0
    crop: Literal["random-resized", "shift"] = "random-resized"
    crop_scale: list[float] = field(default_factory=lambda: [0.08, 1.0])
    crop_ratio: list[float] = field(default_factory=lambda: [3 / 4, 4 / 3])
    shift: int = 0
    randaugment: str = ""
    erase: float = 0.0
    erase_mode: Literal["pixel", "constant"] = "pixel"
    crop_fraction: float = 0.875

    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {
        **Recipe.ranges,
        "label_smoothing": (0, 1),
        "mixup": (0, 1000),
        "dropout": (0, 1 - 1e-9),
        "crop_scale": (1e-4, 1),
        "crop_ratio": (1e-2, 1e2),
        "shift": (0, MAX_SIZE),
        "erase": (0, 1),
        "crop_fraction": (0.01, 1),
    }

    def check(self) -> None:
        super().check()
        for key in ("crop_scale", "crop_ratio"):
            check_rising(key, getattr(self, key))


class Classification:
    """The `Task`: a `Model` with one class for each of the data's.

    Raises TrainingError where neither the recipe nor the weights say which variant, where they disagree, and for means
    that do not fit the images; and what `load_weights` raises.
    """

    name: ClassVar[str] = "classification"
    recipe_type: ClassVar[type[Recipe]] = ClassificationRecipe
    best_by: ClassVar[Figure] = Figure(key="top1", title="Top-1 accuracy", unit="%")
    loss_unit: ClassVar[str] = "cross-entropy, nats"

    def __init__(
        self, training: Any, recipe: ClassificationRecipe, weights: Path | None, *, use_fused: bool = True
    ) -> None:
        self.classes = tuple(training.classes)
        self.model, self.recipe = _make_model(training, recipe, weights, use_fused=use_fused)
        self.mean, self.std = normalisation(self.recipe, training)

    def rate_share(self, name: str) -> float:
        """All parameters have the recipe's rate."""
        return 1.0

    def train_mode(self) -> None:
        """The network in training mode; with frozen features the classifier alone."""
        self.model.train()
        if self.recipe.freeze:
            self.model.eval()
            self.model.head.train()

    def training_transform(self, size: int) -> TrainTransform:
        """What a training image goes through at this side."""
        recipe = self.recipe
        return TrainTransform(
            size,
            self.mean,
            self.std,
            crop=recipe.crop,
            scale=(recipe.crop_scale[0], recipe.crop_scale[1]),
            ratio=(recipe.crop_ratio[0], recipe.crop_ratio[1]),
            shift=recipe.shift,
            flip=recipe.flip,
            interpolation=recipe.interpolation,
            randaugment=recipe.randaugment or None,
            erase=recipe.erase,
            erase_mode=recipe.erase_mode,
        )

    def evaluation_transform(self, size: int) -> EvaluationTransform:
        """What a validation image goes through at this side."""
        return EvaluationTransform(size, self.mean, self.std, crop_fraction=self.recipe.crop_fraction)

    def loss(self, forward: Forward, batch: Batch, rng: np.random.Generator, device: torch.device) -> Tensor:
        """`mixup_loss` of the batch mixed with itself in reverse, by a share drawn from Beta(mixup, mixup)."""
        recipe = self.recipe
        x, y = batch.x.to(device, non_blocking=True), batch.y.to(device, non_blocking=True)
        share = 1.0
        if recipe.mixup > 0:
            share = float(rng.beta(recipe.mixup, recipe.mixup))
            x = torch.lerp(x.flip(0), x, share)
        return mixup_loss(forward(x).float(), y, share, recipe.label_smoothing)

    def score(self, model: Model, batches: Iterable[Batch], world: World) -> dict[str, float]:
        """Top-1 and top-5 in per cent, and the mean loss in nats."""
        tally = Tally()
        for batch in batches:
            tally.add(model(batch.x.to(world.device)).float(), batch.y.to(world.device))
        tally = Tally(*world.sum(*tally.sums))
        if not tally.images:
            raise TrainingError("validation: not one image could be read")
        return {"top1": tally.top1_percent, "top5": tally.top5_percent, "loss": tally.mean_loss}

    def in_words(self, figures: Mapping[str, float]) -> str:
        """top-1, top-5 and the loss."""
        return f"top-1 {figures['top1']:.2f} %, top-5 {figures['top5']:.2f} %, loss {figures['loss']:.4f}"

    def describe(self, size: int) -> dict[str, Any]:
        """The fields of `Metadata`."""
        model = self.model
        network = {"variant": model.variant, "num_classes": model.num_classes, "in_chans": model.in_chans}
        return {**network, "spatial_dynamic_relu": model.spatial_dynamic_relu, **self._told(size)}

    def save(self, model: Model, path: Path, size: int) -> None:
        """`save_weights` with all that is known of the data."""
        save_weights(model, path, **self._told(size))

    def _told(self, size: int) -> dict[str, Any]:
        """What the weights say of themselves, as `save_weights` takes it."""
        return {
            "labels": list(self.classes),
            "mean": list(self.mean),
            "std": list(self.std),
            "input_size": size,
            "crop_fraction": self.recipe.crop_fraction,
        }


def mixup_loss(logits: Tensor, y: Tensor, share: float, smoothing: float) -> Tensor:
    """Mean cross-entropy (nats) where image i is share * image i + (1 - share) * image B - 1 - i.

    logits (B,K), y (B) int64. Linear in the target, so mixing the losses is mixing the targets.
    """
    loss = F.cross_entropy(logits, y, label_smoothing=smoothing)
    if share == 1.0:
        return loss
    return share * loss + (1 - share) * F.cross_entropy(logits, y.flip(0), label_smoothing=smoothing)


def _make_model(
    source: Any, recipe: ClassificationRecipe, weights: Path | None, *, use_fused: bool
) -> tuple[Model, ClassificationRecipe]:
    """The network for the source's classes and channels, drawn from the seed or read; and the recipe with its name."""
    variant = recipe.variant
    if weights is not None:
        found = read_metadata(weights)
        if variant not in ("", found.variant):
            raise TrainingError(f"variant: the recipe says {variant}, {weights} holds {found.variant}")
        if found.in_chans != source.channels:
            warnings.warn(
                f"{weights}: takes {found.in_chans} channels, the data has {source.channels}: the first convolution "
                "is adapted",
                stacklevel=3,
            )
        variant = found.variant
        if found.mean and found.std and not recipe.mean:
            mean, std = (adapt_numbers(values, source.channels) for values in (found.mean, found.std))
            recipe = dataclasses.replace(recipe, mean=mean, std=std)
    if not variant:
        raise TrainingError("variant: the recipe leaves it to the initial weights, and there are none")
    torch.manual_seed(recipe.seed)
    model = Model(
        variant,
        num_classes=len(source.classes),
        in_chans=source.channels,
        use_fused=use_fused,
        drop_rate=recipe.dropout,
        drop_path_rate=recipe.drop_path,
    )
    if weights is not None:
        load_weights(model, weights, allow_new_head=True, allow_new_channels=True)
    if recipe.freeze:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("head."))
    return model, dataclasses.replace(recipe, variant=variant)
