"""Keeping a long run's memory at what it uses."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

__all__ = ["give_back_free_memory"]


def _find_trim() -> Callable[[int], int] | None:
    """glibc's malloc_trim, where this process runs on glibc."""
    if os.name != "posix":  # elsewhere there is no handle on the process itself to look names up in
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


_trim = _find_trim()


def give_back_free_memory() -> None:
    """Hand pages that were freed, but not given back, to the system; where the C library cannot, do nothing.

    An update frees and takes hundreds of blocks whose sizes never change, aligned to 64 bytes. glibc cuts aligned
    blocks out of larger ones and keeps the cuttings apart, so that its heap goes on growing, by up to 5 MB an update
    with 140 MB in use: the pages between must go back, or an hour fills 20 GB. It costs the page faults of the next
    update, some 30 ms.
    """
    if _trim is not None:
        _trim(0)
