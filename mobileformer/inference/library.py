"""The compiled engine: found, loaded on first need, with a reason where it is not there."""

from __future__ import annotations

import functools
import importlib
import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["chosen_isa", "library", "status", "why_not"]

_PACKAGES = Path(__file__).parents[2]
_NAME = "mobileformer._engine"
INTERFACE = 1  # as csrc/common/interface.h
REBUILD = "build it anew with `python setup.py build_ext --inplace`, or install the package again"


def library() -> ModuleType:
    """The compiled module. Raises RuntimeError with the reason where there is none."""
    module, reason = _load()
    if module is None:
        raise RuntimeError(f"the inference engine is not there: {reason}")
    return module


def why_not() -> str | None:
    """None where the engine can run, else the reason in words: no library, or an instruction set it cannot take."""
    module, reason = _load()
    if module is None:
        return reason
    try:
        chosen_isa()
    except ValueError as error:
        return str(error)
    return None


def chosen_isa(isa: str | None = None) -> str:
    """The instruction set to run: `isa`, else that of MF_ENGINE_ISA, else the best one of this CPU.

    Raises ValueError, naming where it came from, for one that is unknown or that this CPU does not run.
    """
    source, asked = ("isa", isa) if isa is not None else ("MF_ENGINE_ISA", os.environ.get("MF_ENGINE_ISA", ""))
    runnable = library().isas()
    if asked == "" and isa is None:
        return runnable[-1]
    if asked not in runnable:
        raise ValueError(f"{source}: expected an instruction set of this CPU, one of {runnable}, got {asked!r}")
    return asked


def status() -> dict[str, Any]:
    """What `mobileformer info` tells: whether the engine runs, in which instruction set, and if not, why.

    ===========  ===========================================================================
    key          value
    ===========  ===========================================================================
    available    whether `Engine` works
    reason       None, or why it does not
    isa          the instruction set that runs, None where none does
    runnable     those that this CPU has, worst first
    compiled     those that the library holds
    built_with   the compiler, None where there is no library
    ===========  ===========================================================================
    """
    module, _ = _load()
    reason = why_not()
    return {
        "available": reason is None,
        "reason": reason,
        "isa": chosen_isa() if reason is None else None,
        "runnable": list(module.isas()) if module is not None else [],
        "compiled": list(module.compiled()) if module is not None else [],
        "built_with": (_record().get("compiler") or "compiler not recorded") if module is not None else None,
    }


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    try:
        module = importlib.import_module(_NAME)
        if getattr(module, "INTERFACE", None) != INTERFACE:
            return None, f"{_NAME} does not load: it is not the library of this version of the package; {REBUILD}"
        return module, ""
    except (ImportError, SystemError) as error:
        files = sorted(path.name for path in (_PACKAGES / "mobileformer").glob("_engine.*so"))
        if not isinstance(error, ModuleNotFoundError):
            return None, f"{_NAME} does not load: {error}; {REBUILD}"
        if files:
            return None, f"{_NAME} was built for another Python ({', '.join(files)})"
        record = _record()
        if record.get("built"):
            return None, f"{_NAME} was built and is no longer there"
        return None, f"{_NAME} was not built ({record.get('reason') or 'no build record'})"


def _record() -> dict[str, Any]:
    """The build's row for the engine. The record lies beside the kernels, whose package would import torch."""
    try:
        row = json.loads((_PACKAGES / "mf_kernels" / "_build.json").read_text())["libraries"][_NAME]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):  # none, or a damaged one
        return {}
    return row if isinstance(row, dict) else {}
