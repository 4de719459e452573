"""What a run needs to go on where it was stopped, in one file."""

from __future__ import annotations

import dataclasses
import os
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mobileformer.files import replacing
from mobileformer.training.recipe import Recipe

__all__ = ["FORMAT_VERSION", "Progress", "TrainingError", "load_state", "save_state"]

FORMAT_VERSION = 1


class TrainingError(RuntimeError):
    """A run that cannot start or cannot go on; the message says where it stands and what is safe on disk."""


@dataclass(slots=True)
class Progress:
    """How far a run is. All that is random is drawn from the seed and these numbers, so they are its whole memory.

    epoch: epochs done. step: updates done in the epoch after them. updates: of the run. loss_sum, images: of this
    epoch so far. seconds: of training and evaluation, over all the times the run was started.
    """

    epoch: int = 0
    step: int = 0
    updates: int = 0
    loss_sum: float = 0.0
    images: int = 0
    seconds: float = 0.0
    broken: int = 0
    best: float = -1.0
    best_epoch: int = 0
    validation: dict[str, float] = field(default_factory=dict)


def save_state(
    path: Path,
    recipe: Recipe,
    progress: Progress,
    *,
    model: dict[str, Any],
    optimizer: dict[str, Any],
    average: dict[str, Any] | None,
) -> None:
    """Write a checkpoint whole, or leave the one before it."""
    content = {
        "format": FORMAT_VERSION,
        "recipe": dataclasses.asdict(recipe),
        "progress": dataclasses.asdict(progress),
        "model": model,
        "optimizer": optimizer,
        "average": average,
    }
    with replacing(path) as temporary:
        torch.save(content, temporary)
        with open(temporary, "rb") as file:  # a rename may outlive its data in a power cut
            os.fsync(file.fileno())


def load_state(path: Path, recipe: Recipe) -> dict[str, Any]:
    """Read a checkpoint of the same recipe; nothing in it is run, only tensors and plain values are read.

    Raises TrainingError for a damaged file, one of a later format, or one of another recipe, naming what differs.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        version, saved = content["format"], content["recipe"]
        content["progress"] = Progress(**content["progress"])
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError, KeyError, TypeError, ValueError) as error:
        raise TrainingError(f"{path}: a checkpoint that cannot be read ({error})") from error
    if version > FORMAT_VERSION:
        raise TrainingError(f"{path}: format {version}, this package reads up to {FORMAT_VERSION}; update it")
    now = dataclasses.asdict(recipe)
    differing = [f"{key} {saved.get(key)!r} -> {now.get(key)!r}" for key in now if saved.get(key) != now[key]]
    if differing:
        raise TrainingError(
            f"{path}: belongs to a run of another recipe ({', '.join(differing)}); give another output folder, "
            "or --fresh to begin again in this one"
        )
    return content
