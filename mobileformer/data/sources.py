"""Telling the kinds of data sets apart."""

from __future__ import annotations

import os
from pathlib import Path

from mobileformer.data.base import DataError, Source, Split, check_channels
from mobileformer.data.idx import find_idx_folder, open_idx

__all__ = ["open_source"]


def open_source(path: str | os.PathLike[str], split: Split, *, channels: int | None = None) -> Source:
    """One split of the data set at `path`."""
    if split not in ("train", "val"):
        raise ValueError(f"split: expected 'train' or 'val', got {split!r}")
    check_channels(channels)
    if not Path(path).exists():
        raise DataError(f"{os.fspath(path)}: no such file or folder")
    if find_idx_folder(path) is not None:
        return open_idx(path, split, channels=channels)
    raise DataError(f"{os.fspath(path)}: no data set found")
