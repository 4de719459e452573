"""How a call is timed on a card: many of them in one CUDA graph, on inputs that no cache holds, replayed in turns.

A call of a few microseconds is over before the host has sent the next one; a graph is sent as a whole. On the CPU,
where the dry run is, there are no graphs: the same calls are made one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mobileformer.measure.timing import Timing, interleaved

BEYOND_CACHE = 3  # inputs together are so many times the second-level cache
MOST_SETS = 64


def sets_for(bytes_of_one: int, device: str) -> int:
    """How many sets of inputs it takes, so that none is in the cache when its turn comes again."""
    if device == "cpu":
        return 2
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(3, min(MOST_SETS, -(-BEYOND_CACHE * cache // max(bytes_of_one, 1))))


@contextmanager
def lane(device: str) -> Iterator[None]:
    """A stream of our own: what a graph captures may not lie on the default one, nor what its gradients came from."""
    if device == "cpu":
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.synchronize()


class Replay:
    """Calls as one graph on the current stream. `outputs()` are those of a run over poisoned memory.

    Every call keeps its output for the life of the graph: written again and again to one place, it would stay in the
    cache and never reach the memory.
    """

    def __init__(self, calls: Sequence[Callable[[], Any]], device: str) -> None:
        self._calls, self._graph = calls, None
        if device != "cpu":
            for call in calls[:1] * 3:  # compilation, handles, the allocator's first blocks
                call()
            torch.cuda.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=torch.cuda.current_stream()):
                self._outputs = [call() for call in calls]

    def __call__(self) -> None:
        if self._graph is not None:
            self._graph.replay()
        else:
            self._outputs = [call() for call in self._calls]

    def outputs(self) -> list[Any]:
        if self._graph is not None:
            with torch.no_grad():
                for tensor in _tensors(self._outputs):
                    tensor.fill_(float("nan"))
        self()
        return self._outputs


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def timed(
    contenders: Mapping[str, Callable[[], object]],
    calls: Mapping[str, int],
    device: str,
    *,
    repeats: int,
    sample_ms: float,
) -> dict[str, Timing]:
    """Each in turns; `calls` in one run of a contender, and times are of one call."""
    cuda = device != "cpu"
    timings = interleaved(
        contenders,
        repeats=repeats if cuda else 1,
        warmup=2 if cuda else 0,
        min_sample_ms=sample_ms if cuda else 0.0,
        synchronize=torch.cuda.synchronize if cuda else None,
    )
    return {
        name: Timing(tuple(sample / calls[name] for sample in timing.samples_ms), timing.calls * calls[name])
        for name, timing in timings.items()
    }
