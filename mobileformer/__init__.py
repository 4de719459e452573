"""Mobile-Former: the published networks, exact, on fused kernels.

Names are loaded on first use, so that `mobileformer.inference` and `mobileformer.config` need no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mobileformer.config import VARIANTS as VARIANTS
    from mobileformer.files.metadata import Metadata as Metadata
    from mobileformer.files.metadata import WeightsError as WeightsError
    from mobileformer.models import Model as Model
    from mobileformer.weights.load import load_model as load_model
    from mobileformer.weights.load import load_weights as load_weights
    from mobileformer.weights.load import official_state_dict as official_state_dict
    from mobileformer.weights.load import read_metadata as read_metadata
    from mobileformer.weights.load import save_official_checkpoint as save_official_checkpoint
    from mobileformer.weights.load import save_weights as save_weights

__version__ = "0.1.0"

_HOME = {
    "VARIANTS": "mobileformer.config",
    "Model": "mobileformer.models",
    "Metadata": "mobileformer.files.metadata",
    "WeightsError": "mobileformer.files.metadata",
    "load_model": "mobileformer.weights.load",
    "load_weights": "mobileformer.weights.load",
    "official_state_dict": "mobileformer.weights.load",
    "read_metadata": "mobileformer.weights.load",
    "save_official_checkpoint": "mobileformer.weights.load",
    "save_weights": "mobileformer.weights.load",
}

__all__ = [
    "VARIANTS",
    "Metadata",
    "Model",
    "WeightsError",
    "__version__",
    "load_model",
    "load_weights",
    "official_state_dict",
    "read_metadata",
    "save_official_checkpoint",
    "save_weights",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
