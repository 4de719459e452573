"""What is launched on a card for every layer of the model: a function of shapes, looked at without one.

Triton's launches are recorded, the plans of the CUDA kernels are compiled for the host. A grid has one axis, of less
than 2^31 programs (the other two would take 65535), and batch 1 leaves no multiprocessor idle that there is work for.
"""

from __future__ import annotations

import ctypes
import functools
import math
from pathlib import Path

import emulator_support
import pytest
import torch
from torch import Tensor

from mf_kernels import _triton, testing

ROOT = Path(__file__).parents[1]

MOST = 2**31 - 1
MULTIPROCESSORS = 132
TILE = 4096  # values of a map that a program of Triton may hold at once
BLOCK_BYTES = 256 * 4 * 16  # of a map that a block of CUDA may hold: its threads, four loads of 16 bytes each
BATCHES = (1, 32, 256)
needs_triton = pytest.mark.skipif(
    _triton.missing("dynamic_relu", "cpu") == "triton is not installed", reason="triton is not installed"
)
needs_emulator = pytest.mark.skipif(bool(emulator_support.missing()), reason=emulator_support.missing())
every_layer = pytest.mark.parametrize("case", testing.TIMED, ids=lambda case: case.id)
every_look = pytest.mark.parametrize(
    ("dtype", "channels_last"),
    [(dtype, layout) for dtype in (torch.float32, torch.bfloat16) for layout in (False, True)],
    ids=str,
)


def wanted(case: testing.Case, tile: int) -> int:
    """Programs that one sample of the layer has work for, up to one for every multiprocessor."""
    return min(MULTIPROCESSORS, math.prod(case.shapes["x"]) // tile)


@needs_triton
@every_look
@every_layer
def test_launches_of_triton(
    case: testing.Case, dtype: torch.dtype, channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from triton_launches import launches_of

    for batch in BATCHES:
        calls = launches_of(case, dtype, channels_last=channels_last, batch=batch, arch=90)
        assert len(calls) >= 2
        for call in calls:
            assert 1 <= call.programs <= MOST
            assert call.num_warps in (1, 2, 4, 8)
            if call.kernel.__name__ in (f"{case.op}_forward", f"{case.op}_backward"):
                assert call.programs >= wanted(case, TILE), call.kernel.__name__
            # A Python float would reach the kernel as fp64, and all arithmetic with it
            for name, value in call.arguments.items():
                assert value is None or isinstance(value, Tensor) or type(value) is int, name
                assert not isinstance(value, Tensor) or value.dtype in (dtype, torch.float32), name
                assert not isinstance(value, int) or 0 <= value <= MOST, name


@functools.cache
def plans() -> ctypes.CDLL:
    return ctypes.CDLL(str(emulator_support.build("plans.so", ["plans.cpp"], link=["-shared"])))


def blocks_of(case: testing.Case, dtype: torch.dtype, channels_last: bool, batch: int, backward: bool) -> int:
    _, C, H, W = case.shapes["x"]
    if case.op == "dynamic_relu":
        name, sizes = "dynamic_relu", [batch, C, H * W]
    elif case.op == "spatial_dynamic_relu":
        name, sizes = "spatial_dynamic_relu", [batch, C, H * W, case.shapes["alpha"][1]]
    elif case.op == "depthwise_conv2d":
        outputs, _, K, _ = case.shapes["weight"]
        name, sizes = "depthwise", [batch, C, H, W, outputs, K, case.options["stride"]]
    else:
        tokens = case.shapes["q" if case.op == "mobile_to_former" else "k"][1]
        name, sizes = "attention", [batch, C, H * W, tokens, case.options["num_heads"]]
    function = getattr(plans(), f"mf_blocks_of_{name}")
    function.restype = ctypes.c_int64
    flags = [ctypes.c_bool(channels_last), ctypes.c_bool(backward)]
    return function(ctypes.c_int(dtype.itemsize), *map(ctypes.c_int64, sizes), *flags)


@needs_emulator
@every_look
@every_layer
def test_blocks_of_cuda(case: testing.Case, dtype: torch.dtype, channels_last: bool) -> None:
    for backward in (False, True):
        least = wanted(case, BLOCK_BYTES // dtype.itemsize)
        # Every block of its backward pass leaves a sum for each filter, so it takes fewer
        least //= 2 if case.op == "depthwise_conv2d" and backward else 1
        for batch in BATCHES:
            blocks = blocks_of(case, dtype, channels_last, batch, backward)
            assert least <= blocks <= MOST, (batch, backward)
            assert blocks == blocks_of(case, dtype, channels_last, batch, backward), "a function of shapes"
