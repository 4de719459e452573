"""Files: opened only where they are regular ones, and written so that a reader never sees half of one."""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

__all__ = ["NotRegularError", "is_regular", "open_regular", "read_regular", "replacing", "resting_place"]

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
        _refuse_other_kinds(path, os.stat(path).st_mode)
        raise
    try:
        _refuse_other_kinds(path, os.fstat(handle).st_mode)
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


def _refuse_other_kinds(path: str | os.PathLike[str], mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = next((name for test, name in _KINDS if test(mode)), "something else")
        raise NotRegularError(f"{os.fspath(path)}: expected a regular file, got {kind}")


def resting_place(path: str | os.PathLike[str]) -> Path:
    """The file that is written under this name: where a link points to, which may not be there yet, or the name itself.

    A link is somebody's decision where the bytes shall lie, so it stays, and what it points to is replaced. Raises
    FileNotFoundError when the folder does not exist, NotRegularError for what is there and no regular file, OSError for
    links in a circle.
    """
    target = Path(path)
    if target.is_symlink():
        target = Path(os.path.realpath(target))
        if target.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), os.fspath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"path: the folder {str(target.parent)!r} does not exist")
    if target.exists():
        _refuse_other_kinds(target, target.stat().st_mode)
    return target


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary name beside the file; on success it is renamed to it, on an error it is removed.

    The same folder, so that the rename stays within one file system and is atomic; through a link, the folder of what
    it points to. The file may be read and written by whom the one before allowed, or by whom the process's umask
    allows; some writers, safetensors among them, would keep it to its owner. Raises as `resting_place`, and what the
    body raises; where that is the system's refusal, as of a full disk, always an OSError that names the file, whatever
    a writer makes of it.
    """
    target = resting_place(path)
    temporary = target.with_name(f".{target.name[:40]}.{secrets.token_hex(6)}.tmp")  # a name has 255 bytes at most
    try:
        temporary.touch()
        mode = stat.S_IMODE((target if target.exists() else temporary).stat().st_mode)
        temporary.unlink()
        try:
            yield temporary
        except Exception as error:
            number = _system_error(error)
            if number is None or getattr(error, "filename", None) is not None:
                raise
            raise OSError(number, os.strerror(number), str(target)) from error
        temporary.chmod(mode)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _system_error(error: BaseException) -> int | None:
    """The system's error number behind what a writer raised, None where there is none.

    safetensors says it in words, "(os error 28)"; torch's writer not at all: it notes that a file did not grow.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError):
            return seen.errno
        if found := re.search(r"\(os error (\d+)\)", str(seen)):
            return int(found[1])
        seen = seen.__cause__ or seen.__context__
    return errno.ENOSPC if re.search(r"inline_container|PytorchStreamWriter", str(error)) else None
