"""Depthwise convolution with a dynamic ReLU in its epilogue: for inference, where no norm stands between the two."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from mf_kernels import _checks, _registry
from mf_kernels.ops import _library
from mf_kernels.ops.depthwise_conv2d import depthwise_conv2d
from mf_kernels.ops.dynamic_relu import dynamic_relu

NAME = "depthwise_dynamic_relu"


def depthwise_dynamic_relu(x: Tensor, weight: Tensor, bias: Tensor | None, theta: Tensor, *, stride: int = 1) -> Tensor:
    """dynamic_relu(depthwise_conv2d(x, weight, bias, activation="identity"), theta), the map written once.

    ========  ============================================  ====================================================
    argument  shape                                         dtype and layout
    ========  ============================================  ====================================================
    x         (B, C, H, W)                                  floating point; contiguous or channels_last, no copy
    weight    (C*mult, 1, K, K), K of 3 or 5                x's dtype
    bias      (C*mult,) or None                             x's dtype
    theta     (B, 2*C*mult), before the hard sigmoid        x's dtype
    returns   (B, C*mult, ceil(H/stride), ceil(W/stride))   x's dtype and layout
    ========  ============================================  ====================================================

    One kernel on CPU when no gradient is needed, else the two operators in turn; differentiable through them.
    Raises ValueError (shape, device, stride) or TypeError (dtype), naming the argument. Source: as theirs; with running
    statistics folded into weight and bias this is the convolution, BatchNorm and activation of Mobile-Former's blocks.
    """
    if has_torch_function_unary(x):  # a tracer's stand-in, or a tensor of somebody's class
        return handle_torch_function(depthwise_dynamic_relu, (x,), x, weight, bias, theta, stride=stride)
    _checks.feature_map(NAME, x)
    fits = x.is_cpu and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    fits = fits and x.dtype != torch.float16 and not _registry.helper_missing(NAME, "cpu")
    if not fits:
        x, weight, theta = _checks.autocast(x, weight, theta)
        bias = None if bias is None else _checks.autocast(x, bias)[1]
    _checks.depthwise(NAME, x, weight, bias, stride, "identity")
    _checks.companion(NAME, "theta", theta, x, (x.shape[0], 2 * weight.shape[0]), "(B, 2*C*mult)")
    if not fits:
        y = depthwise_conv2d(x, weight, bias, stride=stride, activation="identity")
        return dynamic_relu(y, theta)
    return _FORWARD["native"](x, weight, bias, theta, stride)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, theta: Tensor, stride: int) -> Tensor:
    height, width = ((side - 1) // stride + 1 for side in x.shape[2:])
    return _library.empty_map(x, weight.shape[0], height, width)


_FORWARD = _library.define(NAME, "(Tensor x, Tensor weight, Tensor? bias, Tensor theta, int stride) -> Tensor", _fake)
