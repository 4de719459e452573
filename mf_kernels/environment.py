"""What surrounds a call and changes who serves it: switches of the process's environment, transforms of PyTorch."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch._C._functorch import peek_interpreter_stack  # pyright: ignore[reportMissingImports]
from torch.autograd import forward_ad

__all__ = ["constant_in_graphs", "is_exported_to_onnx", "is_transformed", "switch"]

_ON = ("1", "true", "yes", "on")
_OFF = ("", "0", "false", "no", "off")
_Function = TypeVar("_Function", bound=Callable[..., Any])


def switch(name: str) -> bool:
    """Whether a variable that is a switch is on, in any case of letters; one that is not set is off.

    Raises ValueError for a value that is neither, naming the variable.
    """
    value = os.environ.get(name, "")
    told = value.strip().lower()
    if told in _ON:
        return True
    if told in _OFF:
        return False
    raise ValueError(f"{name}: expected one of {', '.join(_ON)}, or {', '.join(_OFF[1:])} or nothing, got {value!r}")


def constant_in_graphs(function: _Function) -> _Function:
    """`torch.compiler.assume_constant_result`, which would import the whole compiler, and Triton with it."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_in_graphs
def is_transformed() -> bool:
    """Whether a transform of `torch.func` or a level of forward-mode differentiation is active.

    A kernel knows neither a tangent nor a batch of calls, and an autograd.Function that took part in every transform
    would cost each plain call more than this question. The reference takes part, since PyTorch does.

    A compiler enters the levels while it traces, and guards on those that the graph was entered with.

    So is a call that `torch.onnx` traces: its format knows no operator of ours.
    """
    return (
        peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or (torch._C._get_tracing_state() is not None and torch.onnx.is_in_onnx_export())
    )


@constant_in_graphs
def is_exported_to_onnx() -> bool:
    """Whether the graph that is being captured is for ONNX. Asked of graphs alone, where time does not matter."""
    return torch.onnx.is_in_onnx_export()
