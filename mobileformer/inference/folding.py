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

from mobileformer.files.metadata import describe
from mobileformer.inference.folded import FoldedNetwork
from mobileformer.network.classifier import Classifier, Head, unwrap
from mobileformer.network.convolution import ConvNorm, KernelModule, channel_shuffle, convolve
from mobileformer.network.layers import BRIDGE_HEADS, FORMER_HEADS
from mobileformer.network.parts import are_plain, held, is_untouched, own_method, part

__all__ = ["arrays_of", "fold", "folded_copy", "hooked_part", "parts_of_its_own"]

_OF_A_NORM = ("weight", "bias", "running_mean", "running_var")
# What has no say in evaluation (rates, momentum), is read where it is used (eps of a BatchNorm), or changes no number.
_WITHOUT_EFFECT = frozenset(
    ("training", "use_fused", "rate", "p", "inplace", "momentum", "track_running_stats", "affine", "elementwise_affine")
)


def fold(
    model: Classifier,
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
    own = parts_of_its_own(model) or hooked_part(model)
    if own is not None:
        raise ValueError(f"model: cannot be folded: {own}")
    return FoldedNetwork(metadata, arrays_of(folded_copy(model)))


def folded_copy(model: Classifier) -> Classifier:
    """The model in float64 with `FoldedConv` where there was a `ConvNorm`, and no norm in its head.

    Parts that are not what they were built as stay, and are called. One with a tensor subclass for a weight keeps its
    dtype: what a quantised weight is in another cannot be said.
    """
    network = copy.deepcopy(model).eval().requires_grad_(False)
    _to_float64(network)
    with torch.no_grad():
        if is_untouched(network.head, Head):
            _fold_head(network.head)
        _fold_convolutions(network)
    return network


def arrays_of(network: Classifier) -> dict[str, np.ndarray]:
    """The arrays of a `FoldedNetwork`, from what `folded_copy` made, rounded to float32 here and only here."""
    return {
        name: (value * _attention_scale(name, value)).float().cpu().contiguous().numpy()
        for name, value in network.state_dict().items()
    }


def parts_of_its_own(model: Classifier) -> str | None:
    """What makes a model more than its variant, so that its parameters alone do not say what it computes; else None."""
    with torch.device("meta"):
        classes = max(model.num_classes, 1)  # a part that is missing is told as such below
        plain = Classifier.from_metadata(model, num_classes=classes, use_fused=model.use_fused)
    expected = dict(plain.named_modules())
    for name, module in model.named_modules():
        kind, told, built = type(module), name or "the model", expected.get(name)
        same = vars(kind).get("same_numbers", False) if module is model else kind is type(built)
        if built is None or not (same or kind is nn.SyncBatchNorm):
            return f"{told} is a {kind.__name__}"
        method = own_method(module)
        if method is not None:
            return f"{told} has a {method} of its own"
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.running_var is None:
            return f"{told} keeps no running statistics"
        if isinstance(module, nn.LayerNorm) and module.eps != 1e-5:
            return f"{told} has eps {module.eps:g}, expected 1e-5"
        other = _other_tensors(module, built) or (None if module is model else _other_setting(module, built))
        if other is not None:
            return f"{told} has {other}"
    return None


def _other_setting(module: nn.Module, built: nn.Module) -> str | None:
    """A setting that differs from the one a module is built with."""
    for name, value in vars(built).items():
        if name in _WITHOUT_EFFECT or name.startswith("_") or not isinstance(value, int | str | tuple):
            continue
        if getattr(module, name, None) != value:
            return f"{name} {getattr(module, name, None)!r}, expected {value!r}"
    return None


def _other_tensors(module: nn.Module, built: nn.Module) -> str | None:
    """A parameter or buffer that a module is not built with, or lacks, or holds as a tensor of another class."""
    for name in {**module._parameters, **module._buffers, **built._parameters, **built._buffers}:
        (value,), (expected,) = held(module, name), held(built, name)
        if (value is None) != (expected is None):
            return f"no {name}" if value is None else f"a {name}, expected none"
        if value is None or expected is None:
            continue
        if not are_plain((value,)):
            return f"a {type(value).__name__} for a {name}"
        if value.shape != expected.shape:
            return f"a {name} of shape {tuple(value.shape)}, expected {tuple(expected.shape)}"
    return None


def hooked_part(model: Classifier) -> str | None:
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name or 'the model'} has a hook"
    return None


@part
class FoldedConv(KernelModule):
    """activation(convolution(x) + bias), then the channel shuffle."""

    has_constant_norm = True

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

    run_folded = forward

    def folded(self) -> tuple[Tensor, Tensor]:
        """(weight, bias), as `ConvNorm.folded`."""
        return self.weight, self.bias


def _to_float64(network: nn.Module) -> None:
    for module in network.modules():
        tensors = [*module._parameters.values(), *module._buffers.values()]
        if all(tensor is None or are_plain((tensor,)) for tensor in tensors):
            module._apply(_double, recurse=False)


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _fold_convolutions(module: nn.Module) -> None:
    for name, child in module.named_children():
        if is_untouched(child, ConvNorm) and cast(ConvNorm, child).has_constant_norm:
            setattr(module, name, FoldedConv(cast(ConvNorm, child)))
        else:
            _fold_convolutions(child)


def _fold_head(head: Head) -> None:
    fc, norm = head.fc, head.norm
    plain = is_untouched(fc, nn.Linear) and is_untouched(norm, nn.BatchNorm1d, nn.SyncBatchNorm)
    if not (plain and are_plain(held(fc, "weight", "bias") + held(norm, *_OF_A_NORM))):
        return
    scale, shift = _scale_and_shift(norm)
    fc.weight.mul_(scale[:, None])
    fc.bias.mul_(scale).add_(shift)
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
