"""Running a trained network and nothing else. Names load on first use: importing this needs no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mobileformer.inference.fold import InferenceModel as InferenceModel

_HOME = {"InferenceModel": "mobileformer.inference.fold"}

__all__ = ["InferenceModel"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value
