"""Which kernel serves a call: asked for, or chosen; with a reason for every kernel that cannot.

A backend is "native" (C++ on CPU, CUDA C++ on CUDA), "triton" or "reference" (plain PyTorch). "auto" takes the first
of `_preference` that can serve the operator on that device and dtype, and says so once when that is the reference.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import os
import threading
import warnings
from collections.abc import Iterator

import torch

from mf_kernels import _native, _preference, _triton
from mf_kernels.environment import constant_in_graphs, is_exported_to_onnx, is_transformed, switch

BACKENDS = ("auto", "reference", "native", "triton")
MAX_TOKENS = 8
_DTYPES = {
    ("native", "cpu"): (torch.float32, torch.float64, torch.bfloat16),
    ("native", "cuda"): (torch.float32, torch.float16, torch.bfloat16),
    ("triton", "cpu"): (torch.float32, torch.float16, torch.bfloat16),
    ("triton", "cuda"): (torch.float32, torch.float16, torch.bfloat16),
}


class KernelFallbackWarning(UserWarning):
    """`auto` could not serve an operator with a fused kernel and runs the reference."""


class _Requested(threading.local):
    backend = "auto"


_requested = _Requested()
# torch.compile bakes the backend into the graph and cannot guard on a thread's own variable; it can on a module's.
_last_requested = "auto"
_served: collections.Counter[str] = collections.Counter()
_warned: set[str] = set()
_lock = threading.Lock()


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Serve every call of this thread inside the block from one backend; nests; restores what was before.

    ==============  =====================================================================================
    "auto"          the best kernel that can serve the call, else the reference with one warning per op
    "reference"     plain PyTorch
    "native"        C++ on CPU tensors, CUDA C++ on CUDA tensors; raises RuntimeError when it cannot serve
    "triton"        Triton on CUDA tensors, on CPU tensors under TRITON_INTERPRET=1; raises likewise
    ==============  =====================================================================================

    A function under `torch.compile` takes the backend of the thread that entered a block last, when it is (re)traced.
    Raises ValueError for another name.
    """
    global _last_requested
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {BACKENDS}, got {backend!r}")
    before = _requested.backend
    _requested.backend = _last_requested = backend
    try:
        yield
    finally:
        _requested.backend = _last_requested = before


def requested_backend() -> str:
    """The backend that `use_backend` set for this thread's calls, "auto" outside of its blocks.

    For work that is put off, to another thread or until a backward pass, and is to be served as it would be now.
    """
    return _requested.backend


def route(op: str, device: str, dtype: torch.dtype, num_tokens: int = 1) -> str:
    """The backend that serves this call: "native", "triton" or "reference"."""
    too_many_tokens = False
    if num_tokens > MAX_TOKENS:  # a branch: that a graph guards on, where it could not pass a symbolic comparison on
        too_many_tokens = True
    if torch.compiler.is_compiling():
        return _route_in_graph(op, _last_requested, device, dtype, too_many_tokens)
    if is_transformed():
        chosen, reasons, shared = _resolve_transformed(op, _requested.backend)
    else:
        chosen, reasons, shared = _resolve(op, _requested.backend, device, dtype, too_many_tokens)
    if chosen == "reference":
        _served[f"{op}:reference"] += 1
        if reasons:
            _fall_back(op, reasons, shared)
    return chosen


@constant_in_graphs
def _route_in_graph(op: str, requested: str, device: str, dtype: torch.dtype, too_many_tokens: bool) -> str:
    if is_transformed() or is_exported_to_onnx():
        return _resolve_transformed(op, requested)[0]
    chosen, reasons, shared = _resolve(op, requested, device, dtype, too_many_tokens)
    if reasons:
        _fall_back(op, reasons, shared)
    return chosen


@functools.cache
def _resolve(op: str, requested: str, device: str, dtype: torch.dtype, too_many_tokens: bool) -> tuple[str, str, str]:
    """The backend; for a reference that nobody asked for, the reasons, and what lacks if every operator lacks it.

    Raises RuntimeError where an explicit backend cannot serve.
    """
    if requested == "reference" or device == "meta":
        return "reference", "", ""
    candidates = _preference.backends(op, device) if requested == "auto" else (requested,)
    reasons = {backend: why_not(op, backend, device, dtype, too_many_tokens) for backend in candidates}
    for backend, reason in reasons.items():
        if reason is None:
            return backend, "", ""
    told = "; ".join(f"{b}: {r}" for b, r in reasons.items()) or f"no kernels for device {device!r}"
    if requested != "auto":
        raise RuntimeError(f"{op}: backend {requested!r} was asked for and cannot serve this call: {told}")
    return "reference", told, told if device == "cpu" and _native.load("cpu") is not None else ""


def _resolve_transformed(op: str, requested: str) -> tuple[str, str, str]:
    """What `_resolve` says under a transform. With the reference only time is lost: `auto` takes it without a word."""
    if requested in ("auto", "reference"):
        return "reference", "", ""
    raise RuntimeError(
        f"{op}: backend {requested!r} was asked for and cannot serve this call: no fused kernel takes part in"
        ' forward-mode differentiation, a transform of torch.func or an export to ONNX; "auto" and "reference" do'
    )


@functools.cache
def why_not(op: str, backend: str, device: str, dtype: torch.dtype, too_many_tokens: bool = False) -> str | None:
    """None when the backend serves this operator on this device in this dtype, else the reason in words."""
    dtypes = _DTYPES.get((backend, device))
    if dtypes is None:
        return f"no kernels for device {device!r}"
    missing = _native.missing(op, device) if backend == "native" else _triton.missing(op, device)
    if missing is not None:
        return missing
    if dtype not in dtypes:
        return f"no kernel for {dtype}, only {', '.join(str(d).removeprefix('torch.') for d in dtypes)}"
    if too_many_tokens:
        return f"more than {MAX_TOKENS} tokens"
    if backend == "triton" and device == "cuda":
        return _triton.does_not_compile(op, dtype)
    return None


def helper_missing(op: str, device: str) -> bool:
    """Whether a helper (an operator that only rearranges PyTorch's own arithmetic) has to do without its kernel.

    A helper falls back without a warning: it has no fused form to miss, only a slower equal. Triton has none.
    """
    compiling = torch.compiler.is_compiling()
    if compiling and is_exported_to_onnx():
        return True
    requested = _last_requested if compiling else _requested.backend
    return requested in ("reference", "triton") or is_transformed() or _helper_kernel_missing(op, device)


@constant_in_graphs
def _helper_kernel_missing(op: str, device: str) -> bool:
    return _native.missing(op, device) is not None


def _fall_back(op: str, reasons: str, shared: str) -> None:
    """Say once per operator, or once for all where they share the reason, that the reference runs."""
    message = f"{op}: no fused kernel serves this call, the plain PyTorch reference does ({reasons})"
    if switch("MF_KERNELS_STRICT"):
        raise RuntimeError(f"{message}; MF_KERNELS_STRICT={os.environ['MF_KERNELS_STRICT']} makes this an error")
    with _lock:
        first = (shared or op) not in _warned
        _warned.add(shared or op)
    if first:
        warnings.warn(f"{message}; see `python -m mf_kernels`", KernelFallbackWarning, stacklevel=4)


class KernelRecord:
    """Live counts of the kernels that ran since the record began, by name, from all threads."""

    def __init__(self) -> None:
        self._before = _all_served()

    @property
    def counts(self) -> dict[str, int]:
        """{"dynamic_relu_fwd:native:cpu:avx512": 3, "mobile_to_former:reference": 1, ...}"""
        return dict(_all_served() - self._before)


@contextlib.contextmanager
def record_kernels() -> Iterator[KernelRecord]:
    """See which kernel served: `with record_kernels() as record: ...; record.counts`.

    Counted where a kernel runs (in the C++ library, in the Triton launcher), so it holds for backward passes and
    compiled graphs too. A reference that `torch.compile` has inlined is PyTorch's own code and is not counted.
    """
    yield KernelRecord()


def count_served(kernel: str) -> None:
    """Called by a Python launcher each time its kernel runs."""
    _served[kernel] += 1


def _all_served() -> collections.Counter[str]:
    return _served + collections.Counter(_native.cpu_calls()) + collections.Counter(_native.cuda_calls())
