"""The compiled libraries: found, loaded on first need, asked what they are. A library that is missing has a reason.

`_cpu.so` and `_cuda.so` hold kernels only. Loading one fills slots of the dispatcher; nothing here knows an operator.
"""

from __future__ import annotations

import ctypes
import functools
import json
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent
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
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        built = build_record().get("torch", "an unknown torch")
        told = error.__cause__ or error  # torch says only that it could not, the loader says why
        return f"{path.name} does not load: built with torch {built}, have {torch.__version__}: {told}"
    _loaded.add(device)
    return None


@functools.cache
def build_record() -> dict[str, Any]:
    """What the build wrote down beside the libraries: compiler, versions, flags, and why a library is missing."""
    path = FOLDER / "_build.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def library_record(device: str) -> dict[str, Any]:
    """The build's row for one library: `built`, `reason`, `compiler`, `flags`; empty where nothing was recorded."""
    return build_record().get("libraries", {}).get(f"mf_kernels._{device}", {})


@functools.cache
def _cpu_symbols() -> ctypes.CDLL:
    missing = load("cpu")
    if missing is not None:
        raise RuntimeError(missing)
    library = ctypes.CDLL(str(FOLDER / "_cpu.so"))
    library.mf_kernels_cpu_report.restype = ctypes.c_char_p
    library.mf_kernels_cpu_set_isa.argtypes = [ctypes.c_char_p]
    return library


def cpu_report() -> dict[str, Any]:
    """What `_cpu.so` says of itself: `isa` in use, `compiled` and `runnable` ones, `calls` that each kernel served.

    Raises RuntimeError with the reason when the library is not there.
    """
    return json.loads(_cpu_symbols().mf_kernels_cpu_report())


@functools.cache
def _cuda_symbols() -> ctypes.CDLL:
    missing = load("cuda")
    if missing is not None:
        raise RuntimeError(missing)
    library = ctypes.CDLL(str(FOLDER / "_cuda.so"))
    library.mf_kernels_cuda_report.restype = ctypes.c_char_p
    return library


def cuda_report() -> dict[str, Any]:
    """What `_cuda.so` says of itself: `architectures` it holds machine code for, `calls` that each kernel served.

    Raises RuntimeError with the reason when the library is not there.
    """
    return json.loads(_cuda_symbols().mf_kernels_cuda_report())


def cpu_calls() -> dict[str, int]:
    """The calls that the CPU kernels served in this process; never loads the library to find that there were none."""
    return cpu_report()["calls"] if "cpu" in _loaded else {}


def cuda_calls() -> dict[str, int]:
    """The same of the CUDA kernels."""
    return cuda_report()["calls"] if "cuda" in _loaded else {}


def set_cpu_isa(name: str) -> None:
    """Serve from the kernels of one instruction set ("baseline", "avx2", "avx512"). Raises where it cannot run."""
    if _cpu_symbols().mf_kernels_cpu_set_isa(name.encode()) != 0:
        raise ValueError(f"instruction set: expected one of {cpu_report()['runnable']}, got {name!r}")
