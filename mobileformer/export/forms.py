"""How attention and the cutting of tensors are written, for the two kinds of runtime.

Legend: B batch, C channels, H W height and width, L = H*W, M tokens, N heads, E = C/N head width, R = B*M rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from mobileformer.layers import BRIDGE_HEADS, FORMER_HEADS

__all__ = ["EdgeForm", "Form"]


class Form:
    """Four dimensions, (B,N,.,.), and a softmax spelled out: for ONNX Runtime, OpenVINO and Inductor."""

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

    def split(self, x: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
        """Along dimension 1."""
        return x.split(list(sizes), dim=1)


class EdgeForm(Form):
    """Three dimensions, heads merged with the batch, slices, softmax along the last axis: for ExecuTorch.

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

    def split(self, x: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
        ends = list(accumulate(sizes))
        return [x[:, end - size : end] for size, end in zip(sizes, ends, strict=True)]

    def _rows(self, heads: Tensor, num_heads: int) -> Tensor:
        """(B*N,M,E) -> (R,C)."""
        _, tokens, width = heads.shape
        return heads.reshape(-1, num_heads, tokens, width).transpose(1, 2).reshape(-1, num_heads * width)
