"""Files written so that a reader never sees half of one."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mobileformer.files.reading import refuse_other_kinds

__all__ = ["replacing", "replacing_folder", "resting_place"]


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
        refuse_other_kinds(target, target.stat().st_mode)
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


@contextmanager
def replacing_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty folder beside the path; on success it gets that name, on an error it is removed with all in it.

    What has the name already is renamed first and removed last; through a link, the folder that it points to. Whether
    it may be, the caller has to know. Raises FileNotFoundError where the folder around it does not exist.
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"path: the folder {str(target.parent)!r} does not exist")
    stem = f".{target.name[:40]}.{secrets.token_hex(6)}"
    temporary, before = target.with_name(f"{stem}.tmp"), target.with_name(f"{stem}.old")
    temporary.mkdir()
    try:
        yield temporary
        if target.exists():
            target.rename(before)
        try:
            temporary.rename(target)
        except OSError:
            if before.exists():
                before.rename(target)
            raise
        if before.exists():
            shutil.rmtree(before)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
