"""Reading weight files from anywhere without running anything in them.

Two kinds, told apart by their first bytes: safetensors, and what `torch.save` wrote (zip or the older pickle
stream). The second goes through PyTorch's weights-only reader, which builds tensors and plain containers and
refuses every other class; the one class added to its list is `argparse.Namespace`, a bag of values that
training scripts save as `args`.
"""

from __future__ import annotations

import argparse
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mobileformer.files.metadata import WeightsError
from mobileformer.files.reading import NotRegularError, open_regular
from mobileformer.weights.nesting import Contents, find_weights

__all__ = ["open_weights", "read_header", "read_tensors"]


def open_weights(path: str | os.PathLike[str], *, average: bool | None = None) -> Contents:
    """The state dict under the file's own names, without prefixes, and what the file says of itself, on the CPU.

    average: which of several weights, as `find_weights` has it.

    Raises OSError, and WeightsError for a file that is empty, cut off, of another kind, holds anything but weights, or
    tells of more bytes than it has: sizes are checked before memory is taken.
    """
    path = Path(path)
    if _is_safetensors(path):
        state, header = read_tensors(path)
        found = find_weights(state, name=str(path), average=average)
        found.header = header
        return found
    found = find_weights(_read_torch(path), name=str(path), average=average)
    _check_extents(found.state, str(path))
    return found


def read_header(path: str | os.PathLike[str]) -> dict[str, str]:
    """The text metadata of a safetensors file, without reading its tensors; of another file none.

    Raises as `open_weights`.
    """
    path = Path(path)
    if not _is_safetensors(path):
        return {}
    with _open_safetensors(path) as file:
        return file.metadata() or {}


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file under its own keys, on the CPU, and its text metadata.

    Raises as `open_weights`, and WeightsError for another kind of file.
    """
    path = Path(path)
    if not _is_safetensors(path):
        raise WeightsError(f"{path}: expected a safetensors file, got one written by torch.save")
    with _open_safetensors(path) as file:
        try:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
        except (SafetensorError, RuntimeError, ValueError, TypeError) as error:
            raise WeightsError(f"{path}: holds an array that PyTorch cannot ({_line(error)})") from error


def _is_safetensors(path: Path) -> bool:
    """True for safetensors, False for `torch.save`; anything else is an error."""
    if path.is_dir():
        raise WeightsError(f"{path}: expected a file, got a folder")
    try:
        with open_regular(path) as file:  # FileNotFoundError already names the path
            head = file.read(9)
    except NotRegularError as error:
        raise WeightsError(str(error)) from None
    if not head:
        raise WeightsError(f"{path}: the file is empty")
    if head[8:9] == b"{":  # after the 8 bytes of the header's length, which may look like anything
        return True
    if head.startswith((b"PK\x03\x04", b"\x80")):
        return False
    raise WeightsError(f"{path}: neither a safetensors file nor a checkpoint written by torch.save")


def _open_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise WeightsError(f"{path}: not a valid safetensors file, or cut off ({_line(error)})") from error


def _read_torch(path: Path) -> Any:
    _check_records(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own text goes on to advise a reading that runs code: none of it is passed on.
        found = re.search(r"GLOBAL (\S+) was not an allowed", str(error))
        reason = f"it refers to {found[1]:.100}" if found else "what is in it is no tensor or plain value"
        raise WeightsError(
            f"{path}: refused, because it holds more than weights ({reason}); nothing in it was run"
        ) from error
    except Exception as error:  # a damaged stream can end in any error of the reader; none of them is ours
        raise WeightsError(f"{path}: not a valid checkpoint, or cut off ({_line(error)})") from error


def _check_records(path: Path) -> None:
    """Refuse an archive whose records unpack to more than the file has: torch.save compresses nothing."""
    try:
        with zipfile.ZipFile(path) as archive:
            told = sum(record.file_size for record in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError):
        return  # the older stream, or damaged, which its reader tells better
    size = path.stat().st_size
    if told > size:
        raise WeightsError(f"{path}: refused, its records unpack to {told} bytes and the file has {size}")


def _check_extents(state: Mapping[str, Tensor], name: str) -> None:
    """Refuse tensors that show the same few bytes many times, whose copies would take memory the file does not have."""
    for key, value in state.items():
        if value.layout != torch.strided or value.is_quantized:
            raise WeightsError(f"{name}: {key:.100}: expected a plain dense tensor, got {value.layout}")
        told, held = value.numel() * value.element_size(), value.untyped_storage().nbytes()
        if told > held:
            raise WeightsError(f"{name}: {key:.100}: its shape takes {told} bytes, and the file holds {held} for it")


def _line(error: BaseException) -> str:
    """The first line of an error that is not ours."""
    lines = str(error).splitlines()
    return lines[0][:200] if lines else type(error).__name__
