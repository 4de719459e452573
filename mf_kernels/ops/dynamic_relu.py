"""Dynamic ReLU: the larger of two lines through the origin whose slopes the tokens choose, per sample and channel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from mf_kernels import _checks, _registry, reference
from mf_kernels.ops import _library

NAME = "dynamic_relu"


def dynamic_relu(x: Tensor, theta: Tensor) -> Tensor:
    """max(a1 x, a2 x), the slopes shared by all positions of a channel.

        hsig(t) = clamp(t + 3, 0, 6) / 6
        a1[b, c] = 2 hsig(theta[b, c]) in [0, 2],  a2[b, c] = 2 hsig(theta[b, C + c]) - 1 in [-1, 1]
        y[b, c, l] = max(a1[b, c] x[b, c, l], a2[b, c] x[b, c, l])

    ========  =============  ============================================================================
    argument  shape          dtype and layout
    ========  =============  ============================================================================
    x         (B, C, H, W)   floating point; contiguous or channels_last without a copy
    theta     (B, 2C)        x's dtype; before the hard sigmoid; theta1 of all channels, then theta2
    returns   (B, C, H, W)   x's dtype and layout
    ========  =============  ============================================================================

    Differentiable once in x and theta; where the two lines meet, the gradient is shared half and half, as
    `torch.maximum` does. Under autocast both are cast to its dtype.

    Raises ValueError (shape, device) or TypeError (dtype), naming the argument.
    Source: Mobile-Former, CVPR 2022, section 3.1 with Dynamic ReLU, ECCV 2020; no intercepts, as in the published code.
    """
    if has_torch_function_unary(x):  # a tracer's stand-in, or a tensor of somebody's class
        return handle_torch_function(dynamic_relu, (x,), x, theta)
    _checks.feature_map(NAME, x)
    x, theta = _checks.autocast(x, theta)
    _checks.companion(NAME, "theta", theta, x, (x.shape[0], 2 * x.shape[1]), "(B, 2C)")
    backend = _registry.route(NAME, _checks.device_type(x), x.dtype)
    if backend == "reference":
        return reference.dynamic_relu(x, theta)
    if torch.is_grad_enabled() and (x.requires_grad or theta.requires_grad):
        return _DynamicReLU.apply(x, theta, backend)
    return _FORWARD[backend](x, theta)


def dynamic_relu_(x: Tensor, theta: Tensor) -> Tensor:
    """`dynamic_relu(x, theta)` for a caller who is done with x: x may hold the result afterwards, or anything.

    Written over x where a kernel serves, no gradient is needed and x lies contiguous or channels_last; else a new map.
    Always use the returned map. Shapes, dtypes and errors as `dynamic_relu`.
    """
    if has_torch_function_unary(x):  # a tracer's stand-in, or a tensor of somebody's class
        return handle_torch_function(dynamic_relu_, (x,), x, theta)
    if not _library.serves_in_place(NAME, x):
        return dynamic_relu(x, theta)
    _checks.feature_map(NAME, x)
    _checks.companion(NAME, "theta", theta, x, (x.shape[0], 2 * x.shape[1]), "(B, 2C)")
    _IN_PLACE["native"](x, theta)
    torch.autograd.graph.increment_version(x)  # or a gradient that needs the old x would not notice
    return x


def _forward_fake(x: Tensor, theta: Tensor) -> Tensor:
    return _library.empty_map(x, x.shape[1], x.shape[2], x.shape[3])


def _backward_fake(d_y: Tensor, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    d_x = _library.empty_map(x, x.shape[1], x.shape[2], x.shape[3])
    return d_x, torch.empty_like(theta, memory_format=torch.contiguous_format)


_FORWARD = _library.define(f"{NAME}_fwd", "(Tensor x, Tensor theta) -> Tensor", _forward_fake)
_IN_PLACE = _library.define(f"{NAME}_", "(Tensor(a!) x, Tensor theta) -> ()", lambda x, theta: None)
_BACKWARD = _library.define(
    f"{NAME}_bwd", "(Tensor d_y, Tensor x, Tensor theta) -> (Tensor d_x, Tensor d_theta)", _backward_fake
)


class _DynamicReLU(torch.autograd.Function):
    """Saves its inputs only: which line won is one multiplication away."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, theta: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(x, theta)
        ctx.backend = backend
        return _FORWARD[backend](x, theta)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        gradients = _BACKWARD[ctx.backend](d_y, *ctx.saved_tensors)
        return (*_library.first_order_only(NAME, d_y, gradients), None)
