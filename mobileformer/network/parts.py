"""One rule for every fused way: a part is used unseen only while it is what it was built as; else it is called.

A fused operator reads the parameters of layers instead of calling them. That gives their numbers as long as nothing
which it does not read has another say. Who has one: another class (an adapter, a parametrisation), a method of the
instance or of the class put in the place of `forward` (as wrappers do), a hook, a setting (bias, stride, padding,
dilation, groups, eps), a tensor subclass as a weight (quantisation). The functions here say whether any of them has.
They look each time, and keep nothing that could go stale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

__all__ = ["are_plain", "held", "is_untouched", "own_method", "part", "watched_globally"]

_Class = TypeVar("_Class", bound=type[nn.Module])

_PLAIN = frozenset((nn.Parameter, Tensor, nn.Buffer))
_OWN = ("forward", "_call_impl", "_compiled_call_impl")  # what an instance's call runs, where it has its own
_FORWARDS: dict[type, Callable[..., Any]] = {
    kind: kind.forward
    for kind in (nn.Conv2d, nn.Linear, nn.LayerNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)
}
_CALL = nn.Module.__call__
_CONVOLUTION = nn.Conv2d._conv_forward


def part(kind: _Class) -> _Class:
    """A class whose parts may be used unseen: its `forward` is remembered, so that one set later is noticed."""
    _FORWARDS[kind] = kind.forward
    return kind


def is_untouched(module: nn.Module | None, *classes: type[nn.Module]) -> bool:
    """Whether calling a module runs what its class, one of `classes`, was written to run, and nothing else."""
    if module is None:
        return False
    kind, own = module.__class__, module.__dict__
    return (
        kind in classes
        and _FORWARDS.get(kind) is kind.forward
        and "forward" not in own
        and "_compiled_call_impl" not in own
        and "_call_impl" not in own
        and not (
            module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        )
    )


def watched_globally() -> bool:
    """Whether somebody watches the calls of all modules: by torch's global hooks, or by a call of their own."""
    if (
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    ):
        return True
    if torch.compiler.is_compiling():  # tracers put their own call there while they trace
        return False
    return nn.Module.__call__ is not _CALL or nn.Conv2d._conv_forward is not _CONVOLUTION


def held(module: nn.Module, *names: str) -> list[Tensor | None]:
    """Parameters and buffers by name as the module holds them; None for one that is missing or made by other means."""
    parameters, buffers = module._parameters, module._buffers
    return [parameters.get(name) if name in parameters else buffers.get(name) for name in names]


def are_plain(tensors: Iterable[Tensor | None]) -> bool:
    """Whether all are there, of one dtype and of torch's own kind: a subclass computes as it likes."""
    dtype = None
    for tensor in tensors:
        if tensor is None or not (type(tensor) in _PLAIN or _of_a_tracer(tensor)):
            return False
        if tensor.dtype is not dtype:
            if dtype is not None:
                return False
            dtype = tensor.dtype
    return True


def own_method(module: nn.Module) -> str | None:
    """The name of a method that an instance has in the place of its class's, or whose class was given another."""
    kind = type(module)
    for name in vars(module):
        if name != "extra_repr" and callable(getattr(kind, name, None)):  # which only says, as torchao has it say more
            return name
    return "forward" if kind in _FORWARDS and _FORWARDS[kind] is not kind.forward else None


def _of_a_tracer(tensor: Tensor) -> bool:
    """torch.export's and torch.compile's stand-ins compute what the tensor would."""
    return type(tensor).__module__.startswith("torch._subclasses.")
