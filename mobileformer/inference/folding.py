"""From a model to what inference needs of it: every BatchNorm worked into what stands before it.

With scale = norm.weight / sqrt(running_var + eps), a ConvNorm becomes one convolution of weight * scale and
the bias norm.bias - running_mean * scale, and the first linear layer of the classifier takes in its norm in
the same way. Computed in float64 and rounded once.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from mobileformer.inference.folded import FoldedNetwork
from mobileformer.layers import BRIDGE_HEADS, FORMER_HEADS, ConvNorm, KernelModule, channel_shuffle, convolve
from mobileformer.metadata import describe
from mobileformer.model import Head, Model, unwrap

__all__ = ["arrays_of", "fold", "folded_copy", "parts_of_its_own"]


def fold(
    model: Model,
    *,
    labels: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    input_size: int | None = None,
    crop_fraction: float | None = None,
) -> FoldedNetwork:
    """A model's network for `Engine`, on its own: arrays without any norm or scale left to apply, and what they are.

    labels: one name a class. mean, std: one number a channel, what the input was normalised with (pixels in [0, 1]);
    for 3 channels ImageNet's when not given. input_size, crop_fraction: what the weights were trained for, as in
    `Metadata`. `model` stays as it is, and later changes to it do not reach the result.

    Raises TypeError for anything but a `Model`; ValueError when there are not as many labels as classes or numbers as
    channels, for weights that are not finite, and for a model with parts of its own: an adapter in place of a layer,
    a pruned or parametrized weight, a norm without running statistics.
    """
    model = unwrap(model)
    metadata = describe(model, labels=labels, mean=mean, std=std, input_size=input_size, crop_fraction=crop_fraction)
    own = parts_of_its_own(model) or _hooked_part(model)
    if own is not None:
        raise ValueError(f"model: cannot be folded: {own}")
    return FoldedNetwork(metadata, arrays_of(folded_copy(model)))


def folded_copy(model: Model) -> Model:
    """The model in float64 with `FoldedConv` where there was a `ConvNorm`, and no norm in its head."""
    network = copy.deepcopy(model).double().eval().requires_grad_(False)
    with torch.no_grad():
        if isinstance(network.head, Head):
            _fold_head(network.head)
        _fold_convolutions(network)
    return network


def arrays_of(network: Model) -> dict[str, np.ndarray]:
    """The arrays of a `FoldedNetwork`, from what `folded_copy` made, rounded to float32 here and only here."""
    return {
        name: (value * _attention_scale(name, value)).float().cpu().contiguous().numpy()
        for name, value in network.state_dict().items()
    }


def parts_of_its_own(model: Model) -> str | None:
    """What makes a model more than its variant, so that its parameters alone do not say what it computes; else None."""
    with torch.device("meta"):
        plain = Model(
            model.variant,
            num_classes=max(model.num_classes, 1),  # a part that is missing is told as such below
            in_chans=model.in_chans,
            use_fused=model.use_fused,
            spatial_dynamic_relu=model.spatial_dynamic_relu,
        )
    expected = {name: type(module) for name, module in plain.named_modules()}
    if vars(type(model)).get("same_numbers", False):
        expected[""] = type(model)
    for name, module in model.named_modules():
        kind, told = type(module), name or "the model"
        if kind is not expected.get(name) and kind is not nn.SyncBatchNorm:
            return f"{told} is a {kind.__name__}"
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.running_var is None:
            return f"{told} keeps no running statistics"
        if isinstance(module, nn.LayerNorm) and module.eps != 1e-5:
            return f"{told} has eps {module.eps:g}, expected 1e-5"
    return None


def _hooked_part(model: Model) -> str | None:
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name or 'the model'} has a hook"
    return None


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


def _attention_scale(name: str, value: Tensor) -> float:
    """What the scores of an attention are multiplied by, for its query or its key; 1 for everything else."""
    layer = name.rpartition(".")[0]
    if layer.endswith(("mobile_to_former.query", "former_to_mobile.key")):
        return (value.shape[0] / BRIDGE_HEADS) ** -0.5
    if layer.endswith("former.query"):
        return (value.shape[0] / FORMER_HEADS) ** -0.5
    return 1.0
