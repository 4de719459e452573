"""How attention, layers side by side and slopes are written, for the two kinds of runtime.

Legend: B batch, C channels, H W height and width, L = H*W, M tokens, N heads, E = C/N head width, R = B*M rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobileformer.network.layers import BRIDGE_HEADS, FORMER_HEADS

__all__ = ["EdgeForm", "Form", "linear"]


class Form:
    """Four dimensions, (B,N,.,.), layers stacked, a softmax spelled out: for ONNX Runtime, OpenVINO and Inductor."""

    def map_heads(self, x: Tensor) -> Tensor:
        """(B,C,H,W) -> (B,N,E,L)."""
        return x.reshape(-1, BRIDGE_HEADS, x.shape[1] // BRIDGE_HEADS, x.shape[2] * x.shape[3])

    def token_heads(self, rows: Tensor, num_tokens: int, num_heads: int) -> Tensor:
        """(R,C) -> (B,N,M,E)."""
        return rows.reshape(-1, num_tokens, num_heads, rows.shape[1] // num_heads).transpose(1, 2)

    def for_batch(self, heads: Tensor, batch: int) -> Tensor:
        """Token heads of one sample for a batch of them: (1,N,M,E), which multiplies along a whole batch."""
        return heads

    def first_token(self, heads: Tensor) -> Tensor:
        """(B,N,M,E) -> (B,N,1,E)."""
        return heads[:, :, :1]

    def attend(self, query: Tensor, keys: Tensor) -> Tensor:
        """softmax over L of query.keys, times keys: query (B,N,M,E), keys (B,N,E,L) -> rows (R,C)."""
        weights = torch.matmul(query, keys).softmax(dim=-1)
        gathered = torch.matmul(weights, keys.transpose(-1, -2)).transpose(1, 2)
        return gathered.reshape(-1, gathered.shape[2] * gathered.shape[3])

    def attend_tokens(self, query: Tensor, tokens: Tensor) -> Tensor:
        """The same among tokens: query and tokens (B,N,M,E) -> rows (R,C)."""
        weights = torch.matmul(query, tokens.transpose(-1, -2)).softmax(dim=-1)
        gathered = torch.matmul(weights, tokens).transpose(1, 2)
        return gathered.reshape(-1, gathered.shape[2] * gathered.shape[3])

    def spread(self, flat: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """flat + softmax over M of key.flat, times value: flat (B,N,E,L), key and value (B,N,M,E) -> (B,N,E,L)."""
        weights = self.softmax_over_tokens(torch.matmul(key, flat))
        return flat + torch.matmul(value.transpose(-1, -2), weights)

    def mean_scores(self, query: Tensor, flat: Tensor, num_tokens: int) -> Tensor:
        """query.flat, averaged over the heads: (B,M,L)."""
        return torch.matmul(query, flat).mean(dim=1)

    def softmax_over_tokens(self, scores: Tensor) -> Tensor:
        """(...,M,L), over M. Spelled out: the runtimes' own is slow along any axis but the last."""
        weights = (scores - scores.amax(dim=-2, keepdim=True)).exp()
        return weights / weights.sum(dim=-2, keepdim=True)

    def beside(self, *layers: nn.Linear, relu: bool = False) -> nn.Module:
        """x (R,D) -> the output of every layer: one product, then a split."""
        return Stacked(layers, relu)

    def slopes(self, first: nn.Linear, second: nn.Linear) -> nn.Module:
        """hidden (R,D/4) -> clamp(first, -1, 1) + 1 and clamp(second, -1, 1), each (R,C,1,1)."""
        return StackedSlopes(first, second)


class EdgeForm(Form):
    """Three dimensions, heads merged with the batch, nothing to cut, softmax along the last axis: for ExecuTorch.

    This is all that its XNNPACK backend takes; elsewhere it is no faster and has a tenth more nodes.
    """

    def map_heads(self, x: Tensor) -> Tensor:
        """(B,C,H,W) -> (B*N,E,L)."""
        return x.reshape(-1, x.shape[1] // BRIDGE_HEADS, x.shape[2] * x.shape[3])

    def token_heads(self, rows: Tensor, num_tokens: int, num_heads: int) -> Tensor:
        """(R,C) -> (B*N,M,E)."""
        heads = super().token_heads(rows, num_tokens, num_heads)
        return heads.reshape(-1, num_tokens, heads.shape[3])

    def for_batch(self, heads: Tensor, batch: int) -> Tensor:
        """(N,M,E) -> (B*N,M,E)."""
        return heads.repeat(batch, 1, 1)

    def first_token(self, heads: Tensor) -> Tensor:
        """(B*N,M,E) -> (B*N,1,E)."""
        return heads[:, :1]

    def attend(self, query: Tensor, keys: Tensor) -> Tensor:
        weights = torch.bmm(query, keys).softmax(dim=-1)
        return self._rows(torch.bmm(weights, keys.transpose(1, 2)), BRIDGE_HEADS)

    def attend_tokens(self, query: Tensor, tokens: Tensor) -> Tensor:
        weights = torch.bmm(query, tokens.transpose(1, 2)).softmax(dim=-1)
        return self._rows(torch.bmm(weights, tokens), FORMER_HEADS)

    def spread(self, flat: Tensor, key: Tensor, value: Tensor) -> Tensor:
        weights = torch.bmm(flat.transpose(1, 2), key.transpose(1, 2)).softmax(dim=-1)
        return flat + torch.bmm(weights, value).transpose(1, 2)

    def mean_scores(self, query: Tensor, flat: Tensor, num_tokens: int) -> Tensor:
        return torch.bmm(query, flat).reshape(-1, BRIDGE_HEADS, num_tokens, flat.shape[2]).mean(dim=1)

    def softmax_over_tokens(self, scores: Tensor) -> Tensor:
        return scores.transpose(1, 2).softmax(dim=-1).transpose(1, 2)

    def beside(self, *layers: nn.Linear, relu: bool = False) -> nn.Module:
        return Beside(layers, relu)

    def slopes(self, first: nn.Linear, second: nn.Linear) -> nn.Module:
        return BesideSlopes(first, second)

    def _rows(self, heads: Tensor, num_heads: int) -> Tensor:
        """(B*N,M,E) -> (R,C)."""
        _, tokens, width = heads.shape
        return heads.reshape(-1, num_heads, tokens, width).transpose(1, 2).reshape(-1, num_heads * width)


class Stacked(nn.Module):
    """Layers that read the same rows, as one."""

    def __init__(self, layers: Sequence[nn.Linear], relu: bool) -> None:
        super().__init__()
        self.layer = stacked(layers)
        self.sizes = [layer.out_features for layer in layers]
        self.relu = relu

    def forward(self, x: Tensor) -> Sequence[Tensor]:
        y = self.layer(x)
        return (F.relu(y) if self.relu else y).split(self.sizes, dim=1)


class Beside(nn.Module):
    """Layers that read the same rows, one by one."""

    def __init__(self, layers: Sequence[nn.Linear], relu: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.relu = relu

    def forward(self, x: Tensor) -> Sequence[Tensor]:
        return [F.relu(layer(x)) if self.relu else layer(x) for layer in self.layers]


class StackedSlopes(nn.Module):
    """Both slopes of a dynamic ReLU from one product and one clamp."""

    def __init__(self, first: nn.Linear, second: nn.Linear) -> None:
        super().__init__()
        self.layer = stacked((first, second))
        self.register_buffer("base", torch.cat([torch.ones_like(first.bias), torch.zeros_like(second.bias)]))

    def forward(self, hidden: Tensor) -> Sequence[Tensor]:
        slopes = (self.layer(hidden).clamp(-1, 1) + self.base)[:, :, None, None]
        return slopes.chunk(2, dim=1)


class BesideSlopes(nn.Module):
    """Each slope of a dynamic ReLU by itself."""

    def __init__(self, first: nn.Linear, second: nn.Linear) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, hidden: Tensor) -> Sequence[Tensor]:
        slope1, slope2 = self.first(hidden).clamp(-1, 1) + 1, self.second(hidden).clamp(-1, 1)
        return slope1[:, :, None, None], slope2[:, :, None, None]


def stacked(layers: Sequence[nn.Linear]) -> nn.Linear:
    """One linear layer whose outputs are those of all, side by side."""
    return linear(torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers]))


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer
