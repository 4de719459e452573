"""Compiles the Triton kernels that the timed sections launch, on every core, while the library is being built.

    python -m gpu.warm            fills Triton's cache on disk and says how many kernels that took

A kernel takes about a second to compile and the sections need hundreds: one after the other they would take longer
than everything else. Which ones they are is read off the networks on the meta device, where no operator runs.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor
from triton_launches import launches_of, settings

import mobileformer
from gpu import models, operators
from mf_kernels import _triton, reference, testing
from mf_kernels.triton._launch import Launch

Job = tuple[testing.Case, torch.dtype, bool, int]  # row, dtype, channels_last, batch


def layers(variant: str, side: int) -> list[testing.Case]:
    """Every call of an operator in a network, in training and in evaluation, as rows.

    Where no operator runs, all that join others come down to the references: there they are seen.
    """
    found: dict[str, testing.Case] = {}
    originals = {op: getattr(reference, op) for op in operators.TARGETS}

    def spy(op: str) -> Callable[..., Tensor]:
        def call(*arguments: Tensor | None, **options: Any) -> Tensor:
            names = {"mobile_to_former": "xq", "former_to_mobile": "xkv", "dynamic_relu": ("x", "theta"),
                     "spatial_dynamic_relu": ("x", "theta", "alpha")}  # fmt: skip
            named = zip(names.get(op, ("x", "weight", "bias")), arguments, strict=False)
            shapes = {name: tuple(tensor.shape) for name, tensor in named if tensor is not None}
            case = testing.Case(op, variant, shapes, "layer", _all_options(op, options))
            found.setdefault(f"{op}{shapes}{options}", case)
            return originals[op](*arguments, **options)

        return call

    try:
        for op in originals:
            setattr(reference, op, spy(op))
        with torch.device("meta"):
            model, x = mobileformer.Model(variant), torch.empty(2, 3, side, side)
            model(x)
            with torch.no_grad():
                model.eval()(x)
    finally:
        for op, function in originals.items():
            setattr(reference, op, function)
    return list(found.values())


def _all_options(op: str, options: dict[str, Any]) -> dict[str, Any]:
    """In the order in which the launchers take them."""
    if op == "depthwise_conv2d":
        return {"stride": options.get("stride", 1), "activation": options.get("activation", "hardswish")}
    return {} if op.endswith("dynamic_relu") else {"num_heads": options.get("num_heads", 2)}


def jobs(side: int) -> list[list[Job]]:
    """What to compile, first what is needed first, in lists that share kernels: those of one row or layer."""
    bfloat16 = torch.bfloat16
    lists: list[list[Job]] = []
    for case in (testing.SMALL[op] for op in operators.TARGETS):  # that the smoke tests take
        batch = case.shapes["x"][0]
        lists.append([(case, torch.float32, False, batch), (case, bfloat16, True, batch)])
    variant = models.VARIANTS[0]
    for case in layers(variant, side):
        lists.append([(case, bfloat16, True, task.batch) for task in models.TASKS])
    for case in testing.TIMED:
        if variant in case.layer_of:
            lists.append([(case, bfloat16, True, operators.BATCH)])
    return lists


def launches(todo: list[Job], arch: int) -> list[Launch]:
    """Of forward, and of backward where it is needed."""
    found = []
    for case, dtype, channels_last, batch in todo:
        found += launches_of(case, dtype, channels_last=channels_last, batch=batch, arch=arch)
    return found


def key(call: Launch) -> str:
    """What Triton compiles once: equal keys are one kernel in its cache."""
    return repr((call.kernel.__name__, [_kind(v) for v in call.arguments.values()], sorted(settings(call).items())))


def _kind(value: Any) -> object:
    """A tensor's dtype; of a number whether it is one, whether 16 divides it, how wide it is."""
    if isinstance(value, Tensor):
        return str(value.dtype)
    return value if value is None or value == 1 else (value % 16 == 0, value < 2**31)


def distinct(lists: list[list[Job]], arch: int) -> list[list[Launch]]:
    """The launches of the lists that no earlier one has compiled."""
    seen: set[str] = set()
    found = []
    for todo in lists:
        fresh = {k: call for call in launches(todo, arch) if (k := key(call)) not in seen}
        seen |= fresh.keys()
        found.append(list(fresh.values()))
    return found


def compile_all(number: int) -> tuple[int, list[str]]:
    """(kernels compiled, what failed) of one list. A kernel that does not compile is told and the next one is tried."""
    capability = torch.cuda.get_device_capability()
    calls = _planned(10 * capability[0] + capability[1])[number]
    failed = []
    for call in calls:
        try:
            call.kernel.warmup(**call.arguments, **call.constants, grid=(call.programs,), **call.options())
        except Exception as error:  # noqa: BLE001 whatever a compiler raises
            failed.append(f"{call.kernel.__name__} {settings(call)}: {type(error).__name__}: {str(error)[:200]}")
    return len(calls) - len(failed), failed


@functools.cache
def _planned(arch: int) -> list[list[Launch]]:
    return distinct(jobs(models.SIDE), arch)


def main() -> None:
    started = time.monotonic()
    if _triton.interpreting():
        print(f"{sum(map(len, _planned(90)))} kernels to compile for sm_90, interpreted none is")
        return
    capability = torch.cuda.get_device_capability()
    planned = _planned(10 * capability[0] + capability[1])
    workers = max(1, min(12, (os.cpu_count() or 2) - 2))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        done = list(pool.map(compile_all, range(len(planned))))
    failed = [line for _, lines in done for line in lines]
    print(f"{sum(count for count, _ in done)} kernels, {len(failed)} failed, {time.monotonic() - started:.0f} s")
    for line in failed:
        print(f"   {line}")


if __name__ == "__main__":
    main()
