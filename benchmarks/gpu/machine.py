"""The card and its ceilings: what a copy and a matrix product reach here, which everything else is held against."""

from __future__ import annotations

import functools
import math
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec

import torch
from reading import load

import mf_kernels
from gpu.graphs import Replay, lane, timed
from gpu.section import Section

OPTIONAL = ("pytest", "xdist", "hypothesis", "timm", "safetensors", "typer")


def run(section: Section, device: str) -> None:
    """Rows "copy" (GB/s, bytes read plus written), "matmul <dtype>" (TFLOP/s) and "launch <by>" (us of the host)."""
    section.header["missing_packages"] = [name for name in OPTIONAL if not _has(name)]
    dtypes = {"bfloat16": torch.bfloat16, "float32": torch.float32, "tf32": torch.float32}
    launches = ("aten", "triton", "graph") if _has("triton") else ("aten", "graph")
    section.plan(["copy", *(f"matmul {name}" for name in dtypes), *(f"launch {by}" for by in launches)])
    cuda = device != "cpu"
    with lane(device):
        half = 2**30 if cuda else 2**16
        source = torch.rand(half // 4, device=device)
        target = torch.full_like(source, float("nan"))
        row = _measure(functools.partial(target.copy_, source), device)
        if not torch.equal(source, target):
            raise AssertionError("a copy differs from its source")
        section.add("copy", {"bytes": 2 * half, **row, "gb_per_s": 2 * half / row["median_ms"] / 1e6})
        del source, target
        side = 8192 if cuda else 64
        for name, dtype in dtypes.items():
            a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))  # zeros would run faster
            torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
            row = _measure(functools.partial(torch.mm, a, b), device)
            torch.backends.cuda.matmul.allow_tf32 = False
            section.add(f"matmul {name}", {"side": side, **row, "tflop_per_s": 2 * side**3 / row["median_ms"] / 1e9})

        small = torch.ones(1, 8, 4, 4, device=device).contiguous(memory_format=torch.channels_last)
        theta, calls = torch.zeros(1, 16, device=device), 1000 if cuda else 3
        graph = Replay([functools.partial(torch.add, small, 1)] * calls, device)
        runs = {"aten": functools.partial(torch.add, small, 1), "triton": functools.partial(_by_triton, small, theta)}
        for by in launches:
            us = _host_us(graph, 1, cuda) / calls if by == "graph" else _host_us(runs[by], calls, cuda)
            section.add(f"launch {by}", {"calls": calls, "host_us": us})


def _by_triton(x: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    with mf_kernels.use_backend("triton"):
        return mf_kernels.dynamic_relu(x, theta)


def _host_us(run: Callable[[], object], calls: int, cuda: bool) -> float:
    """Microseconds a call, the device's work hidden or tiny: of many calls in a row, the fastest of five times."""
    wait = torch.cuda.synchronize if cuda else lambda: None
    run()
    wait()
    best = math.inf
    with torch.no_grad():
        for _ in range(5 if cuda else 1):
            start = time.perf_counter()
            for _ in range(calls):
                run()
            wait()
            best = min(best, time.perf_counter() - start)
    return 1e6 * best / calls


def copy_ceiling(section: Section) -> float | None:
    """GB/s of the copy in the file of this section, beside that of another one; None where it was not measured."""
    path = section.path.with_name("machine.json")
    rows = load(path)["rows"] if path.is_file() else []
    return next((row["gb_per_s"] for row in rows if row["label"] == "copy"), None)


def card(device: str) -> dict[str, object]:
    """What `harness.environment` does not say of a card and of what drives it."""
    versions: dict[str, object] = {"python_path": sys.executable, "cudnn": torch.backends.cudnn.version()}
    versions["cudnn_benchmark"] = torch.backends.cudnn.benchmark
    if _has("triton"):
        import triton

        versions["triton"] = triton.__version__
    if device != "cpu":
        properties = torch.cuda.get_device_properties(0)
        versions |= {
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "driver": _last_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "nvcc": _last_line("nvcc", "--version"),
        }
    return versions


def _measure(run: Callable[[], object], device: str) -> dict[str, float]:
    timing = timed({"": run}, {"": 1}, device, repeats=20, sample_ms=5.0)[""]
    return {"median_ms": timing.median_ms, "min_ms": timing.min_ms}


def _has(package: str) -> bool:
    return find_spec(package) is not None


def _last_line(*command: str) -> str | None:
    """What a program says last, None where there is none or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return (done.stdout.strip().splitlines() or [None])[-1]
