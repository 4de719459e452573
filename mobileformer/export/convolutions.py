"""Convolutions in the forms that other runtimes are fast at, and the order of channels that each form leaves behind.

A map may lie in another order of channels than the model's: `order[p]` is the model's channel, after its shuffle, at
place p. What reads the map (weights, slopes) is put into that order once, here, so that no shuffle is left in a graph.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobileformer.inference.folding import FoldedConv
from mobileformer.network.convolution import channel_shuffle

__all__ = ["Depthwise", "Pointwise", "as_folded", "convolution", "shuffled_order"]


class Pointwise(nn.Module):
    """A 1 x 1 convolution that reads channels in the order `reads`; `order` is what it leaves.

    One with groups stays so where its groups lie side by side. Where a shuffle stands before it, it becomes dense,
    with zeros between its groups, which takes in that shuffle and its own. The variant with groups then has some of its
    convolutions dense and no shuffle, and the runtimes are faster at that than at transposing maps.
    """

    def __init__(self, source: FoldedConv, reads: Tensor) -> None:
        super().__init__()
        weight, bias, groups = source.weight, source.bias, source.groups
        shuffle = shuffled_order(len(weight), source.shuffle)
        if groups > 1 and torch.equal(reads, torch.arange(len(reads))):
            self.order = torch.argsort(shuffle)
        else:
            weight, bias, groups = _dense(weight, groups)[shuffle][:, reads], bias[shuffle], 1
            self.order = torch.arange(len(weight))
        self.conv = convolution(weight, bias, groups=groups)
        self.relu6 = source.activation == "relu6"

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,H,W) -> (B,C',H,W)."""
        y = self.conv(x)
        return F.relu6(y) if self.relu6 else y


class Depthwise(nn.Module):
    """A depthwise convolution that reads channels in the order `reads`; `order` is what it leaves.

    With several filters a channel, filter 0 of all channels comes first, then filter 1, and so on, which the runtimes
    compute with their true depthwise kernels instead of a generic grouped one, several times slower: on the map beside
    itself where the size stays, and filter by filter where the stride is 2 (the copies made are then a quarter as
    large).
    """

    def __init__(self, source: FoldedConv, reads: Tensor) -> None:
        super().__init__()
        channels = len(reads)
        filters = len(source.weight) // channels
        rows = torch.cat([reads * filters + filter for filter in range(filters)])
        place = torch.argsort(shuffled_order(len(rows), source.shuffle))
        self.order = place[rows]
        self.relu6 = source.activation == "relu6"
        weight, bias = source.weight[rows], source.bias[rows]
        self.copies = filters if source.stride == 1 else 1
        parts = 1 if source.stride == 1 else filters
        self.convs = nn.ModuleList(
            convolution(w, b, stride=source.stride, groups=len(w))
            for w, b in zip(weight.chunk(parts), bias.chunk(parts), strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,H,W) -> (B,C*filters,ceil(H/stride),ceil(W/stride))."""
        if self.copies > 1:
            x = torch.cat([x] * self.copies, dim=1)
        y = self.convs[0](x) if len(self.convs) == 1 else torch.cat([conv(x) for conv in self.convs], dim=1)
        return F.relu6(y) if self.relu6 else y


def convolution(weight: Tensor, bias: Tensor, *, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """weight (C',C/groups,K,K), bias (C'), padding K//2."""
    out, into, kernel, _ = weight.shape
    conv = nn.Conv2d(into * groups, out, kernel, stride, kernel // 2, groups=groups, dtype=weight.dtype)
    with torch.no_grad():
        conv.weight.copy_(weight)
        conv.bias.copy_(bias)  # pyright: ignore[reportOptionalMemberAccess]
    return conv


def shuffled_order(channels: int, groups: int) -> Tensor:
    """order[k]: which channel `channel_shuffle` puts at place k."""
    return channel_shuffle(torch.arange(channels)[None, :, None, None], groups).flatten()


def as_folded(module: nn.Module) -> FoldedConv:
    """What `folded_copy` has put in place of a convolution with its norm."""
    assert isinstance(module, FoldedConv)
    return module


def _dense(weight: Tensor, groups: int) -> Tensor:
    """(C',C/groups,1,1) -> (C',C,1,1), zeros outside the groups."""
    out, into = weight.shape[:2]
    blocks = weight.reshape(groups, out // groups, into)
    return torch.block_diag(*blocks)[:, :, None, None] if groups > 1 else weight.reshape(out, into, 1, 1)
