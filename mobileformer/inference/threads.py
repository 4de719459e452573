"""A thread count for the time of a call."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["thread_count"]

_lock = threading.Lock()
_inside = 0
_before = 1


@contextmanager
def thread_count(threads: int) -> Iterator[None]:
    """Set PyTorch's number of CPU threads, and put back what was there.

    That number belongs to the process, not to the call. Where calls overlap in time, the count of the latest
    one to enter holds for all of them, and the last one to leave restores what the first one found.
    """
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
