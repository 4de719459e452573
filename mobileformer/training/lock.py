"""One run in a folder at a time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from mobileformer.training.state import TrainingError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["lock_folder"]


def lock_folder(folder: Path) -> BinaryIO:
    """The lock on a run's folder, held until the file is closed or the process ends, however that happens.

    Raises TrainingError where another process holds it.
    """
    file = (folder / "run.lock").open("ab")
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    except (BlockingIOError, PermissionError):
        file.close()
        raise TrainingError(
            f"{folder}: another training writes into this folder; give another one, or end it"
        ) from None
    except OSError as error:
        file.close()
        raise TrainingError(
            f"{folder}: cannot be locked against a second training: {os.strerror(error.errno or 0)}"
        ) from error
    return file
