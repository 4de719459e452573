"""A model for inference only: the same blocks, with every BatchNorm worked into what stands before it.

With scale = norm.weight / sqrt(running_var + eps), a ConvNorm becomes one convolution of weight * scale and
the bias norm.bias - running_mean * scale, and the first linear layer of the classifier takes in its norm in
the same way. Computed in float64 and rounded once.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from mobileformer.inference.threads import thread_count
from mobileformer.layers import ConvNorm, KernelModule, channel_shuffle, convolve

if TYPE_CHECKING:
    from mobileformer.model import Head, Model

__all__ = ["DTYPES", "InferenceModel"]

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


class InferenceModel(nn.Module):
    """What `Model.to_inference` returns: called like the model, same logits; neither trained nor saved."""

    def __init__(self, model: Model, *, dtype: torch.dtype, threads: int | None) -> None:
        super().__init__()
        if dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(map(str, DTYPES))}, got {dtype!r}")
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
            raise ValueError(f"threads: expected an integer of at least 1, or None, got {threads!r}")
        self.threads = threads
        network = copy.deepcopy(model).double().eval().requires_grad_(False)
        with torch.no_grad():
            _fold_head(network.head)
            _fold_convolutions(network)
        self.network = network.to(dtype)
        super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B,in_chans,H,W) of any floating dtype -> logits (B,num_classes) of the same dtype."""
        if not x.is_floating_point():
            raise TypeError(f"x: expected a floating-point dtype, got {x.dtype}")
        threads = nullcontext() if self.threads is None else thread_count(self.threads)
        # Nothing here needs a gradient but the input may, for a saliency map say; the fastest operators come
        # without.
        gradient = nullcontext() if x.requires_grad else torch.no_grad()
        with threads, gradient:
            return self.network(x.to(self.network.tokens.dtype)).to(x.dtype)

    def train(self, mode: bool = True) -> InferenceModel:
        if mode:
            raise RuntimeError("an inference model cannot be trained: train the model it was made from")
        return super().train(False)


class FoldedConv(KernelModule):
    """activation(convolution(x) + bias), then the channel shuffle."""

    foldable = True

    def __init__(self, source: ConvNorm) -> None:
        super().__init__(source.use_fused)
        scale, shift = _scale_and_shift(source.norm)
        self.weight = nn.Parameter(source.conv.weight * scale[:, None, None, None], requires_grad=False)
        self.bias = nn.Parameter(shift, requires_grad=False)
        self.stride = source.stride
        self.groups = source.groups
        self.activation = source.activation
        self.shuffle = source.shuffle

    def forward(self, x: Tensor) -> Tensor:
        y = convolve(
            self.ops,
            x,
            self.weight,
            self.bias,
            stride=self.stride,
            groups=self.groups,
            activation=self.activation,
        )
        return channel_shuffle(y, self.shuffle) if self.shuffle > 1 else y

    def folded(self) -> tuple[Tensor, Tensor]:
        """(weight, bias), as `ConvNorm.folded`."""
        return self.weight, self.bias


def _fold_convolutions(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, ConvNorm):
            setattr(module, name, FoldedConv(child))
        else:
            _fold_convolutions(child)


def _fold_head(head: Head) -> None:
    scale, shift = _scale_and_shift(head.norm)
    head.fc.weight.mul_(scale[:, None])
    head.fc.bias.mul_(scale).add_(shift)
    head.register_module("norm", nn.Identity())


def _scale_and_shift(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """What a BatchNorm does to a channel with its running statistics: times the first, plus the second."""
    mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    scale = norm.weight * torch.rsqrt(variance + norm.eps)
    return scale, norm.bias - mean * scale
