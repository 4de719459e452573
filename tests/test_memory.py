"""Nobody's memory: what is not written before it is read, and what lies around a tensor."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch
from kernel_support import python, runnable

import mf_kernels
from mf_kernels import testing

BRANCHES = [case for case in testing.CASES if not case.layer_of]

# Runs each row forward and backward, every dtype and instruction set, in two layouts.
EVERY_ROW = """
import ctypes, mmap, sys
import torch
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

# mallopt(M_PERTURB, p) fills what malloc hands out with bytes p ^ 0xff: here NaN, large and small numbers.
POISONED = (
    EVERY_ROW
    + """
libc = ctypes.CDLL(None)
sums = []
for perturb, fill in ((256, 0xff), (0x80, 0x7f), (0x3f, 0xc0)):
    libc.mallopt(-6, perturb)
    fresh = torch.empty(3001, dtype=torch.uint8)
    assert (fresh == fill).all(), "memory is not poisoned: this test would see nothing"
    digest = 0
    for results in rows():
        for t in results.values():
            digest = hash((digest, t.double().numpy().tobytes()))
    libc.mallopt(-6, 0)
    sums.append(digest)
print(len(set(sums)))
"""
)

CHECKED = EVERY_ROW + "print(sum(1 for _ in rows()))"

# Every tensor ends, or begins, right at a page that cannot be read.
GUARDED = (
    EVERY_ROW
    + """
libc = ctypes.CDLL(None)
PAGE = mmap.PAGESIZE
at_end = sys.argv[1] == "end"

def guarded(t):
    if t.numel() == 0:
        return t
    used = t.numel() * t.element_size()
    pages = -(-used // PAGE)
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for guard in (address, address + (pages + 1) * PAGE):
        assert libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(PAGE), 0) == 0
    offset = (pages + 1) * PAGE - used if at_end else PAGE
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
    assert done.stdout.split() == ["1"]


def test_nothing_is_written_past_an_allocation() -> None:
    """glibc's checking malloc puts a byte of its own behind every block and aborts where it changed."""
    library = next((p for p in Path("/usr/lib").rglob("libc_malloc_debug.so.0")), None)
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


@pytest.mark.parametrize("layout", ["sliced", "unaligned"])
@pytest.mark.parametrize("case", BRANCHES, ids=lambda case: case.id)
def test_views_inside_other_tensors(case: testing.Case, layout: str, isa: str) -> None:
    """Around each view lies NaN: it changes no bit of the results, and stays as it was."""
    expected = testing.evaluate(case.function(mf_kernels), case.inputs(torch.float32), case.d_output(torch.float32))
    inputs = case.inputs(torch.float32, layout=layout)
    d_output = case.d_output(torch.float32, layout=layout)
    buffers = [t._base for t in (*inputs.values(), d_output)]
    before = [buffer.clone() for buffer in buffers]
    actual = testing.evaluate(case.function(mf_kernels), inputs, d_output)
    assert all(torch.equal(actual[name], t) for name, t in expected.items())
    for buffer, clean in zip(buffers, before, strict=True):
        assert torch.equal(buffer.view(torch.int32), clean.view(torch.int32))


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
