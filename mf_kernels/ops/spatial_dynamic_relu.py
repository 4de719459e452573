"""Spatial dynamic ReLU: the larger of two lines through the origin, whose slopes every position mixes from tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from mf_kernels import _checks, _registry, reference
from mf_kernels.ops import _library

NAME = "spatial_dynamic_relu"


def spatial_dynamic_relu(x: Tensor, theta: Tensor, alpha: Tensor) -> Tensor:
    """max(a1 x, a2 x), the slopes those of the tokens, mixed anew at every position.

        hsig(t) = clamp(t + 3, 0, 6) / 6
        a1[b, c, l] = sum_m alpha[b, m, l] 2 hsig(theta[b, m, c])
        a2[b, c, l] = sum_m alpha[b, m, l] (2 hsig(theta[b, m, C + c]) - 1)
        y[b, c, l] = max(a1[b, c, l] x[b, c, l], a2[b, c, l] x[b, c, l])

    ========  =============  ============================================================================
    argument  shape          dtype and layout
    ========  =============  ============================================================================
    x         (B, C, H, W)   floating point; contiguous or channels_last without a copy
    theta     (B, M, 2C)     x's dtype; before the hard sigmoid; theta1 of all channels, then theta2;
                             kernels for M from 1 to 8, the reference above
    alpha     (B, M, H, W)   x's dtype; contiguous without a copy; of sum 1 over the tokens in the model,
                             taken as it is here
    returns   (B, C, H, W)   x's dtype and layout
    ========  =============  ============================================================================

    The slopes of a position are never written to memory. Sums are accumulated in float32 (float64 for float64 input).
    Differentiable once in x, theta and alpha; where the two lines meet, the gradient is shared half and half, as
    `torch.maximum` does. Under autocast all are cast to its dtype.

    Raises ValueError (shape, device) or TypeError (dtype), naming the argument.
    Source: Mobile-Former, CVPR 2022, section 3.1 with Dynamic ReLU, ECCV 2020, its spatial and channel-wise form; no
    intercepts, as in the published code.
    """
    if has_torch_function_unary(x):  # a tracer's stand-in, or a tensor of somebody's class
        return handle_torch_function(spatial_dynamic_relu, (x,), x, theta, alpha)
    _checks.feature_map(NAME, x)
    x, theta, alpha = _checks.autocast(x, theta, alpha)
    _checks.spatial_slopes(NAME, x, theta, alpha)
    backend = _registry.route(NAME, _checks.device_type(x), x.dtype, theta.shape[1])
    if backend == "reference":
        return reference.spatial_dynamic_relu(x, theta, alpha)
    if torch.is_grad_enabled() and (x.requires_grad or theta.requires_grad or alpha.requires_grad):
        return _SpatialDynamicReLU.apply(x, theta, alpha, backend)
    return _FORWARD[backend](x, theta, alpha)


def spatial_dynamic_relu_(x: Tensor, theta: Tensor, alpha: Tensor) -> Tensor:
    """`spatial_dynamic_relu(x, theta, alpha)` for a caller who is done with x: it may hold the result, or anything.

    Written over x where a kernel serves, no gradient is needed and x lies contiguous or channels_last; else a new map.
    Always use the returned map. Shapes, dtypes and errors as `spatial_dynamic_relu`.
    """
    if has_torch_function_unary(x):  # a tracer's stand-in, or a tensor of somebody's class
        return handle_torch_function(spatial_dynamic_relu_, (x,), x, theta, alpha)
    if not _library.serves_in_place(NAME, x) or theta.dim() != 3 or theta.shape[1] > _registry.MAX_TOKENS:
        return spatial_dynamic_relu(x, theta, alpha)
    _checks.feature_map(NAME, x)
    _checks.spatial_slopes(NAME, x, theta, alpha)
    _IN_PLACE["native"](x, theta, alpha)
    torch.autograd.graph.increment_version(x)  # or a gradient that needs the old x would not notice
    return x


def _forward_fake(x: Tensor, theta: Tensor, alpha: Tensor) -> Tensor:
    return _library.empty_map(x, x.shape[1], x.shape[2], x.shape[3])


def _backward_fake(d_y: Tensor, x: Tensor, theta: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    d_x = _library.empty_map(x, x.shape[1], x.shape[2], x.shape[3])
    d_theta = torch.empty_like(theta, memory_format=torch.contiguous_format)
    return d_x, d_theta, torch.empty_like(alpha, memory_format=torch.contiguous_format)


_FORWARD = _library.define(f"{NAME}_fwd", "(Tensor x, Tensor theta, Tensor alpha) -> Tensor", _forward_fake)
_IN_PLACE = _library.define(
    f"{NAME}_", "(Tensor(a!) x, Tensor theta, Tensor alpha) -> ()", lambda x, theta, alpha: None
)
_BACKWARD = _library.define(
    f"{NAME}_bwd",
    "(Tensor d_y, Tensor x, Tensor theta, Tensor alpha) -> (Tensor d_x, Tensor d_theta, Tensor d_alpha)",
    _backward_fake,
)


class _SpatialDynamicReLU(torch.autograd.Function):
    """Saves its inputs only: the slopes of a position are a few products away, and larger than the map if kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, theta: Tensor, alpha: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(x, theta, alpha)
        ctx.backend = backend
        return _FORWARD[backend](x, theta, alpha)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        gradients = _BACKWARD[ctx.backend](d_y, *ctx.saved_tensors)
        return (*_library.first_order_only(NAME, d_y, gradients), None)
