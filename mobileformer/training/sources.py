"""What a run asks of its data before it starts: whether it will do, and what its pixels are normalised with."""

from __future__ import annotations

from typing import Any

import numpy as np

from mobileformer.config import IMAGENET_MEAN, IMAGENET_STD
from mobileformer.data.sources import some_images
from mobileformer.training.recipe import Recipe
from mobileformer.training.state import TrainingError

__all__ = ["check_data", "normalisation"]

_MEASURED_IMAGES = 2000


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
