"""BatchNorm with the statistics of the batch and the activation behind it: for training, where no norm is folded."""

from __future__ import annotations

import numbers
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from mf_kernels import _checks, _registry
from mf_kernels.ops import _library
from mf_kernels.ops.dynamic_relu import dynamic_relu

NAME = "batch_norm_activation"
ACTIVATIONS = ("identity", "relu6")
VECTORS = ("weight", "bias", "running_mean", "running_variance")


def batch_norm_activation(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_variance: Tensor,
    *,
    theta: Tensor | None = None,
    activation: str = "identity",
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """activation(BatchNorm(x)) in training, or dynamic_relu(BatchNorm(x), theta); updates the running statistics.

        mean[c], variance[c]: of the N = B*H*W values of channel c, the variance divided by N
        y[b, c, l] = (x[b, c, l] - mean[c]) / sqrt(variance[c] + eps) * weight[c] + bias[c]
        running_mean += momentum (mean - running_mean)
        running_variance += momentum (variance N / (N - 1) - running_variance)

    ================  ========================  ==============================================================
    argument          shape                     dtype and layout
    ================  ========================  ==============================================================
    x                 (B, C, H, W)              floating point; contiguous or channels_last without a copy
    weight, bias      (C,)                      floating point
    running_mean      (C,), written to          floating point
    running_variance  (C,), written to          floating point
    theta             (B, 2C) or None           x's dtype; before the hard sigmoid, as `dynamic_relu` takes it
    returns           (B, C, H, W)              x's dtype and layout
    ================  ========================  ==============================================================

    `activation` is "identity" or "relu6"; with theta, "identity". One kernel on CPU in float32 and float64, which
    keeps no normalized map for backward; elsewhere, under autocast and under `torch.compile` (which joins them
    itself) it is the operators in turn. Differentiable once in x, weight, bias and theta.

    Raises ValueError (shape, device, activation, eps, one value a channel) or TypeError (dtype), naming the argument,
    before anything is written.
    Source: Batch Normalization, ICML 2015; the activations as in Mobile-Former, CVPR 2022.
    """
    if has_torch_function_unary(x):  # a tracer's stand-in, or a tensor of somebody's class
        return handle_torch_function(
            batch_norm_activation,
            (x,),
            x,
            weight,
            bias,
            running_mean,
            running_variance,
            theta=theta,
            activation=activation,
            momentum=momentum,
            eps=eps,
        )
    _checks.feature_map(NAME, x)
    known = isinstance(activation, str) and activation in ACTIVATIONS
    if not known or (theta is not None and activation != "identity"):
        raise ValueError(
            f"{NAME}: activation: expected identity with theta, else one of {ACTIVATIONS}, got {activation!r}"
        )
    vectors = (weight, bias, running_mean, running_variance)
    for name, vector in zip(VECTORS, vectors, strict=True):
        _checks.companion(NAME, name, vector, x, (x.shape[1],), "(C,)", same=False)
    if theta is not None:  # before the running statistics are written to
        same = not _checks.autocasts(x)
        _checks.companion(NAME, "theta", theta, x, (x.shape[0], 2 * x.shape[1]), "(B, 2C)", same=same)
    _checks.epsilon(NAME, eps)
    if isinstance(momentum, bool) or not isinstance(momentum, numbers.Real):
        raise TypeError(f"{NAME}: momentum: expected a number, got {momentum!r:.80}")
    if not _serves(x, vectors):
        y = F.batch_norm(x, running_mean, running_variance, weight, bias, True, momentum, eps)
        if theta is not None:
            return dynamic_relu(y, theta)
        return F.relu6(y) if activation == "relu6" else y
    if theta is not None:
        activation = "dynamic_relu"
    arguments = (x, weight, bias, theta, running_mean, running_variance, momentum, eps, activation)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in arguments[:4]):
        return _BatchNormActivation.apply(*arguments)
    return _FORWARD["native"](*arguments)[0]


def _serves(x: Tensor, vectors: tuple[Tensor, ...]) -> bool:
    return (
        x.is_cpu
        and x.dtype in (torch.float32, torch.float64)
        and all(vector.dtype == x.dtype and vector.is_contiguous() for vector in vectors)
        and x.numel() > x.shape[1]  # PyTorch refuses one value a channel, and takes none
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not _registry.helper_missing(NAME, "cpu")
    )


def _forward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    theta: Tensor | None,
    running_mean: Tensor,
    running_variance: Tensor,
    momentum: float,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    y = _library.empty_map(x, x.shape[1], x.shape[2], x.shape[3])
    return y, x.new_empty(x.shape[1]), x.new_empty(x.shape[1])


def _backward_fake(
    d_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    theta: Tensor | None,
    mean: Tensor,
    inverse_deviation: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channels = x.shape[1]
    d_x = _library.empty_map(x, channels, x.shape[2], x.shape[3])
    d_theta = x.new_empty(0 if theta is None else x.shape[0], 2 * channels)
    return d_x, x.new_empty(channels), x.new_empty(channels), d_theta


_FORWARD = _library.define(
    f"{NAME}_fwd",
    "(Tensor x, Tensor weight, Tensor bias, Tensor? theta, Tensor(a!) running_mean, Tensor(b!) running_variance,"
    " float momentum, float eps, str activation) -> (Tensor y, Tensor mean, Tensor inverse_deviation)",
    _forward_fake,
)
_BACKWARD = _library.define(
    f"{NAME}_bwd",
    "(Tensor d_y, Tensor x, Tensor weight, Tensor bias, Tensor? theta, Tensor mean, Tensor inverse_deviation,"
    " str activation) -> (Tensor d_x, Tensor d_weight, Tensor d_bias, Tensor d_theta)",
    _backward_fake,
)


class _BatchNormActivation(torch.autograd.Function):
    """Saves its inputs and the batch's statistics; backward normalizes again instead of keeping the map."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        theta: Tensor | None,
        running_mean: Tensor,
        running_variance: Tensor,
        momentum: float,
        eps: float,
        activation: str,
    ) -> Tensor:
        y, mean, inverse_deviation = _FORWARD["native"](
            x, weight, bias, theta, running_mean, running_variance, momentum, eps, activation
        )
        ctx.save_for_backward(x, weight, bias, theta, mean, inverse_deviation)
        ctx.activation = activation
        return y

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        d_x, d_weight, d_bias, d_theta = _BACKWARD["native"](d_y, *ctx.saved_tensors, ctx.activation)
        gradients = (d_x, d_weight, d_bias, d_theta if ctx.activation == "dynamic_relu" else None)
        return (*_library.first_order_only(NAME, d_y, gradients), None, None, None, None, None)
