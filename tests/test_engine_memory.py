"""The engine's memory: nothing read before it is written, nothing touched outside an array, nothing taken twice."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import memory_support
import pytest
from engine_support import folded, isas, needs_engine
from kernel_support import python

pytestmark = needs_engine

# Every instruction set, both dtypes, grouped and dense, slopes by sample and by position, odd sizes; numpy alone.
EVERY_ENGINE = """
import ctypes, sys
import memory_support
import numpy as np
from mobileformer.inference import Engine
from mobileformer.inference.library import library

def images():
    random = np.random.default_rng(0)
    yield random.standard_normal((1, 3, 33, 47)).astype(np.float32)
    yield random.standard_normal((2, 3, 32, 64)).astype(np.float32)
    yield random.integers(0, 256, (2, 61, 35, 3), dtype=np.uint8)

def runs(place=lambda x: x):
    for path in sys.argv[2:]:
        for isa in library().isas():
            for dtype in ("float32", "bfloat16"):
                for threads in (1, 2):
                    engine = Engine(path, dtype, threads, isa=isa)
                    for x in images():
                        placed = place(x)
                        maps, tokens = engine.forward_features(placed)
                        yield from (engine(placed), *maps, tokens)
"""

POISONED = (
    EVERY_ENGINE
    + """
sums = []
for _ in memory_support.poisons():
    digest = 0
    for result in runs():
        digest = hash((digest, result.tobytes()))
    sums.append(digest)
print(len(sums), len(set(sums)))
"""
)

CHECKED = EVERY_ENGINE + "print(sum(1 for _ in runs()))"

# Every image ends, or begins, right at a page that cannot be read.
GUARDED = (
    EVERY_ENGINE
    + """
def guarded(x):
    memory, offset = memory_support.guarded(x.nbytes, sys.argv[1] == "end")
    placed = np.frombuffer(memory, x.dtype, x.size, offset).reshape(x.shape)
    placed[...] = x
    return placed

same = all((a == b).all() for a, b in zip(runs(guarded), runs(), strict=True))
print(same)
"""
)

# Counts what is asked of the allocator, and how many bytes.
COUNTER = r"""
#include <dlfcn.h>
#include <stdlib.h>
#include <stdatomic.h>
static atomic_long calls, bytes;
static void note(size_t size) { atomic_fetch_add(&calls, 1); atomic_fetch_add(&bytes, (long)size); }
#define NEXT(name) static void* (*next)() = 0; if (!next) next = dlsym(RTLD_NEXT, name)
void* malloc(size_t size) { NEXT("malloc"); note(size); return next(size); }
void* realloc(void* p, size_t size) { NEXT("realloc"); note(size); return next(p, size); }
void* aligned_alloc(size_t a, size_t size) { NEXT("aligned_alloc"); note(size); return next(a, size); }
void* memalign(size_t a, size_t size) { NEXT("memalign"); note(size); return next(a, size); }
int posix_memalign(void** p, size_t a, size_t size) {
  static int (*next)(void**, size_t, size_t) = 0;
  if (!next) next = (int (*)(void**, size_t, size_t))dlsym(RTLD_NEXT, "posix_memalign");
  note(size);
  return next(p, a, size);
}
long counted_calls(void) { return atomic_load(&calls); }
long counted_bytes(void) { return atomic_load(&bytes); }
"""

COUNTED = (
    EVERY_ENGINE
    + """
counter = ctypes.CDLL(None)
counter.counted_calls.restype = counter.counted_bytes.restype = ctypes.c_long
worst = [0, 0]
for path in sys.argv[2:]:
    for dtype in ("float32", "bfloat16"):
        for threads in (1, 2):
            engine = Engine(path, dtype, threads)
            x = np.zeros((2, 3, 160, 160), np.float32)
            y = np.zeros((1, 3, 64, 64), np.float32)
            for _ in range(3):  # sizes that take turns as well
                engine(x), engine(y)
            before = counter.counted_calls(), counter.counted_bytes()
            for _ in range(10):
                engine(x)
            after = counter.counted_calls(), counter.counted_bytes()
            assert after[0] > before[0], "nothing is counted: this test would see nothing"
            worst = [max(w, (a - b) / 10) for w, a, b in zip(worst, after, before)]
print(*worst)
"""
)


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    paths = []
    for variant, spatial in (("26m", False), ("96m", True)):
        path = tmp_path_factory.mktemp("folded") / f"{variant}{spatial}.safetensors"
        folded(variant, spatial).save(path)
        paths.append(str(path))
    return paths


def test_uninitialised_memory_is_never_read(networks: list[str]) -> None:
    """Results and workspaces: the same bits, whatever their memory held before."""
    done = python(POISONED, "", *networks, GLIBC_TUNABLES="glibc.malloc.tcache_count=0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["3", "1"]


def test_nothing_is_written_past_an_allocation(networks: list[str]) -> None:
    """glibc's checking malloc puts a byte of its own behind every block and aborts where it changed."""
    library = memory_support.checking_malloc()
    if library is None:
        pytest.skip("glibc's libc_malloc_debug.so.0 is not installed")
    done = python(CHECKED, "", *networks, LD_PRELOAD=str(library), MALLOC_CHECK_="3")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(networks) * len(isas()) * 2 * 2 * 3 * 6


@pytest.mark.parametrize("side", ["begin", "end"])
def test_nothing_is_read_outside_the_images(networks: list[str], side: str) -> None:
    done = python(GUARDED, side, *networks)
    assert done.returncode == 0, f"{done.returncode}\n{done.stderr}"
    assert done.stdout.split() == ["True"]


def test_a_repeated_call_takes_no_memory_but_for_its_result(networks: list[str], tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler for the counter of allocations")
    (tmp_path / "counter.c").write_text(COUNTER)
    counter = tmp_path / "counter.so"
    command = [compiler, "-O1", "-w", "-shared", "-fPIC", "-o", counter, tmp_path / "counter.c", "-ldl"]
    subprocess.run(command, check=True, cwd=tmp_path)
    done = python(COUNTED, "", *networks, LD_PRELOAD=str(counter))
    assert done.returncode == 0, done.stderr
    calls, size = map(float, done.stdout.split())
    # The logits, (2, 1000) float32, the check whether the input is finite, one byte a number, and what Python takes.
    assert calls < 60, size
    assert size < 2 * 1000 * 4 + 2 * 3 * 160 * 160 + 20_000
