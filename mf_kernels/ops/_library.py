"""What every operator's registration shares: one schema for each backend, and the refusal of a second derivative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mf_kernels import _registry, _triton

Overloads = dict[str, Callable[..., Any]]
DEFINED: list[str] = []  # every name that was declared


def define(name: str, signature: str, fake: Callable[..., Any] | Overloads) -> Overloads:
    """Declare `mf_kernels::<name>.native` and `.triton`, with one shape function or one for each.

    Libraries fill them when they are loaded. Declared here and not in C++, an operator exists (for export, compile and
    tests) with no compiler and no GPU.
    """
    DEFINED.append(name)
    overloads: Overloads = {}
    for backend in ("native", "triton"):
        qualified = f"mf_kernels::{name}.{backend}"
        torch.library.define(qualified, signature, tags=torch.Tag.pt2_compliant_tag)
        torch.library.register_fake(qualified, fake[backend] if isinstance(fake, dict) else fake)
        if backend == "triton" and _triton.has_kernels(name.removesuffix("_fwd").removesuffix("_bwd")):
            _triton.register(name, _registry.count_served)
        overloads[backend] = getattr(getattr(torch.ops.mf_kernels, name), backend)
    return overloads


def empty_map(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    """A map as the kernels allocate it: channels_last where x is that and not contiguous too, else contiguous."""
    channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.empty(
        (x.shape[0], channels, height, width),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )


def serves_in_place(op: str, x: Tensor) -> bool:
    """Whether a CPU kernel may write its result over x: no gradient wanted, a layout and dtype that it takes as is."""
    return (
        x.is_cpu
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and x.dtype != torch.float16
        and x.dim() == 4
        and not _registry.helper_missing(op, "cpu")  # before the layout, of which vmap allows no question
        and (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last))
    )


class _RefuseDoubleBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: str, source: Tensor, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.op = op
        return tuple(g.view_as(g) if g is not None else None for g in gradients)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(
            f"mf_kernels.{ctx.op}: the fused kernels have no second derivative (double backward); "
            'use mf_kernels.use_backend("reference") where it is needed'
        )


def first_order_only(op: str, d_output: Tensor, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The gradients, tied to a node that raises by name if somebody differentiates them again.

    `once_differentiable` would raise too, but with a message that names neither the operator nor the way out.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return gradients
    return _RefuseDoubleBackward.apply(op, d_output, *gradients)
