"""Files opened for reading only where they are regular ones."""

from __future__ import annotations

import os
import stat
from typing import BinaryIO

__all__ = ["NotRegularError", "is_regular", "open_regular", "read_regular", "refuse_other_kinds"]

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)


class NotRegularError(OSError):
    """A path that is there and is no regular file: reading a FIFO or a device might wait for ever, or never end."""


def open_regular(path: str | os.PathLike[str], mode: str = "rb") -> BinaryIO:
    """Open a regular file for reading, links followed. What it is is asked of the open file, so nobody can swap it.

    mode: "rb", the only one. Raises NotRegularError (an OSError) "FILE: expected a regular file, got a FIFO" for
    anything else that is there, ValueError for a name that no file can have, and what `open` raises.
    """
    if mode != "rb":
        raise ValueError(f"mode: expected 'rb', got {mode!r}")
    # Without O_NONBLOCK the opening of a FIFO would itself wait for a writer; on a regular file it changes nothing.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    try:
        handle = os.open(path, flags)
    except OSError:
        # A socket cannot be opened at all (ENXIO), and Windows opens no folder: the kind is the better message.
        refuse_other_kinds(path, os.stat(path).st_mode)
        raise
    try:
        refuse_other_kinds(path, os.fstat(handle).st_mode)
        return os.fdopen(handle, mode)  # type: ignore[return-value]
    except BaseException:
        os.close(handle)
        raise


def read_regular(path: str | os.PathLike[str], limit: int | None = None) -> bytes:
    """The bytes of a regular file; NotRegularError for another kind, ValueError where there are more than `limit`."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if limit is not None and size > limit:
            raise ValueError(f"{os.fspath(path)}: {size} bytes, expected at most {limit}")
        return file.read()


def is_regular(path: str | os.PathLike[str]) -> bool:
    """Whether there is a regular file, links followed; False for FIFOs, devices, folders, and what cannot be looked at.

    For choosing among names. Who opens one uses `open_regular`, since a name may come to mean another file.
    """
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def refuse_other_kinds(path: str | os.PathLike[str], mode: int) -> None:
    """Raise NotRegularError where a mode, as `os.stat` gives it, is of no regular file."""
    if not stat.S_ISREG(mode):
        kind = next((name for test, name in _KINDS if test(mode)), "something else")
        raise NotRegularError(f"{os.fspath(path)}: expected a regular file, got {kind}")
