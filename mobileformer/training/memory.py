"""Keeping a long run's memory at what it uses."""

from __future__ import annotations

import ctypes

__all__ = ["give_back_free_memory"]

_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it


def give_back_free_memory() -> None:
    """Hand pages that were freed, but not given back, to the system; where the C library cannot, do nothing.

    An update frees and takes hundreds of blocks whose sizes never change, aligned to 64 bytes. glibc cuts aligned
    blocks out of larger ones and keeps the cuttings apart, so that its heap goes on growing, by up to 5 MB an update
    with 140 MB in use: the pages between must go back, or an hour fills 20 GB. It costs the page faults of the next
    update, some 30 ms.
    """
    if _trim is not None:
        _trim(0)
