"""How a kernel is launched: feature maps taken as they lie, one place that launches or writes a launch down.

A launcher is an ordinary function of tensors. Inside `recording(capability)` the same launchers, given
tensors without memory (`device="meta"`), leave a list of what they would launch: that is how the kernels are
compiled without a GPU at the very settings that a GPU would see.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mf_kernels.triton._settings import INTERPRETER

WIDE_FROM = 2**31  # elements of one sample; below, a place inside it is a 32-bit number


@dataclass(frozen=True)
class Launch:
    """One kernel call: programs, run-time arguments (tensors, integers, None), constants, settings."""

    kernel: Any  # triton.JITFunction
    programs: int
    arguments: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    max_registers: int | None = None  # of a thread; None leaves it to the assembler

    def options(self) -> dict[str, Any]:
        # A product and a sum may be one instruction: said here, for the default changes between releases.
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        return options if self.max_registers is None else {**options, "maxnreg": self.max_registers}


@dataclass
class _Recording:
    capability: tuple[int, int]
    launches: list[Launch]


_recording: contextvars.ContextVar[_Recording | None] = contextvars.ContextVar("recording", default=None)


@contextlib.contextmanager
def recording(capability: tuple[int, int]) -> Iterator[list[Launch]]:
    """Launch nothing inside the block; collect the launches, as for a card of that compute capability."""
    token = _recording.set(_Recording(capability, launches := []))
    try:
        yield launches
    finally:
        _recording.reset(token)


def capability(x: Tensor) -> tuple[int, int]:
    """Compute capability of x's device: recorded, asked of the driver, or `INTERPRETER`."""
    current = _recording.get()
    if current is not None:
        return current.capability
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else INTERPRETER


def launch(
    kernel: Any,
    programs: int,
    arguments: dict[str, Any],
    constants: dict[str, Any],
    *,
    num_warps: int,
    num_stages: int = 1,
    max_registers: int | None = None,
) -> None:
    """Run `programs` instances of a kernel on the current stream of its tensors' device; none for 0."""
    call = Launch(kernel, programs, arguments, constants, num_warps, num_stages, max_registers)
    current = _recording.get()
    if programs == 0:
        return
    if current is not None:
        current.launches.append(call)
        return
    device = next(a.device for a in arguments.values() if isinstance(a, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(programs,)](**arguments, **constants, **call.options())


def is_channels_last(x: Tensor) -> bool:
    """Whether the map lies channels_last and cannot be read as contiguous."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def dense(x: Tensor) -> Tensor:
    """The map as it lies when it is contiguous or channels_last; a contiguous copy of any other strides."""
    return x if is_channels_last(x) else x.contiguous()


def dense_like(t: Tensor, x: Tensor) -> Tensor:
    """A map in the layout of another, copied where it lies differently: gradients come in any layout."""
    return t.contiguous(memory_format=torch.channels_last if is_channels_last(x) else torch.contiguous_format)


def new_map(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    """Uninitialised (B, channels, height, width) in x's dtype and layout."""
    return torch.empty(
        (x.shape[0], channels, height, width),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last if is_channels_last(x) else torch.contiguous_format,
    )


def position_arguments(x: Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
    """L of a map as kernels take it: how many times `L_STEP`, a power of two known at compile time, up to 16.

    The step tells the compiler how the rows of a contiguous map are aligned: it can load 16 bytes at once.
    """
    positions = x.shape[2] * x.shape[3]
    step = min(positions & -positions, 16)
    constants = {
        "L_STEP": step,
        "CHANNELS_LAST": is_channels_last(x),
        "WIDE": x.shape[1] * positions >= WIDE_FROM,
    }
    return {"L_steps": positions // step}, constants


def allow_tf32() -> bool:
    """Whether torch lets products of float32 round their factors to TF32."""
    return torch.backends.cuda.matmul.allow_tf32
