"""Matrix products of the head, in inference by oneDNN: linear layers, and 1 x 1 convolutions on the rows of a map.

PyTorch multiplies float32 matrices on the CPU by MKL, which on processors that are not Intel's runs at half speed
(measured on AMD with AVX-512: 110 against 220 GFLOP/s), and its GELU is a pass of its own. oneDNN, which is in PyTorch
as well, does neither. It is reached by the operator that torch.compile uses for it.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mf_kernels.environment import is_transformed
from mobileformer.network.convolution import ConvNorm
from mobileformer.network.parts import are_plain, is_untouched, watched_globally

__all__ = ["Linear", "pointwise"]

Activation = Literal["none", "gelu"]


class Linear(nn.Linear):
    """activation(x weight^T + bias), x (...,in_features) -> (...,out_features). GELU is the exact one.

    `use_fused`: by oneDNN where it is there and no gradient is wanted, of float32 on the CPU; else, and always without,
    as nn.Linear does it.
    """

    def __init__(
        self, in_features: int, out_features: int, *, use_fused: bool, activation: Activation = "none"
    ) -> None:
        super().__init__(in_features, out_features)
        self.use_fused = use_fused
        self.activation: Activation = activation

    def forward(self, input: Tensor) -> Tensor:
        if self.use_fused and _served(input, self._parameters.get("weight"), self._parameters.get("bias")):
            return _product(input, self.weight, self.bias, self.activation)
        y = super().forward(input)
        return F.gelu(y) if self.activation == "gelu" else y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"


def pointwise(conv: ConvNorm, x: Tensor) -> Tensor:
    """conv(x) of a 1 x 1 convolution with its norm: (B,C,H,W) -> (B,C',H,W), as one product where `Linear` has one."""
    weight = cast(Tensor, conv.conv.weight)
    if not (is_untouched(conv, ConvNorm) and conv.foldable and _served(x, weight, weight)):
        return conv(x)
    weight, bias = conv.folded()
    y = _product(x.flatten(2).transpose(1, 2), weight.flatten(1), bias, "none")
    return y.transpose(1, 2).unflatten(2, x.shape[2:])


def _served(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    return (
        not torch.is_grad_enabled()
        and x.is_cpu
        and are_plain((x, weight, bias))
        and x.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0  # who counts or traces operators knows those of nn.Linear
        and not is_transformed()
        and not watched_globally()
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor, activation: Activation) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "none")
