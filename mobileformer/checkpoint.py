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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mobileformer.metadata import WeightsError

__all__ = ["read_header", "read_state", "unwrap_state"]

_WRAPPERS = ("module.", "_orig_mod.")  # DistributedDataParallel, torch.compile


def read_state(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(state dict under the file's own names, its text metadata: none unless safetensors), on the CPU.

    Raises FileNotFoundError, and WeightsError for a file that is empty, cut off, of another kind, or holds
    anything but weights.
    """
    path = Path(path)
    if _is_safetensors(path):
        with _open_safetensors(path) as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    return unwrap_state(_read_torch(path), name=str(path)), {}


def read_header(path: str | os.PathLike[str]) -> dict[str, str]:
    """The text metadata of a file, without reading its tensors. Raises as `read_state`."""
    path = Path(path)
    if not _is_safetensors(path):
        return {}
    with _open_safetensors(path) as file:
        return file.metadata() or {}


def unwrap_state(state: Any, *, name: str) -> dict[str, Tensor]:
    """The flat {key: tensor} of a saved training state, maybe below `state_dict` or behind `module.`."""
    if not isinstance(state, Mapping):
        raise WeightsError(f"{name}: expected a dict of tensors, got {type(state).__name__}")
    if isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not state:
        raise WeightsError(f"{name}: holds no weights")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise WeightsError(f"{name}: expected tensors under text keys, got {type(value).__name__} under {key!r}")
    while prefix := next((p for p in _WRAPPERS if all(key.startswith(p) for key in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return dict(state)


def _is_safetensors(path: Path) -> bool:
    """True for safetensors, False for `torch.save`; anything else is an error."""
    if path.is_dir():
        raise WeightsError(f"{path}: expected a file, got a folder")
    with path.open("rb") as file:  # FileNotFoundError already names the path
        head = file.read(9)
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
        raise WeightsError(f"{path}: not a valid safetensors file, or cut off ({error})") from error


def _read_torch(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+) was not an allowed", str(error))
        reason = f"it refers to {found[1]}" if found else str(error).splitlines()[0]
        raise WeightsError(
            f"{path}: refused, because it holds more than weights ({reason}); nothing in it was run"
        ) from error
    except Exception as error:  # a damaged stream can end in any error of the reader; none of them is ours
        raise WeightsError(f"{path}: not a valid checkpoint, or cut off ({error})") from error
