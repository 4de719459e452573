"""Nobody's memory: not read before it is written, not touched around a tensor (views: test_operators.py)."""

from __future__ import annotations

import mmap

import memory_support
import pytest
import torch
from kernel_support import python, runnable

import mf_kernels
from mf_kernels import testing

BRANCHES = [case for case in testing.CASES if not case.layer_of]

# Runs each row forward and backward, every dtype and instruction set, in two layouts.
EVERY_ROW = """
import sys
import torch
import memory_support
import mf_kernels
from mf_kernels import _native, testing

torch.set_num_threads(1)
DTYPES = (torch.float32, torch.bfloat16, torch.float64)

def rows(place=lambda t: t):
    for case in testing.CASES:
        if case.layer_of:
            continue
        for dtype in DTYPES:
            for layout in ("contiguous", "channels_last"):
                inputs = {n: place(t) for n, t in case.inputs(dtype, layout=layout).items()}
                d_output = place(case.d_output(dtype, layout=layout))
                for isa in _native.cpu_report()["runnable"]:
                    _native.set_cpu_isa(isa)
                    yield testing.evaluate(case.function(mf_kernels), inputs, d_output)
"""

POISONED = (
    EVERY_ROW
    + """
sums = []
for _ in memory_support.poisons():
    digest = 0
    for results in rows():
        for t in results.values():
            digest = hash((digest, t.double().numpy().tobytes()))
    sums.append(digest)
print(len(sums), len(set(sums)))
"""
)

CHECKED = EVERY_ROW + "print(sum(1 for _ in rows()))"

# Every tensor ends, or begins, right at a page that cannot be read.
GUARDED = (
    EVERY_ROW
    + """
def guarded(t):
    if t.numel() == 0:
        return t
    memory, offset = memory_support.guarded(t.numel() * t.element_size(), sys.argv[1] == "end")
    flat = torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=offset)
    return flat.as_strided(t.shape, t.stride()).copy_(t)

print(sum(1 for _ in rows(guarded)))
"""
)


def evaluations() -> int:
    return len(BRANCHES) * 3 * 2 * len(runnable())


def test_uninitialised_memory_is_never_read() -> None:
    """Results and scratch: the same bits, whatever their memory held before."""
    done = python(POISONED, GLIBC_TUNABLES="glibc.malloc.tcache_count=0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["3", "1"]


def test_nothing_is_written_past_an_allocation() -> None:
    """glibc's checking malloc puts a byte of its own behind every block and aborts where it changed."""
    library = memory_support.checking_malloc()
    if library is None:
        pytest.skip("glibc's libc_malloc_debug.so.0 is not installed")
    done = python(CHECKED, LD_PRELOAD=str(library), MALLOC_CHECK_="3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(evaluations())]


@pytest.mark.parametrize("side", ["begin", "end"])
def test_nothing_is_read_outside_a_tensor(side: str) -> None:
    done = python(GUARDED, side)
    assert done.returncode == 0, f"{done.returncode}\n{done.stderr}"
    assert done.stdout.split() == [str(evaluations())]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_more_elements_than_32_bits_count(layout: str) -> None:
    """A map of 4.3 GB that is all zeros but for its last channels: memory nobody wrote to takes no memory.

    Only Mobile-to-Former can be asked for that: its result is small, those of the others are as large as x.
    """
    side = 2**15 + 1
    memory = mmap.mmap(-1, 2 * 2 * side**2, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    x = torch.frombuffer(memory, dtype=torch.bfloat16)
    if layout == "channels_last":
        x = x.view(1, side, side, 2).permute(0, 3, 1, 2)
    else:
        x = x.view(1, 2, side, side)
    assert x.numel() > 2**31
    x[0, :, -1, -1] = torch.tensor([32, 64])
    with mf_kernels.use_backend("native"):
        gathered = mf_kernels.mobile_to_former(x, torch.tensor([[[0, 1]]], dtype=x.dtype), num_heads=1)
    assert gathered.flatten().tolist() == [32, 64]  # e^45 against 10^9 times e^0
