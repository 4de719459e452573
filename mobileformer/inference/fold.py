"""A model for inference only: the same blocks, with leaves that have their constants worked out beforehand.

| leaf           | becomes                                                                                          |
|----------------|--------------------------------------------------------------------------------------------------|
| ConvNorm       | one convolution: weight * scale, bias - mean * scale, with scale = norm.weight / sqrt(var + eps) |
| MobileToFormer | query and gate as one linear layer; the gate's + 3 in its bias, its 2 / 6 in the projection      |
| FormerToMobile | key and value as one linear layer                                                                |
| head.fc, .norm | one linear layer                                                                                 |

All of it is computed in float64 and rounded once.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mobileformer.inference.threads import thread_count
from mobileformer.layers import BRIDGE_HEADS, ConvNorm, FormerToMobile, KernelModule, MobileToFormer
from mobileformer.layers import channel_shuffle, convolve, token_mix

if TYPE_CHECKING:
    from mobileformer.model import Model

__all__ = ["DTYPES", "InferenceModel"]

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


class InferenceModel(nn.Module):
    """What `Model.to_inference` returns: called like the model, same logits; it cannot be trained, nor saved as weights."""

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
            _replace_leaves(network)
        self.network = network.to(dtype)
        super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B,in_chans,H,W) of any floating dtype -> logits (B,num_classes) of the same dtype."""
        if not x.is_floating_point():
            raise TypeError(f"x: expected a floating-point dtype, got {x.dtype}")
        with nullcontext() if self.threads is None else thread_count(self.threads):
            return self.network(x.to(self.network.tokens.dtype)).to(x.dtype)

    def train(self, mode: bool = True) -> InferenceModel:
        if mode:
            raise RuntimeError("an inference model cannot be trained: train the model it was made from")
        return super().train(False)


class FoldedConv(KernelModule):
    """activation(convolution(x) + bias), then the channel shuffle."""

    def __init__(self, source: ConvNorm) -> None:
        super().__init__(source.use_fused)
        weight, bias = source.folded()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.stride = source.conv.stride[0]
        self.groups = source.conv.groups
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


class FoldedMobileToFormer(KernelModule):
    """LN(tokens + project(clamp(gate, 0, 6) * attention(query, x, x))), query and gate from one linear layer."""

    def __init__(self, source: MobileToFormer) -> None:
        super().__init__(source.use_fused)
        self.query_gate = _side_by_side(source.query, source.gate)
        self.query_gate.bias[source.query.out_features :] += 3
        self.project = source.project
        self.project.weight.mul_(2 / 6)
        self.norm = source.norm

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        query, gate = self.query_gate(tokens).chunk(2, dim=-1)
        gathered = self.ops.mobile_to_former(x, query, num_heads=BRIDGE_HEADS)
        return self.norm(tokens + self.project(gathered * gate.clamp(0, 6)))

    def token_mix(self, x: Tensor, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        return token_mix(x, self.query_gate(tokens).chunk(2, dim=-1)[0], size)


class FoldedFormerToMobile(KernelModule):
    """x + attention(x, key, value), key and value from one linear layer."""

    def __init__(self, source: FormerToMobile) -> None:
        super().__init__(source.use_fused)
        self.key_value = _side_by_side(source.key, source.value)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        key, value = self.key_value(tokens).chunk(2, dim=-1)
        return self.ops.former_to_mobile(x, key, value, num_heads=BRIDGE_HEADS)


_REPLACEMENTS = {
    ConvNorm: FoldedConv,
    MobileToFormer: FoldedMobileToFormer,
    FormerToMobile: FoldedFormerToMobile,
}


def _replace_leaves(module: nn.Module) -> None:
    for name, child in module.named_children():
        replacement = _REPLACEMENTS.get(type(child))
        if replacement is None:
            _replace_leaves(child)
        else:
            setattr(module, name, replacement(child))


def _fold_head(head: nn.Module) -> None:
    norm, fc = head.norm, head.fc
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    fc.weight.mul_(scale[:, None])
    fc.bias.sub_(norm.running_mean).mul_(scale).add_(norm.bias)
    head.norm = nn.Identity()


def _side_by_side(first: nn.Linear, second: nn.Linear) -> nn.Linear:
    """One layer whose output is that of `first`, then that of `second`."""
    joint = nn.Linear(first.in_features, first.out_features + second.out_features).to(first.weight)
    joint.weight = nn.Parameter(torch.cat([first.weight, second.weight]), requires_grad=False)
    joint.bias = nn.Parameter(torch.cat([first.bias, second.bias]), requires_grad=False)
    return joint
