"""BatchNorm in evaluation mode, folded into the convolution before it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import has_torch_function_unary

from mf_kernels import _checks, _registry
from mf_kernels.ops import _library

NAME = "fold_batch_norm"
VECTORS = ("norm_weight", "norm_bias", "mean", "variance")


def fold_batch_norm(
    weight: Tensor, norm_weight: Tensor, norm_bias: Tensor, mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The weight and bias of one convolution that equals convolution and BatchNorm with running statistics.

        scale[o] = norm_weight[o] / sqrt(variance[o] + eps)
        weight'[o] = weight[o] scale[o],  bias'[o] = norm_bias[o] - mean[o] scale[o]

    =================  ======================  ===============================================================
    argument           shape                   dtype
    =================  ======================  ===============================================================
    weight             (O, I, K, K)            floating point; the kernel serves float32 and float64 on CPU
    the four others    (O,)                    weight's
    returns            (O, I, K, K), (O,)      weight's
    =================  ======================  ===============================================================

    Differentiable in everything: with gradients it is these equations in PyTorch, else one kernel on CPU.

    Raises ValueError (shape, device, eps) or TypeError (dtype), naming the argument.
    """
    if has_torch_function_unary(weight):  # a tracer's stand-in: two of them, which a caller can unpack
        return _fold_in_pytorch(weight, norm_weight, norm_bias, mean, variance, eps)
    arguments = (weight, norm_weight, norm_bias, mean, variance, eps)
    _checks.epsilon(NAME, eps)
    try:
        fits = (
            not torch.is_grad_enabled()
            and weight.is_cpu
            and norm_weight.is_cpu
            and norm_bias.is_cpu
            and mean.is_cpu
            and variance.is_cpu
            and weight.dtype in (torch.float32, torch.float64)
            and weight.dtype == norm_weight.dtype == norm_bias.dtype == mean.dtype == variance.dtype
            and not _registry.helper_missing(NAME, "cpu")
        )
    except AttributeError:  # of what is no tensor, which is told below
        fits = False
    if not fits:
        _check(*arguments)
        return _fold_in_pytorch(*arguments)
    try:
        return _FORWARD["native"](*arguments)
    except RuntimeError:  # the kernel checks the same, at a tenth of the time; this has the words and the type
        _check(*arguments)
        raise


def _check(weight: Tensor, norm_weight: Tensor, norm_bias: Tensor, mean: Tensor, variance: Tensor, _: float) -> None:
    _checks.tensor(NAME, "weight", weight)
    if weight.dim() != 4:
        raise ValueError(f"{NAME}: weight: expected (O, I, K, K), got shape {tuple(weight.shape)}")
    if weight.dtype not in _checks.FLOATS:
        raise TypeError(f"{NAME}: weight: expected a floating point dtype, got {weight.dtype}")
    shape = weight.shape[:1]
    for name, vector in zip(VECTORS, (norm_weight, norm_bias, mean, variance), strict=True):
        _checks.companion(NAME, name, vector, weight, shape, "(O,)", of="weight", same=False)


def _fold_in_pytorch(
    weight: Tensor, norm_weight: Tensor, norm_bias: Tensor, mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    scale = norm_weight * torch.rsqrt(variance + eps)
    return weight * scale[:, None, None, None], norm_bias - mean * scale


def _fake(
    weight: Tensor, norm_weight: Tensor, norm_bias: Tensor, mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weight, memory_format=torch.contiguous_format), torch.empty_like(norm_bias)


_FORWARD = _library.define(
    NAME,
    "(Tensor weight, Tensor norm_weight, Tensor norm_bias, Tensor mean, Tensor variance, float eps)"
    " -> (Tensor weight_out, Tensor bias_out)",
    _fake,
)
