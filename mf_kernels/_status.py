"""What is there on this machine, what it was built with, and why what is missing is missing."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from mf_kernels import _native, _preference, _registry


def status() -> list[dict[str, Any]]:
    """One row per operator, device and backend.

    ============  ========================================================================
    key           value
    ============  ========================================================================
    op            "mobile_to_former", ...
    device        "cpu" or "cuda"
    backend       "native" or "triton"
    available     whether a call in float32 would be served
    automatic     whether `use_backend("auto")` would take it
    reason        None, or why it is not available
    built_with    compiler, torch and instruction sets of the library, None where there is none
    ============  ========================================================================
    """
    rows = []
    for op in _preference.OPS:
        for device in _preference.DEVICES:
            present = device == "cpu" or torch.cuda.is_available()
            reasons = {
                backend: _registry.why_not(op, backend, device, torch.float32) if present else _without_device(backend)
                for backend in ("native", "triton")
            }
            tried = _preference.backends(op, device)
            automatic = next((backend for backend in tried if reasons[backend] is None), None)
            rows += [
                {
                    "op": op,
                    "device": device,
                    "backend": backend,
                    "available": reason is None,
                    "automatic": backend == automatic,
                    "reason": reason,
                    "built_with": _built_with(backend, device) if reason is None else None,
                }
                for backend, reason in reasons.items()
            ]
    return rows


def _without_device(backend: str) -> str:
    """Why a CUDA kernel cannot serve on a machine without a GPU, and whether its library would be ready for one."""
    library = _native.load("cuda") if backend == "native" else None
    return "this machine has no CUDA device" + (f"; {library}" if library is not None else "")


def _built_with(backend: str, device: str) -> str:
    if backend == "triton":
        # by name: a type checker takes `import triton` for the folder beside this file
        return f"triton {importlib.import_module('triton').__version__}"
    compiler = _native.library_record(device).get("compiler") or "compiler not recorded"
    built = f"{compiler}, torch {_native.build_record().get('torch', 'not recorded')}"
    if device == "cpu":
        report = _native.cpu_report()
        built += f"; runs {report['isa']} of {', '.join(report['compiled'])}"
    else:
        built += f"; for {', '.join(_native.cuda_report()['architectures'])}"
    return built
