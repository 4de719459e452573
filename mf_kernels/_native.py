"""The compiled libraries: found, loaded on first need, asked what they are. A library that is missing has a reason.

`_cpu.so` and `_cuda.so` hold kernels only. Loading one fills slots of the dispatcher; nothing here knows an operator.
"""

from __future__ import annotations

import ctypes
import functools
import json
import mmap
import os
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent
INTERFACE = 1  # as csrc/common/interface.h: grows with every change of a schema, so that no older library is called
REBUILD = "build it anew with `python setup.py build_ext --inplace`, or install the package again"
_loaded: set[str] = set()


@functools.cache
def load(device: str) -> str | None:
    """Load the library for "cpu" or "cuda" once. None when its kernels are ready, else the reason why not."""
    path = FOLDER / f"_{device}.so"
    if not path.is_file():
        record = library_record(device)
        if record.get("built"):
            return f"{path.name} was built and is no longer there"
        return f"{path.name} was not built ({record.get('reason') or 'no build record'})"
    if not _is_ours(path, device):
        return f"{path.name} does not load: it is not the library of this version of the package; {REBUILD}"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        built = build_record().get("torch", "an unknown torch")
        told = error.__cause__ or error  # torch says only that it could not, the loader says why
        return f"{path.name} does not load: built with torch {built}, have {torch.__version__}: {told}; {REBUILD}"
    asked = os.environ.get("MF_KERNELS_ISA")
    if device == "cpu" and asked:
        try:
            _choose_isa(asked)
        except ValueError as error:
            return f"MF_KERNELS_ISA: {error}"
    _loaded.add(device)
    return None


@functools.cache
def missing(op: str, device: str) -> str | None:
    """None where the library of the device has a kernel of the operator, forward, else the reason why not."""
    reason = load(device)
    if reason is not None:
        return reason
    slots = (f"mf_kernels::{op}_fwd.native", f"mf_kernels::{op}.native")
    declared = [slot for slot in slots if torch._C._dispatch_has_kernel(slot)]
    if any(torch._C._dispatch_has_kernel_for_dispatch_key(slot, device.upper()) for slot in declared):
        return None
    return f"_{device}.so has no kernel of it"


def _is_ours(path: Path, device: str) -> bool:
    """Whether the file says that it was compiled for these schemas. Read, not loaded: loading would register it."""
    wanted = f"mf_kernels _{device} interface {INTERFACE}.".encode()
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.find(wanted) >= 0
    except (OSError, ValueError):  # it cannot be read, or is empty
        return False


@functools.cache
def build_record() -> dict[str, Any]:
    """What the build wrote down beside the libraries: compiler, versions, flags, and why a library is missing."""
    try:
        record = json.loads((FOLDER / "_build.json").read_text())
    except (OSError, ValueError, RecursionError):  # none, or a damaged one
        return {}
    return record if isinstance(record, dict) and isinstance(record.get("libraries", {}), dict) else {}


def library_record(device: str) -> dict[str, Any]:
    """The build's row for one library: `built`, `reason`, `compiler`, `flags`; empty where nothing was recorded."""
    row = build_record().get("libraries", {}).get(f"mf_kernels._{device}", {})
    return row if isinstance(row, dict) else {}


@functools.cache
def _functions(device: str) -> ctypes.CDLL:
    """The plain C functions of a library that is loaded."""
    library = ctypes.CDLL(str(FOLDER / f"_{device}.so"))
    getattr(library, f"mf_kernels_{device}_report").restype = ctypes.c_char_p
    return library


def _report(device: str) -> dict[str, Any]:
    return json.loads(getattr(_functions(device), f"mf_kernels_{device}_report")())


def _require(device: str) -> None:
    missing = load(device)
    if missing is not None:
        raise RuntimeError(missing)


def cpu_report() -> dict[str, Any]:
    """What `_cpu.so` says of itself: `isa` in use, `compiled` and `runnable` ones, `calls` that each kernel served.

    Raises RuntimeError with the reason when the library is not there.
    """
    _require("cpu")
    return _report("cpu")


def cuda_report() -> dict[str, Any]:
    """What `_cuda.so` says of itself: `architectures` it holds machine code for, `calls` that each kernel served.

    Raises RuntimeError with the reason when the library is not there.
    """
    _require("cuda")
    return _report("cuda")


def cpu_calls() -> dict[str, int]:
    """The calls that the CPU kernels served in this process; never loads the library to find that there were none."""
    return _report("cpu")["calls"] if "cpu" in _loaded else {}


def cuda_calls() -> dict[str, int]:
    """The same of the CUDA kernels."""
    return _report("cuda")["calls"] if "cuda" in _loaded else {}


def set_cpu_isa(name: str) -> None:
    """Serve from the kernels of one instruction set ("baseline", "avx2", "avx512"). Raises where it cannot run."""
    _require("cpu")
    _choose_isa(name)


def _choose_isa(name: str) -> None:
    if _functions("cpu").mf_kernels_cpu_set_isa(name.encode()) != 0:
        raise ValueError(f"instruction set: expected one of {_report('cpu')['runnable']}, got {name!r}")
