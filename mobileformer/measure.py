"""Measuring: contenders timed in turns, differences from a reference, weights that let errors show.

A machine's speed drifts while one measures (clocks, neighbours, caches). So contenders take turns,
A B C A B C ..., and only numbers of one such run may be divided by each other.
"""

from __future__ import annotations

import gc
import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

__all__ = ["Difference", "Timing", "difference", "interleaved", "lively_weights_", "machine"]


@dataclass(frozen=True)
class Timing:
    """Samples of one contender, in milliseconds a call; each is the mean of `calls` calls in a row."""

    samples_ms: tuple[float, ...]
    calls: int

    @property
    def min_ms(self) -> float:
        return min(self.samples_ms)

    @property
    def median_ms(self) -> float:
        return median(self.samples_ms)


def interleaved(
    contenders: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 20,
    warmup: int = 2,
    min_sample_ms: float = 0.0,
    synchronize: Callable[[], object] | None = None,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> dict[str, Timing]:
    """Time every contender in turns: `repeats` rounds of one sample each, in the order given.

    Args:
        contenders: name -> function without arguments; what it returns is dropped.
        repeats: samples of each contender.
        warmup: calls of each contender before the first sample; compilation and allocation happen there.
        min_sample_ms: a sample is as many calls as last about this long, for functions of microseconds.
        synchronize: called before each reading of the clock, for devices that run behind the host
            (`torch.cuda.synchronize`).
        progress: wraps the iterable of rounds, for instance in a progress bar.

    Raises:
        ValueError: no contenders, repeats < 1 or warmup < 0.
    """
    if not contenders or repeats < 1 or warmup < 0:
        given = f"{len(contenders)} contenders, repeats={repeats}, warmup={warmup}"
        raise ValueError(f"expected a contender, repeats >= 1 and warmup >= 0, got {given}")
    wait = synchronize or _no_wait
    calls: dict[str, int] = {}
    for name, function in contenders.items():
        for _ in range(warmup):
            function()
        calls[name] = max(1, math.ceil(min_sample_ms / _sample_ms(function, 1, wait))) if min_sample_ms > 0 else 1
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    collecting = gc.isenabled()
    gc.disable()  # a collection belongs to nobody's sample
    try:
        for _ in progress(range(repeats)):
            for name, function in contenders.items():
                samples[name].append(_sample_ms(function, calls[name], wait))
            gc.collect(0)
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(tuple(values), calls[name]) for name, values in samples.items()}


@dataclass(frozen=True)
class Difference:
    """largest: max |actual - reference|. relative: the same over max |reference|."""

    largest: float
    relative: float


def difference(actual: Tensor, reference: Tensor) -> Difference:
    """Compare two tensors of one shape in float64. A value that is not finite gives an infinite difference.

    Raises:
        ValueError: the shapes differ.
    """
    if actual.shape != reference.shape:
        raise ValueError(f"actual: expected the reference's shape {tuple(reference.shape)}, got {tuple(actual.shape)}")
    if actual.numel() == 0:
        return Difference(0.0, 0.0)
    exact = reference.detach().to("cpu", torch.float64)
    largest = (actual.detach().to("cpu", torch.float64) - exact).abs().max().item()
    if not math.isfinite(largest):
        return Difference(math.inf, math.inf)
    scale = exact.abs().max().item()
    return Difference(largest, largest / scale if scale > 0 else (0.0 if largest == 0 else math.inf))


@torch.no_grad()
def lively_weights_(model: nn.Module, seed: int = 0) -> None:
    """Fill a model, in place, with seeded random weights that let every part move the result.

    A fresh model hides errors: its linear layers start near zero, so attention, gates, dynamic ReLU hardly
    count. Here matrices are N(0, 1) / sqrt(fan-in), convolutions 0.9 of that, tokens N(0, 1), biases and
    running means 0.1 * N(0, 1), scales and running variances uniform in 0.5 to 1.5.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        if not value.is_floating_point():
            continue
        leaf = name.rpartition(".")[2]
        normal = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        uniform = torch.rand(value.shape, generator=generator, dtype=torch.float64)
        if leaf in ("bias", "running_mean"):
            filled = 0.1 * normal
        elif value.ndim == 1:
            filled = 0.5 + uniform
        elif name.startswith("tokens"):
            filled = normal
        else:
            gain = 0.9 if value.ndim == 4 else 1.0
            filled = gain / math.sqrt(math.prod(value.shape[1:])) * normal
        value.copy_(filled)


def machine(device: str | torch.device = "cpu") -> dict[str, str | int]:
    """What a measurement depends on: processor, instruction set, threads, versions, and the GPU if asked."""
    described: dict[str, str | int] = {
        "cpu": _cpu_name(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.device(device).type == "cuda":
        described["gpu"] = torch.cuda.get_device_name(device)
        described["cuda"] = str(torch.version.cuda)
    return described


def _sample_ms(function: Callable[[], object], calls: int, wait: Callable[[], object]) -> float:
    wait()
    start = time.perf_counter_ns()
    for _ in range(calls):
        function()
    wait()
    return max(time.perf_counter_ns() - start, 1) / calls / 1e6


def _no_wait() -> None:
    return None


def _cpu_name() -> str:
    """With family and model: virtual machines call processors of several generations by one name."""
    told: dict[str, str] = {}
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                key, _, value = line.partition(":")
                told.setdefault(key.strip(), value.strip())
    except OSError:  # not Linux
        pass
    if "model name" not in told:
        return platform.processor() or platform.machine()
    generation = [f"{key} {told[name]}" for key, name in (("family", "cpu family"), ("model", "model")) if name in told]
    return ", ".join([told["model name"], " ".join(generation)] if generation else [told["model name"]])
