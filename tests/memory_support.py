"""Memory that tells who touches what is not theirs: poisoned when it is handed out, or between pages that fault.

Standard library alone: fresh processes without torch import it. Linux with glibc.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from pathlib import Path

LIBC = ctypes.CDLL(None)
LIBC.malloc.restype = ctypes.c_void_p
PAGE = mmap.PAGESIZE
M_PERTURB = -6


def poisons() -> Iterator[None]:
    """While each turn lasts, malloc hands out bytes that are NaN, large and small numbers.

    mallopt(M_PERTURB, p) fills what it hands out with bytes p ^ 0xff, where GLIBC_TUNABLES=glibc.malloc.tcache_count=0
    keeps small blocks from going round beside it.
    """
    for perturb, fill in ((256, 0xFF), (0x80, 0x7F), (0x3F, 0xC0)):
        LIBC.mallopt(M_PERTURB, perturb)
        fresh = ctypes.c_void_p(LIBC.malloc(ctypes.c_size_t(3001)))
        seen = ctypes.string_at(fresh, 3001)
        LIBC.free(fresh)
        assert set(seen) == {fill}, "memory is not poisoned: this test would see nothing"
        yield
        LIBC.mallopt(M_PERTURB, 0)


def guarded(size: int, at_end: bool) -> tuple[mmap.mmap, int]:
    """Memory with a page before and behind that cannot be read, and where in it `size` bytes end or begin at one."""
    pages = -(-size // PAGE)
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for guard in (address, address + (pages + 1) * PAGE):
        assert LIBC.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(PAGE), 0) == 0
    return memory, (pages + 1) * PAGE - size if at_end else PAGE


def checking_malloc() -> Path | None:
    """glibc's library that puts a byte of its own behind every block and aborts where one changed; None without it."""
    return next((path for path in Path("/usr/lib").rglob("libc_malloc_debug.so.0")), None)
