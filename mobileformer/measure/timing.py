"""Contenders timed in turns.

A machine's speed drifts while one measures (clocks, neighbours, caches). So contenders take turns,
A B C A B C ..., and only numbers of one such run may be divided by each other.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import median

__all__ = ["Timing", "interleaved"]


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


def _sample_ms(function: Callable[[], object], calls: int, wait: Callable[[], object]) -> float:
    wait()
    start = time.perf_counter_ns()
    for _ in range(calls):
        function()
    wait()
    return max(time.perf_counter_ns() - start, 1) / calls / 1e6


def _no_wait() -> None:
    return None
