"""What a run is made of before it starts: the network, what pixels are normalised with, the transforms."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mobileformer.config import IMAGENET_MEAN, IMAGENET_STD
from mobileformer.data.sources import some_images
from mobileformer.data.transforms import EvaluationTransform, TrainTransform
from mobileformer.models import Model
from mobileformer.training.recipe import Recipe
from mobileformer.training.state import TrainingError
from mobileformer.weights.load import load_weights, read_metadata
from mobileformer.weights.stem import adapt_numbers

__all__ = ["check_data", "evaluation_transform", "make_model", "normalisation", "training_transform"]

_MEASURED_IMAGES = 2000


def make_model(source: Any, recipe: Recipe, weights: Path | None, *, use_fused: bool) -> tuple[Model, Recipe]:
    """The network for the source's classes and channels, drawn from the seed or read; and the recipe with its name.

    Raises TrainingError where neither the recipe nor the weights say which variant, or where they disagree, and what
    `load_weights` raises.
    """
    import torch

    variant = recipe.variant
    if weights is not None:
        found = read_metadata(weights)
        if variant not in ("", found.variant):
            raise TrainingError(f"variant: the recipe says {variant}, {weights} holds {found.variant}")
        if found.in_chans != source.channels:
            warnings.warn(
                f"{weights}: takes {found.in_chans} channels, the data has {source.channels}: the first convolution "
                "is adapted",
                stacklevel=2,
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


def check_data(training: Any, validation: Any, recipe: Recipe) -> None:
    """Raise TrainingError for data that a run would stumble over later: too few images, names no file can hold."""
    classes = tuple(training.classes)
    for name in classes:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise TrainingError(
                f"classes: {name!a} is not UTF-8, no weights can be saved with it; rename the folder"
            ) from None
    if tuple(validation.classes) != classes:
        odd = next(iter(sorted(set(classes) ^ set(validation.classes))), None)
        what = "their order" if odd is None else repr(odd)
        raise TrainingError(f"classes: training and validation differ in {what}")
    if len(training) < recipe.global_batch:
        raise TrainingError(
            f"global_batch: {len(training)} training images are fewer than the {recipe.global_batch} of one update "
            f"({recipe.slots} x micro_batch = {recipe.micro_batch}); set both keys lower, e.g. --set global_batch="
            f"{max(2, len(training) // 2)} --set micro_batch={max(2, len(training) // 2)}"
        )


def normalisation(recipe: Recipe, source: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std), one number a channel: the recipe's, ImageNet's for 3 channels, or else as measured."""
    if recipe.mean:
        if len(recipe.mean) != source.channels:
            raise TrainingError(f"mean: {len(recipe.mean)} numbers, the data has {source.channels} channels")
        return tuple(recipe.mean), tuple(recipe.std)
    if source.channels == len(IMAGENET_MEAN):
        return IMAGENET_MEAN, IMAGENET_STD
    images = [np.asarray(image, dtype=np.float64).ravel() for image in some_images(source, _MEASURED_IMAGES)]
    if not images:
        raise TrainingError(f"mean: cannot be measured, none of {_MEASURED_IMAGES} training images could be read")
    pixels = np.concatenate(images) / 255
    return (round(float(pixels.mean()), 4),), (round(float(pixels.std()), 4),)


def training_transform(recipe: Recipe, mean: Sequence[float], std: Sequence[float], size: int) -> TrainTransform:
    """What a training image goes through at this side."""
    return TrainTransform(
        size,
        mean,
        std,
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


def evaluation_transform(recipe: Recipe, mean: Sequence[float], std: Sequence[float], size: int) -> EvaluationTransform:
    """What a validation image goes through at this side."""
    return EvaluationTransform(size, mean, std, crop_fraction=recipe.crop_fraction)
