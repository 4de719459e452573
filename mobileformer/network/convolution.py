"""Convolution with its norm, as one where the norm is constant; the base of every part that runs on an operator.

Legend: B batch, C channels, H W height and width, K kernel side.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

import mf_kernels
from mf_kernels import reference
from mobileformer.network.parts import are_plain, held, is_untouched, part, watched_globally

__all__ = ["ConvNorm", "KernelModule", "channel_shuffle", "convolve"]

ACTIVATIONS = ("identity", "relu6")


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """out[:, j * groups + i] = x[:, i * (C / groups) + j]; x (B,C,H,W)."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


class KernelModule(nn.Module):
    """A module whose heavy part is one of the operators.

    The operators are looked up per call rather than stored: a Python module can be neither copied nor
    pickled.
    """

    def __init__(self, use_fused: bool) -> None:
        super().__init__()
        self.use_fused = use_fused

    @property
    def ops(self) -> ModuleType:
        return mf_kernels if self.use_fused else reference


def convolve(
    ops: ModuleType,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    stride: int,
    groups: int,
    activation: str,
    channels: int | None = None,
) -> Tensor:
    """activation(convolution(x) + bias), padding K//2; one operator where the convolution is depthwise.

    x (B,C,H,W), weight (C',C/groups,K,K), bias (C') -> (B,C',ceil(H/stride),ceil(W/stride)).
    `channels` is C where the caller knows it: a symbolic tracer's x has no shape to compare.
    """
    if groups > 1 and groups == (x.shape[1] if channels is None else channels):
        return ops.depthwise_conv2d(x, weight, bias, stride=stride, activation=activation)
    y = F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2, groups=groups)
    return F.relu6(y, inplace=not torch.is_grad_enabled()) if activation == "relu6" else y


@part
class ConvNorm(KernelModule):
    """activation(BatchNorm(convolution(x))), then a channel shuffle where `shuffle` > 1; no bias.

    x (B,C,H,W) -> (B,C',ceil(H/stride),ceil(W/stride)).
    With `use_fused`, the running statistics of evaluation mode go into the convolution: weight * scale and
    one bias, which saves a pass over the map and stays differentiable in every parameter.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        groups: int = 1,
        activation: Literal["identity", "relu6"] = "identity",
        shuffle: int = 1,
        use_fused: bool,
    ) -> None:
        super().__init__(use_fused)
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=False
        )
        self.norm = nn.BatchNorm2d(out_channels)
        self.activation = activation
        self.shuffle = shuffle
        self._built = _settings(self.conv)
        nn.init.normal_(self.conv.weight, std=math.sqrt(2.0 / (kernel_size**2 * out_channels)))

    def forward(self, x: Tensor, theta: Tensor | None = None) -> Tensor:
        """With `theta` (B,2C'), for which see `joins_relu`, a dynamic ReLU takes the activation's place."""
        if self.foldable:
            return self.run_folded(x)
        conv = self.conv
        operator = self.use_fused and self._conv_is_plain and not watched_globally()
        y = self._convolve(x, conv.weight, None, "identity") if operator else conv(x)
        if self._joins_activation:
            y = self._normalize(y, theta)
        else:
            y = self.norm(y)
            y = F.relu6(y) if self.activation == "relu6" else y
        return channel_shuffle(y, self.shuffle) if self.shuffle > 1 else y

    def run_folded(self, x: Tensor) -> Tensor:
        """`forward` for a caller who has asked `foldable`, which is not asked a second time."""
        y = self._convolve(x, *self.folded(), self.activation)
        return channel_shuffle(y, self.shuffle) if self.shuffle > 1 else y

    @property
    def joins_relu(self) -> bool:
        """Whether this is training, fused, and the dynamic ReLU behind it may be given as `theta`."""
        return self.shuffle == 1 and self._joins_activation

    @property
    def _joins_activation(self) -> bool:
        if isinstance(
            getattr(self.norm, "weight", None), Proxy
        ):  # a tracer's graph calls the norm, which counts batches
            return False
        norm = self.norm
        if not (self.use_fused and norm.training and is_untouched(norm, nn.BatchNorm2d)):
            return False
        tensors = held(norm, "weight", "bias", "running_mean", "running_var")
        return (
            norm.track_running_stats
            and norm.momentum is not None
            and norm.num_batches_tracked is not None
            and are_plain(tensors)
            # float64 is for comparing with the published numbers, and those carry PyTorch's own rounding of the norm
            and norm.weight.dtype != torch.float64
            and self.activation in ACTIVATIONS
            and not watched_globally()
        )

    def _normalize(self, y: Tensor, theta: Tensor | None) -> Tensor:
        """What calling the norm in training does, and the activation."""
        norm = self.norm
        cast(Tensor, norm.num_batches_tracked).add_(1)
        return mf_kernels.batch_norm_activation(
            y,
            norm.weight,
            norm.bias,
            cast(Tensor, norm.running_mean),
            cast(Tensor, norm.running_var),
            theta=theta,
            activation=self.activation,
            momentum=cast(float, norm.momentum),
            eps=norm.eps,
        )

    @property
    def foldable(self) -> bool:
        """Whether the two are run as one: fused, and `has_constant_norm`."""
        return self.use_fused and self.has_constant_norm and not watched_globally()

    @property
    def has_constant_norm(self) -> bool:
        """Whether the two can be one: a norm with running statistics in use, and both parts what they were built as."""
        norm = self._modules["norm"]
        return (
            is_untouched(norm, nn.BatchNorm2d, nn.SyncBatchNorm)
            and not cast(nn.Module, norm).training
            and self._conv_is_plain
            and are_plain(self._tensors())
            and self.activation in ACTIVATIONS
        )

    @property
    def _conv_is_plain(self) -> bool:
        """Whether the convolution is the one that was built, so that its weight says all of it."""
        conv = self._modules["conv"]
        return (
            is_untouched(conv, nn.Conv2d)
            and _settings(cast(nn.Conv2d, conv)) == self._built
            and are_plain(held(cast(nn.Conv2d, conv), "weight"))
        )

    @property
    def stride(self) -> int:
        """Of the convolution, in both directions."""
        return self._built[0][0]

    @property
    def groups(self) -> int:
        """Of the convolution."""
        return self._built[3]

    def _tensors(self) -> list[Tensor | None]:
        """What `folded` reads, without `nn.Module.__getattr__`, which is slow."""
        conv, norm = cast(nn.Conv2d, self._modules["conv"]), cast(nn.BatchNorm2d, self._modules["norm"])
        scales, statistics = norm._parameters, norm._buffers
        return [
            conv._parameters.get("weight"),
            scales.get("weight"),
            scales.get("bias"),
            statistics.get("running_mean"),
            statistics.get("running_var"),
        ]

    def folded(self) -> tuple[Tensor, Tensor]:
        """(weight, bias) of the one convolution that this is with its running statistics."""
        weight, scale, shift, mean, variance = cast(list[Tensor], self._tensors())
        norm = cast(nn.BatchNorm2d, self._modules["norm"])
        return mf_kernels.fold_batch_norm(weight, scale, shift, mean, variance, norm.eps)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        return convolve(
            self.ops,
            x,
            weight,
            bias,
            stride=self.stride,
            groups=self.groups,
            activation=activation,
            channels=cast(nn.Conv2d, self._modules["conv"]).in_channels,
        )

    def extra_repr(self) -> str:
        return f"activation={self.activation}, shuffle={self.shuffle}"


def _settings(conv: nn.Conv2d) -> tuple[Any, ...]:
    """All that a convolution does besides its weight's numbers."""
    weight, bias = conv._parameters.get("weight"), conv._parameters.get("bias")
    shape = None if weight is None else weight.shape
    return conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode, shape, bias is None
