"""Writing files so that a reader never sees half of one."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["replacing"]


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary name beside `path`; on success it is renamed to `path`, on an error it is removed.

    The same folder, so that the rename stays within one file system and is atomic. The file may be read and written by
    whom the one before allowed, or by whom the process's umask allows; some writers, safetensors among them, would keep
    it to its owner. Raises what the body raises, and FileNotFoundError when the folder does not exist.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"path: the folder {str(target.parent)!r} does not exist")
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    try:
        temporary.touch()
        mode = stat.S_IMODE((target if target.exists() else temporary).stat().st_mode)
        temporary.unlink()
        yield temporary
        temporary.chmod(mode)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
