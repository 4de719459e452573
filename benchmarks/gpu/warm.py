"""Compiles the Triton kernels that the timed sections launch, on every core, while the library is being built.

    python -m gpu.warm            fills Triton's cache on disk and says how many kernels that took

A kernel takes about a second to compile and the sections need hundreds: one after the other they would take longer
than everything else. Which ones they are is read off the networks on the meta device, where no operator runs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

import mf_kernels
import mobileformer
from gpu import models, operators
from mf_kernels import _triton, reference, testing
from mf_kernels.triton._resources import launches_of

Job = tuple[testing.Case, torch.dtype, bool, int]  # row, dtype, channels_last, batch


def layers(variant: str, side: int) -> list[testing.Case]:
    """Every call of an operator in a network, as rows."""
    found: dict[str, testing.Case] = {}
    originals = {op: getattr(mf_kernels, op) for op in operators.TARGETS}

    def spy(op: str) -> Callable[..., Tensor]:
        def call(*arguments: Tensor | None, **options: Any) -> Tensor:
            names = {"mobile_to_former": "xq", "former_to_mobile": "xkv", "dynamic_relu": ("x", "theta")}
            named = zip(names.get(op, ("x", "weight", "bias")), arguments, strict=False)
            shapes = {name: tuple(tensor.shape) for name, tensor in named if tensor is not None}
            case = testing.Case(op, variant, shapes, "layer", _all_options(op, options))
            found.setdefault(f"{op}{shapes}{options}", case)
            return getattr(reference, op)(*arguments, **options)

        return call

    try:
        for op in originals:
            setattr(mf_kernels, op, spy(op))
        with torch.device("meta"):
            mobileformer.Model(variant)(torch.empty(2, 3, side, side))
    finally:
        for op, function in originals.items():
            setattr(mf_kernels, op, function)
    return list(found.values())


def _all_options(op: str, options: dict[str, Any]) -> dict[str, Any]:
    """In the order in which the launchers take them."""
    if op == "depthwise_conv2d":
        return {"stride": options.get("stride", 1), "activation": options.get("activation", "hardswish")}
    return {"num_heads": options.get("num_heads", 2)} if op != "dynamic_relu" else {}


def jobs(side: int) -> list[list[Job]]:
    """What to compile, first what is needed first, in lists that share kernels: those of one row or layer."""
    dtypes = tuple(operators.DTYPES.values())
    lists: list[list[Job]] = []
    for case in testing.CASES:  # as tests/test_gpu.py looks at them
        batch = case.shapes["x"][0]
        lists.append([(case, torch.float32, False, batch), (case, torch.bfloat16, True, batch)])
    for case in testing.TIMED:
        lists.append([(case, dtype, last, operators.BATCH) for dtype in dtypes for last in (True, False)])
    for variant in models.VARIANTS:
        channels_last = mobileformer.VARIANTS[variant].groups == 1
        for case in layers(variant, side):
            lists.append([(case, dtype, channels_last, task.batch) for dtype in dtypes for task in models.TASKS])
    return lists


def compile_all(todo: list[Job]) -> int:
    """Forward and backward of each job; the number of launches looked at. Interpreted, nothing is compiled."""
    seen = 0
    capability = (9, 0) if _triton.interpreting() else torch.cuda.get_device_capability()
    for case, dtype, channels_last, batch in todo:
        arch = 10 * capability[0] + capability[1]
        for call in launches_of(case, dtype, channels_last=channels_last, batch=batch, arch=arch):
            seen += 1
            if not _triton.interpreting():
                call.kernel.warmup(**call.arguments, **call.constants, grid=(call.programs,), **call.options())
    return seen


def main() -> None:
    started = time.monotonic()
    todo = jobs(models.SIDE)
    if _triton.interpreting():
        seen = sum(map(compile_all, todo[::10]))
    else:
        workers = max(1, min(12, (os.cpu_count() or 2) - 2))
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            seen = sum(pool.map(compile_all, todo))
    print(f"{seen} launches of {len(todo)} layers, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
