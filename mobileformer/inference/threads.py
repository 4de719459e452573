"""How many CPU threads: what is accepted, and PyTorch's count for the time of a call."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["check_threads", "most_threads", "thread_count"]

_lock = threading.Lock()
_inside = 0
_before = 1


def most_threads() -> int:
    """The most that are accepted: four for each CPU of this process, and 64 at least.

    More would wait for each other at every layer, for seconds an image.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(64, 4 * cpus)


def check_threads(threads: Any, otherwise: str = "") -> None:
    """Raise ValueError unless `threads` is an integer from 1 to `most_threads()`; `otherwise` names what else is."""
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise ValueError(f"threads: expected an integer of at least 1{otherwise}, got {threads!r:.80}")
    if threads > most_threads():
        told = threads if threads < 10**20 else "a far larger one"
        raise ValueError(f"threads: expected an integer of at most {most_threads()} on this machine, got {told}")


@contextmanager
def thread_count(threads: int) -> Iterator[None]:
    """Set PyTorch's number of CPU threads, and put back what was there.

    That number belongs to the process, not to the call. Where calls overlap in time, the count of the latest
    one to enter holds for all of them, and the last one to leave restores what the first one found.
    Raises ValueError for a count that `check_threads` refuses.
    """
    import torch

    check_threads(threads)
    global _inside, _before
    with _lock:
        if _inside == 0:
            _before = torch.get_num_threads()
        _inside += 1
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                torch.set_num_threads(_before)
