"""Running a trained network and nothing else. Names load on first use: importing this needs no torch.

`Engine` and `FoldedNetwork` need numpy alone; `fold` and `InferenceModel` come from a model and need torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mobileformer.inference.engine import Engine as Engine
    from mobileformer.inference.folded import FoldedNetwork as FoldedNetwork
    from mobileformer.inference.folding import fold as fold
    from mobileformer.inference.model import InferenceModel as InferenceModel

_HOME = {
    "Engine": "mobileformer.inference.engine",
    "FoldedNetwork": "mobileformer.inference.folded",
    "InferenceModel": "mobileformer.inference.model",
    "fold": "mobileformer.inference.folding",
}

__all__ = ["Engine", "FoldedNetwork", "InferenceModel", "fold"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value
