"""What a network can be trained for, each task in a file of its own that training and the commands are handed.

    task = of("classification")
    train(training, validation, recipe, options, world, task)

A new task is a class as `mobileformer.training.task.Task` describes it, and a line here.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mobileformer.training.task import Task

__all__ = ["NAMES", "of"]

_HOME = {
    "classification": ("mobileformer.tasks.classification", "Classification"),
    "detection": ("mobileformer.tasks.detection", "Detection"),
}
NAMES = tuple(_HOME)


def of(name: str) -> type[Task]:
    """The task of this name, loaded when it is asked for. Raises ValueError for one that there is none of."""
    if name not in _HOME:
        raise ValueError(f"task: expected one of {', '.join(map(repr, NAMES))}, got {name!r:.80}")
    module, attribute = _HOME[name]
    return getattr(importlib.import_module(module), attribute)
