"""torchvision beside a torch for the CPU.

Every torchvision on PyPI is built for CUDA. Beside a torch for the CPU its library of operators does not load, and
then `import torchvision` stops at the first shape function that it registers for one of them, `torchvision::nms`.
Nothing that transforms, datasets or networks need is missing: once the two operators have schemas, the rest imports.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

__all__ = ["ensure_torchvision"]

_SCHEMAS = tuple(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor" for name in ("nms", "qnms"))
_library: torch.library.Library | None = None  # a schema lives as long as the library that defined it


def ensure_torchvision() -> ModuleType:
    """Import torchvision, and return it, also where its compiled operators do not load. Call it before `import timm`.

    Does nothing more than an import where torchvision is whole. Otherwise the operators `nms` and `qnms` get a
    schema and no kernel, which is what the import asks for; calling them, or decoding images with `torchvision.io`,
    still raises torchvision's own error.

    Raises ImportError with what to install where torchvision is not there.
    """
    try:
        return importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
        raise ImportError(
            "torchvision is not installed: pip install 'mobileformer[timm]'", name="torchvision"
        ) from None
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    _define_schemas()
    # The attempt above left the modules that it came to.
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    return importlib.import_module("torchvision")


def _define_schemas() -> None:
    global _library
    if _library is None:
        _library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in _SCHEMAS:
            _library.define(schema)
