"""Depthwise convolution with its activation in the same pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from mf_kernels import _checks, _registry, reference
from mf_kernels.ops import _library

NAME = "depthwise_conv2d"


def depthwise_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int = 1, activation: str = "hardswish"
) -> Tensor:
    """act(conv(x)): each channel under its own K x K filters, zero padding K // 2, channel multiplier of 1 or more.

        z[b, o, i, j] = bias[o] + sum_{u,v} weight[o, 0, u, v] x[b, o // mult, stride*i + u - K//2, stride*j + v - K//2]
        y = z clamp(z + 3, 0, 6) / 6 ("hardswish"), clamp(z, 0, 6) ("relu6") or z ("identity")

    ========  ============================================  ====================================================
    argument  shape                                         dtype and layout
    ========  ============================================  ====================================================
    x         (B, C, H, W)                                  floating point; contiguous or channels_last, no copy
    weight    (C*mult, 1, K, K), K of 3 or 5                x's dtype
    bias      (C*mult,) or None                             x's dtype
    returns   (B, C*mult, ceil(H/stride), ceil(W/stride))   x's dtype and layout
    ========  ============================================  ====================================================

    `stride` is 1 or 2. Sums are accumulated in float32 (float64 for float64 input).
    Differentiable once in x, weight and bias. Under autocast all are cast to its dtype.

    Raises ValueError (shape, device, stride, activation) or TypeError (dtype), naming the argument.
    Source: Mobile-Former, CVPR 2022, section 3.1 (its blocks); the multiplier as in the published code's down blocks.
    """
    if has_torch_function_unary(x):  # a tracer's stand-in, or a tensor of somebody's class
        return handle_torch_function(depthwise_conv2d, (x,), x, weight, bias, stride=stride, activation=activation)
    _checks.feature_map(NAME, x)
    if bias is None:
        x, weight = _checks.autocast(x, weight)
    else:
        x, weight, bias = _checks.autocast(x, weight, bias)
    _checks.depthwise(NAME, x, weight, bias, stride, activation)
    backend = _registry.route(NAME, _checks.device_type(x), x.dtype)
    if backend == "reference":
        return reference.depthwise_conv2d(x, weight, bias, stride=stride, activation=activation)
    differentiable = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    if torch.is_grad_enabled() and differentiable:
        return _DepthwiseConv2d.apply(x, weight, bias, stride, activation, backend)
    return _FORWARD[backend](x, weight, bias, stride, activation)


def _forward_fake(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, activation: str) -> Tensor:
    height, width = ((side - 1) // stride + 1 for side in x.shape[2:])
    return _library.empty_map(x, weight.shape[0], height, width)


def _backward_fake(
    d_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    d_x = _library.empty_map(x, x.shape[1], x.shape[2], x.shape[3])
    d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    return d_x, d_weight, weight.new_empty(weight.shape[0])


_FORWARD = _library.define(
    f"{NAME}_fwd",
    "(Tensor x, Tensor weight, Tensor? bias, int stride, str activation) -> Tensor",
    _forward_fake,
)
_BACKWARD = _library.define(
    f"{NAME}_bwd",
    "(Tensor d_y, Tensor x, Tensor weight, Tensor? bias, int stride, str activation)"
    " -> (Tensor d_x, Tensor d_weight, Tensor d_bias)",
    _backward_fake,
)


class _DepthwiseConv2d(torch.autograd.Function):
    """Saves its inputs only; backward redoes the convolution where the activation's slope depends on it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, activation: str, backend: str
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.stride, ctx.activation, ctx.backend = stride, activation, backend
        return _FORWARD[backend](x, weight, bias, stride, activation)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        d_x, d_weight, d_bias = _BACKWARD[ctx.backend](d_y, x, weight, bias, ctx.stride, ctx.activation)
        gradients = (d_x, d_weight, d_bias if bias is not None else None)
        return (*_library.first_order_only(NAME, d_y, gradients), None, None, None)
