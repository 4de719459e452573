"""The door to the Triton kernels: registered with the dispatcher at import, opened when one has to run.

Nothing here imports Triton until then, so that `import mf_kernels` costs the same with and without it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

LOWEST_CAPABILITY = (8, 0)  # bfloat16 products on tensor cores begin here


def has_kernels(op: str) -> bool:
    """Whether somebody has written Triton kernels of the operator."""
    return (Path(__file__).parent / "triton" / f"{op}.py").is_file()


def interpreting() -> bool:
    """Whether Triton runs its kernels in its interpreter, and so on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def register(name: str, count_served: Callable[[str], None]) -> None:
    """Fill `mf_kernels::<op>_fwd.triton` or `<op>_bwd.triton` with a call of that operator's launcher."""
    op, _, direction = name.rpartition("_")
    launcher = {"fwd": "forward", "bwd": "backward"}[direction]

    def run(*arguments: Any) -> Any:
        results = getattr(_module(op), launcher)(*arguments)
        count_served(f"{name}:triton:{arguments[0].device.type}")
        return results

    for device in ("cuda", "cpu") if interpreting() else ("cuda",):
        torch.library.impl(f"mf_kernels::{name}.triton", device, run)


@functools.cache
def _module(op: str) -> ModuleType:
    return importlib.import_module(f"mf_kernels.triton.{op}")


@functools.cache
def missing(op: str, device: str) -> str | None:
    """None when there is a Triton that can serve tensors of the device, else the reason in words."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not has_kernels(op):
        return "no Triton kernels of it"
    if device == "cpu" and not interpreting():
        return "CPU tensors need Triton's interpreter: set TRITON_INTERPRET=1 before the first import"
    if device == "cuda":
        if not torch.cuda.is_available():
            return "this machine has no CUDA device"
        lowest = min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
        if lowest < LOWEST_CAPABILITY:
            return f"compute capability {lowest[0]}.{lowest[1]}, the Triton kernels need 8.0 or higher"
    try:
        _module(op)
    except Exception as error:  # noqa: BLE001 an installation breaks in many ways; whichever it is, it is told
        return f"triton does not import: {type(error).__name__}: {error}"
    return None


@functools.cache
def does_not_compile(op: str, dtype: torch.dtype) -> str | None:
    """Compile the operator's kernels for the current CUDA device, for a tiny map: None, or why that failed.

    A compiler, assembler or driver that does not work shows here, where another backend can still be taken,
    and not in the middle of a backward pass.
    """
    if interpreting():
        return None
    try:
        _compile_tiny(op, dtype)
    except Exception as error:  # noqa: BLE001 compiler, assembler and driver have errors of their own; all are told
        return f"triton does not compile this operator here: {type(error).__name__}: {error}"
    return None


def _compile_tiny(op: str, dtype: torch.dtype) -> None:
    """Compile the kernels of one forward and one backward call; run nothing."""
    from mf_kernels.triton._launch import recording

    x = torch.empty(1, 8, 4, 4, dtype=dtype, device="meta")
    with recording(torch.cuda.get_device_capability()) as launches:
        _module(op).both_passes(x)
    for call in launches:
        call.kernel.warmup(**call.arguments, **call.constants, grid=(call.programs,), **call.options())
