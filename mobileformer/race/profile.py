"""Where the engine spends its time, stage by stage."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from mobileformer.inference import Engine, fold, library
from mobileformer.measure.difference import lively_weights_
from mobileformer.measure.machine import machine
from mobileformer.models import Model

__all__ = ["profile"]

Dtype = Literal["float32", "bfloat16"]


def profile(variant: str, x: Tensor, *, dtype: Dtype, repeats: int) -> dict[str, Any]:
    """Every stage's least time of a call in `repeats`, on one thread; x (B,3,H,W) float32, weights are random.

    Raises RuntimeError where the engine cannot run, with the reason.
    """
    reason = library.status()["reason"]
    if reason is not None:
        raise RuntimeError(f"the engine does not run here: {reason}")
    torch.manual_seed(0)
    model = Model(variant, use_fused=False).eval()
    lively_weights_(model)
    engine = Engine(fold(model), dtype)
    engine.profile(x.numpy(), 2)
    rows = engine.profile(x.numpy(), repeats)
    total = sum(seconds for _, seconds, _ in rows)
    return {
        "variant": variant,
        "batch": x.shape[0],
        "size": x.shape[-1],
        "dtype": dtype,
        "isa": engine.isa,
        "repeats": repeats,
        "machine": machine("cpu"),
        "total_ms": 1e3 * total,
        "stages": [
            {
                "name": name,
                "ms": 1e3 * seconds,
                "share": seconds / total,
                "gflop_per_s": 2 * multiply_adds / seconds / 1e9 if seconds else None,
            }
            for name, seconds, multiply_adds in rows
        ],
    }
