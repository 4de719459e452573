"""The task that a recipe names.

This room knows no task: tasks are made of it, and stand above it. But a recipe read by its name has the keys of its
task, and a run started from Python alone has to find it. So, here and nowhere else, tasks are looked up when they are
asked for, by name, as codecs are.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["named"]

_SHELF = "mobileformer.tasks"


def named(task: str) -> Any:
    """The task of this name, as `mobileformer.training.task` describes one. Raises ValueError for an unknown one."""
    return importlib.import_module(_SHELF).of(task)
