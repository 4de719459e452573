"""Detection: which objects are in an image, and where. A detector's own losses; COCO's AP of a validation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from mobileformer.data.batch import Batch
from mobileformer.data.box_transforms import BoxTransform
from mobileformer.detection import DETECTORS
from mobileformer.evaluation.precision import Detections, average_precision
from mobileformer.training.recipe import MAX_SIZE, Recipe, check_rising
from mobileformer.training.sources import normalisation
from mobileformer.training.state import TrainingError
from mobileformer.training.task import Figure, Forward
from mobileformer.training.world import World
from mobileformer.weights.detectors import Detector, backbone_metadata, describe_detector, save_detector, warm_start

__all__ = ["Detection", "DetectionRecipe"]

_BACKBONE = "backbone."


@dataclass(frozen=True, kw_only=True)
class DetectionRecipe(Recipe):
    """The keys of `Recipe`, and these. `sizes` are short sides of an evaluated image, at most `longest` the other way.

    ==========================  ===============================================================================
    key                         meaning
    ==========================  ===============================================================================
    detector                    "retinanet" or "end-to-end"
    width, head_depth, levels,  of `mobileformer.detection.RetinaNet`
    norm, anchor_scale
    queries, query_width,       of `mobileformer.detection.EndToEnd`: num_queries, width, feature_width (0: by the
    feature_width, hidden,      backbone), hidden (0: 4 query_width), depth, preset, dropout, local_init
    depth, preset, dropout,
    local_init
    spatial_dynamic_relu        of the backbone
    backbone_rate               the backbone's learning rate as a share of the others'
    freeze_norms                the backbone's BatchNorm stays as it is, for batches of a few images
    short_sides, longest        of a training image: one of these short sides is drawn, or none is resized where
                                there are none; the long side at most
    crop, crop_short_sides,     probability that a smaller resize and a crop of (least, most) pixels come first
    crop_sides
    ==========================  ===============================================================================

    Source: torchvision's RetinaNet and DETR's code for the two that are called after COCO.
    """

    task: str = "detection"
    detector: Literal["retinanet", "end-to-end"] = "retinanet"
    width: int = 256
    head_depth: int = 4
    levels: int = 5
    norm: Literal["", "group"] = ""
    anchor_scale: float = 4.0
    queries: int = 100
    query_width: int = 256
    feature_width: int = 0
    hidden: int = 0
    depth: list[int] = field(default_factory=lambda: [5, 2, 2])
    preset: Literal["detr", "focal"] = "detr"
    dropout: float = 0.1
    local_init: bool = True
    spatial_dynamic_relu: bool = False
    backbone_rate: float = 1.0
    freeze_norms: bool = False
    short_sides: list[int] = field(default_factory=lambda: list(range(480, 801, 32)))
    longest: int = 1333
    crop: float = 0.5
    crop_short_sides: list[int] = field(default_factory=lambda: [400, 500, 600])
    crop_sides: list[int] = field(default_factory=lambda: [384, 600])

    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {
        **Recipe.ranges,
        "width": (1, 4096),
        "head_depth": (1, 64),
        "levels": (3, 5),
        "anchor_scale": (1e-3, 1e3),
        "queries": (1, 10_000),
        "query_width": (1, 4096),
        "feature_width": (0, 4096),
        "hidden": (0, 65536),
        "depth": (1, 64),
        "dropout": (0, 1 - 1e-9),
        "backbone_rate": (0, 1e3),
        "short_sides": (32, MAX_SIZE),
        "longest": (32, MAX_SIZE),
        "crop": (0, 1),
        "crop_short_sides": (32, MAX_SIZE),
        "crop_sides": (32, MAX_SIZE),
    }

    def check(self) -> None:
        super().check()
        check_rising("crop_sides", [float(side) for side in self.crop_sides])

    def arguments(self) -> dict[str, Any]:
        """What the detector is built with, besides variant, classes, channels and slopes."""
        if self.detector == "retinanet":
            return {key: getattr(self, key) for key in ("width", "head_depth", "levels", "norm", "anchor_scale")}
        return {
            "num_queries": self.queries,
            "width": self.query_width,
            "feature_width": self.feature_width or None,
            "hidden": self.hidden or None,
            **{key: getattr(self, key) for key in ("depth", "preset", "dropout", "local_init")},
        }


class Detection:
    """The `Task`: a detector with one class for each of the data's.

    Initial weights may be of a detector or of a classifier, whose backbone is then taken. Raises TrainingError where
    neither the recipe nor the weights say which variant, where they disagree, and for data without boxes.
    """

    name: ClassVar[str] = "detection"
    recipe_type: ClassVar[type[Recipe]] = DetectionRecipe
    best_by: ClassVar[Figure] = Figure(key="AP", title="Average precision", unit="of 1")
    loss_unit: ClassVar[str] = "as weighted"

    def __init__(self, training: Any, recipe: DetectionRecipe, weights: Path | None, *, use_fused: bool = True) -> None:
        if not hasattr(training, "category_ids"):
            raise TrainingError("data: detection needs boxes, expected a folder with annotations in COCO's format")
        self.classes = tuple(training.classes)
        variant = recipe.variant
        if weights is not None:
            found = backbone_metadata(weights).variant
            if variant not in ("", found):
                raise TrainingError(f"variant: the recipe says {variant}, {weights} holds {found}")
            variant = found
        if not variant:
            raise TrainingError("variant: the recipe leaves it to the initial weights, and there are none")
        self.recipe = dataclasses.replace(recipe, variant=variant)
        self.mean, self.std = normalisation(self.recipe, training)
        torch.manual_seed(recipe.seed)
        self.model: Detector = DETECTORS[recipe.detector](
            variant,
            len(self.classes),
            in_chans=training.channels,
            use_fused=use_fused,
            drop_path_rate=recipe.drop_path,
            spatial_dynamic_relu=recipe.spatial_dynamic_relu,
            **recipe.arguments(),
        )
        if weights is not None:
            warm_start(self.model, weights)
        if recipe.freeze:
            self.model.backbone.requires_grad_(False)

    def rate_share(self, name: str) -> float:
        """The recipe's share for the backbone, 1 for the rest."""
        return self.recipe.backbone_rate if name.startswith(_BACKBONE) else 1.0

    def train_mode(self) -> None:
        """The detector in training mode, but for what the recipe freezes."""
        self.model.train()
        if self.recipe.freeze:
            self.model.backbone.eval()
        if self.recipe.freeze_norms:
            for module in self.model.backbone.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()

    def training_transform(self, size: int) -> BoxTransform:
        """What a training image goes through; its sides are the recipe's, whatever that of an evaluated one."""
        recipe = self.recipe
        return BoxTransform(
            self.mean,
            self.std,
            flip=recipe.flip,
            short_sides=recipe.short_sides,
            longest=recipe.longest,
            crop=recipe.crop,
            crop_short_sides=recipe.crop_short_sides,
            crop_sides=(recipe.crop_sides[0], recipe.crop_sides[1]),
        )

    def evaluation_transform(self, size: int) -> BoxTransform:
        """What a validation image goes through: its short side becomes `size` pixels."""
        return BoxTransform.for_evaluation(self.mean, self.std, short_side=size, longest=self.recipe.longest)

    def loss(
        self, forward: Forward, batch: Batch, rng: np.random.Generator, device: torch.device
    ) -> Mapping[str, Tensor]:
        """The detector's own losses, weighted."""
        y = batch.y.to(device)
        return forward(batch.x.to(device, non_blocking=True), y.targets, y.sizes)

    def score(self, model: Detector, batches: Iterable[Batch], world: World) -> dict[str, float]:
        """AP, AP50 and AP75 between 0 and 1, and the mean loss."""
        found, loss = Detections(len(self.classes)), 0.0
        for batch in batches:
            if not len(batch.index):
                continue
            x, y = batch.x.to(world.device), batch.y.to(world.device)
            found.add_batch(batch, model(x, None, y.sizes))
            loss += len(batch.index) * float(sum(model(x, y.targets, y.sizes).values()))
        images, loss = world.sum(len(found), loss)
        if not images:
            raise TrainingError("validation: not one image could be read")
        precision = average_precision(found.gathered())
        return {"AP": precision.ap, "AP50": precision.ap50, "AP75": precision.ap75, "loss": loss / images}

    def in_words(self, figures: Mapping[str, float]) -> str:
        """AP, AP50, AP75 and the loss."""
        return ", ".join(f"{key} {figures[key]:.3f}" for key in ("AP", "AP50", "AP75", "loss"))

    def describe(self, size: int) -> dict[str, Any]:
        """The fields of `Metadata`."""
        told = dataclasses.asdict(describe_detector(self.model, **self._told(size)))
        return {key: list(value) if isinstance(value, tuple) else value for key, value in told.items()}

    def save(self, model: Detector, path: Path, size: int) -> None:
        """`save_detector` with all that is known of the data."""
        save_detector(model, path, **self._told(size))

    def _told(self, size: int) -> dict[str, Any]:
        return {"labels": list(self.classes), "mean": list(self.mean), "std": list(self.std), "input_size": size}
