"""Small end-to-end detectors, and what they are given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mobileformer.detection.end_to_end import EndToEnd
from mobileformer.measure.difference import lively_weights_

SMALL: dict[str, Any] = {"num_queries": 20, "width": 64, "feature_width": 64, "depth": (1, 1, 1), "dropout": 0.0}
PRESETS = ["detr", "focal"]


def small(variant: str = "26m", *, lively: bool = True, **kwargs: Any) -> EndToEnd:
    torch.manual_seed(0)
    model = EndToEnd(variant, 7, **SMALL | kwargs).eval()
    if lively:
        lively_weights_(model, seed=1)
    return model


def pair(dtype: torch.dtype, **kwargs: Any) -> tuple[EndToEnd, EndToEnd]:
    """The same weights, fused and plain."""
    fused = small(use_fused=True, **kwargs).to(dtype)
    plain = small(use_fused=False, **kwargs).to(dtype)
    plain.load_state_dict(fused.state_dict())
    return fused, plain


def images(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def target(*boxes: tuple[float, ...], labels: Sequence[int] = ()) -> dict[str, Tensor]:
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
    }


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
