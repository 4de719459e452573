"""What the head of the end-to-end detector is made of: bridges between queries and a map, a Former, layers of the map.

Legend: B batch, C feature width, H W height and width of a map, L = H*W, Q queries, D their width, N heads of E = 32
channels. A map is (B,C,H,W); its rows (B,L,C) are a view of it, contiguous where it lies in channels_last.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mf_kernels
from mobileformer.detection.products import Linear, pointwise
from mobileformer.network.convolution import ConvNorm
from mobileformer.network.layers import hard_sigmoid

__all__ = ["HEAD_WIDTH", "HeadBlock", "Place", "Read", "State", "Up", "position_code"]

HEAD_WIDTH = 32  # channels of every head of every attention, and of the position code, which is tiled once a head
_WAVES = HEAD_WIDTH // 4
# The kernel of the bridge holds as many tokens at a time in registers, so queries go in blocks of them. One thread, 100
# queries: on a map of 32 x 32 that takes three quarters of the time of scaled_dot_product_attention, on 8 x 8 more.
_TOKENS = 8
_LARGE = 256  # positions from which on that is so


class Place(NamedTuple):
    """Where the positions of a map are. code (B or 1,C,H,W); valid (B,1,H,W) bool, None where all of them are."""

    code: Tensor
    valid: Tensor | None

    @property
    def keys(self) -> Tensor | None:
        """(B,1,1,L): the keys that attention may read."""
        return None if self.valid is None else self.valid.flatten(2).unsqueeze(1)


class State(NamedTuple):
    """What a block hands on: x (B,C,H,W), the queries' content f (B,Q,D), their position p (B,Q,D)."""

    x: Tensor
    content: Tensor
    position: Tensor


def position_code(y: Tensor, x: Tensor) -> Tensor:
    """Where a point lies, in parts of the image's height and width: y, x (...), which broadcast -> (...,32).

        [sin w_k y, cos w_k y, sin w_k x, cos w_k x],  w_k = pi 2^(4k/7),  k = 0 ... 7

    Keys are raw features and heads are chunks of channels, so each head needs both axes in its own 32 numbers.
    """
    waves = math.pi * 2 ** (torch.arange(_WAVES, dtype=y.dtype, device=y.device) * (4 / (_WAVES - 1)))
    angles = [axis.unsqueeze(-1) * waves for axis in (y, x)]
    parts = torch.broadcast_tensors(*(wave for angle in angles for wave in (angle.sin(), angle.cos())))
    return torch.cat(parts, -1)


def rows(x: Tensor) -> Tensor:
    """(B,C,H,W) -> (B,L,C)."""
    return x.flatten(2).transpose(1, 2)


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, keys: Tensor | None = None, use_fused: bool, weights: bool = False
) -> Tensor:
    """softmax(E^-0.5 query key^T) value, head by head; heads are chunks of 32 channels.

    =======  ===========  ===============================================================
    tensor   shape        meaning
    =======  ===========  ===============================================================
    query    (B,M,C)      M rows
    key      (B,L,C)      with their values
    value    (B,L,C)
    keys     (B,1,1,L)    bool: which keys count; None is all
    returns  (B,M,C)      or, with `weights`, the softmax itself averaged over heads, (B,M,L)
    =======  ===========  ===============================================================

    With `use_fused`, PyTorch's scaled_dot_product_attention, which writes no map of scores; else the equation.
    """
    q, k, v = (t.unflatten(2, (-1, HEAD_WIDTH)).transpose(1, 2) for t in (query, key, value))  # (B,N,.,E)
    if use_fused and not weights:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keys).transpose(1, 2).flatten(2)
    scores = (q @ k.transpose(-1, -2)) * HEAD_WIDTH**-0.5
    if keys is not None:
        scores = scores.masked_fill(~keys, -math.inf)
    shares = scores.softmax(dim=-1)
    return shares.mean(1) if weights else (shares @ v).transpose(1, 2).flatten(2)


class Read(nn.Module):
    """Mobile to Former: f <- LN(f + Linear(gate * attention(Linear(z), x + code, x + code))), z = f + p.

    The gate is 2 hsig(Linear(z)), a factor for every query and channel; the last read of all has none.
    """

    def __init__(self, channels: int, width: int, *, gated: bool, dropout: float, use_fused: bool) -> None:
        super().__init__()
        self.query = Linear(width, channels, use_fused=use_fused)
        self.gate = Linear(width, channels, use_fused=use_fused) if gated else None
        self.project = Linear(channels, width, use_fused=use_fused)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.use_fused = use_fused

    def forward(self, state: State, place: Place) -> Tensor:
        """-> content (B,Q,D)."""
        z = state.content + state.position
        gathered = self._gather(state.x + place.code, self.query(z), place)
        if self.gate is not None:
            gathered = gathered * (2 * hard_sigmoid(self.gate(z)))
        return self.norm(state.content + self.dropout(self.project(gathered)))

    def _gather(self, placed: Tensor, query: Tensor, place: Place) -> Tensor:
        blocks = self.use_fused and placed.is_cpu and placed[0, 0].numel() >= _LARGE and place.valid is None
        if blocks and not torch.is_grad_enabled():
            num_heads = placed.shape[1] // HEAD_WIDTH
            parts = [mf_kernels.mobile_to_former(placed, q, num_heads=num_heads) for q in query.split(_TOKENS, 1)]
            return torch.cat(parts, 1)
        keys = rows(placed)
        return attend(query, keys, keys, keys=place.keys, use_fused=self.use_fused)

    def weights(self, state: State, place: Place) -> Tensor:
        """How much each query takes from each position, averaged over heads: (B,Q,H,W), of sum 1."""
        placed = rows(state.x + place.code)
        query = self.query(state.content + state.position)
        shares = attend(query, placed, placed, keys=place.keys, use_fused=False, weights=True)
        return shares.unflatten(2, state.x.shape[2:])


class FeedForward(nn.Module):
    """LN(x + Linear(GELU(Linear(x)))), x (...,C)."""

    def __init__(self, channels: int, hidden: int, *, dropout: float, use_fused: bool) -> None:
        super().__init__()
        self.expand = Linear(channels, hidden, use_fused=use_fused, activation="gelu")
        self.contract = Linear(hidden, channels, use_fused=use_fused)
        self.norm = nn.LayerNorm(channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dropout(self.expand(x))
        return self.norm(x + self.dropout(self.contract(hidden)))


class QueryFormer(nn.Module):
    """Attention among the queries, of which only the asking side is projected, then a feed-forward net; post-norm.

    Keys are z = f + p as they are, values f as they are.
    """

    def __init__(self, width: int, hidden: int, *, dropout: float, use_fused: bool) -> None:
        super().__init__()
        self.query = Linear(width, width, use_fused=use_fused)
        self.project = Linear(width, width, use_fused=use_fused)
        self.norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, hidden, dropout=dropout, use_fused=use_fused)
        self.dropout = nn.Dropout(dropout)
        self.use_fused = use_fused

    def forward(self, content: Tensor, position: Tensor) -> Tensor:
        """(B,Q,D) each -> content (B,Q,D)."""
        z = content + position
        gathered = attend(self.query(z), z, content, use_fused=self.use_fused)
        return self.feed_forward(self.norm(content + self.dropout(self.project(gathered))))


class MapEncoder(nn.Module):
    """A transformer layer on the map, as DETR's encoder has it: positions in queries and keys, not in values."""

    def __init__(self, channels: int, *, dropout: float, use_fused: bool) -> None:
        super().__init__()
        self.query = Linear(channels, channels, use_fused=use_fused)
        self.key = Linear(channels, channels, use_fused=use_fused)
        self.value = Linear(channels, channels, use_fused=use_fused)
        self.project = Linear(channels, channels, use_fused=use_fused)
        self.norm = nn.LayerNorm(channels)
        self.feed_forward = FeedForward(channels, 8 * channels, dropout=dropout, use_fused=use_fused)
        self.dropout = nn.Dropout(dropout)
        self.use_fused = use_fused

    def forward(self, x: Tensor, place: Place) -> Tensor:
        """(B,C,H,W) -> the same shape, in channels_last."""
        flat, placed = rows(x), rows(x + place.code)
        gathered = attend(
            self.query(placed), self.key(placed), self.value(flat), keys=place.keys, use_fused=self.use_fused
        )
        flat = self.feed_forward(self.norm(flat + self.dropout(self.project(gathered))))
        return flat.transpose(1, 2).unflatten(2, x.shape[2:])


class MapBottleneck(nn.Module):
    """x + [depthwise 3 x 3 to four times the channels, ReLU6, pointwise back], each convolution with its norm."""

    def __init__(self, channels: int, *, use_fused: bool) -> None:
        super().__init__()
        hidden = 4 * channels
        self.expand = ConvNorm(channels, hidden, 3, groups=channels, activation="relu6", use_fused=use_fused)
        self.contract = ConvNorm(hidden, channels, 1, use_fused=use_fused)

    def forward(self, x: Tensor, place: Place) -> Tensor:
        """(B,C,H,W) -> (B,C,H,W)."""
        return x + pointwise(self.contract, self.expand(x))


class Write(nn.Module):
    """Former to Mobile: x + attention(x + code, Linear(z), Linear(f)), without a norm."""

    def __init__(self, channels: int, width: int, *, dropout: float, use_fused: bool) -> None:
        super().__init__()
        self.key = Linear(width, channels, use_fused=use_fused)
        self.value = Linear(width, channels, use_fused=use_fused)
        self.dropout = nn.Dropout(dropout)
        self.use_fused = use_fused

    def forward(self, x: Tensor, content: Tensor, position: Tensor, place: Place) -> Tensor:
        """(B,C,H,W), (B,Q,D) twice -> (B,C,H,W)."""
        placed = rows(x + place.code)
        gathered = attend(placed, self.key(content + position), self.value(content), use_fused=self.use_fused)
        return x + self.dropout(gathered).transpose(1, 2).unflatten(2, x.shape[2:])


class HeadBlock(nn.Module):
    """Read, Former, the map's own layer, write, and the position that follows the new content.

    `encodes`: the map's layer is `MapEncoder` (M-F+), else `MapBottleneck` (M-F-). `adapts`: p <- p + g(f), with
    g = Linear, ReLU, Linear; the last block has none.
    """

    def __init__(
        self, channels: int, width: int, hidden: int, *, encodes: bool, adapts: bool, dropout: float, use_fused: bool
    ) -> None:
        super().__init__()
        self.read = Read(channels, width, gated=True, dropout=dropout, use_fused=use_fused)
        self.former = QueryFormer(width, hidden, dropout=dropout, use_fused=use_fused)
        self.mobile = (
            MapEncoder(channels, dropout=dropout, use_fused=use_fused)
            if encodes
            else MapBottleneck(channels, use_fused=use_fused)
        )
        self.write = Write(channels, width, dropout=dropout, use_fused=use_fused)
        self.adapt = (
            nn.Sequential(
                Linear(width, width, use_fused=use_fused), nn.ReLU(), Linear(width, width, use_fused=use_fused)
            )
            if adapts
            else None
        )

    def forward(self, state: State, place: Place) -> State:
        position = state.position
        content = self.former(self.read(state, place), position)
        x = self.write(self.mobile(state.x, place), content, position, place)
        if self.adapt is not None:
            position = position + self.adapt(content)
        return State(x, content, position)


class Up(nn.Module):
    """To the next finer map: bilinear to exactly its size, depthwise 3 x 3, pointwise, each with its norm."""

    def __init__(self, channels: int, *, use_fused: bool) -> None:
        super().__init__()
        self.depthwise = ConvNorm(channels, channels, 3, groups=channels, use_fused=use_fused)
        self.pointwise = ConvNorm(channels, channels, 1, use_fused=use_fused)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """(B,C,h,w) -> (B,C,*size)."""
        return pointwise(self.pointwise, self.depthwise(F.interpolate(x, size, mode="bilinear", align_corners=False)))
