"""Mobile-Former: the published networks, exact, on fused kernels.

Names are loaded on first use, so that `mobileformer.inference` and `mobileformer.config` need no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mobileformer.config import VARIANTS as VARIANTS
    from mobileformer.model import Model as Model

__version__ = "0.1.0"

_HOME = {
    "VARIANTS": "mobileformer.config",
    "Model": "mobileformer.model",
}

__all__ = ["VARIANTS", "Model", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
