"""What blocks are made of besides convolutions: dynamic ReLU, the two bridges, the Former, stochastic depth.

Legend: B batch, C channels, H W height and width, L = H*W, M tokens, D token width, N heads, E = C/N head
width. Names of parameters, and their order, follow the published modules one to one (`layout.py` has the
table), so that the state of an optimizer saved beside a published checkpoint stays in step too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobileformer.network.convolution import KernelModule
from mobileformer.network.parts import part

__all__ = [
    "BRIDGE_HEADS",
    "FORMER_HEADS",
    "DropPath",
    "DynamicReLU",
    "Former",
    "FormerToMobile",
    "MobileToFormer",
    "hard_sigmoid",
    "token_mix",
]

BRIDGE_HEADS = 2
FORMER_HEADS = 4


def hard_sigmoid(x: Tensor) -> Tensor:
    """clamp(x + 3, 0, 6) / 6. `F.hardsigmoid` keeps 1/6 in float32, which a float64 gradient shows."""
    return (x + 3).clamp(0, 6) / 6


def token_mix(x: Tensor, query: Tensor, size: tuple[int, int]) -> Tensor:
    """Weights of the tokens at every position, of sum 1: x (B,C,H,W), query (B,M,C) -> (B,M,*size).

    The scaled scores of Mobile-to-Former before their softmax, averaged over the heads, pooled to `size`,
    then a softmax over the tokens. Heads are channel chunks, so the average over heads is one dot product
    over all channels, divided by N.
    """
    scale = (x.shape[1] // BRIDGE_HEADS) ** -0.5 / BRIDGE_HEADS
    scores = torch.einsum("bmc,bchw->bmhw", query * scale, x)
    if scores.shape[2:] != size:
        scores = F.adaptive_avg_pool2d(scores, size)
    return scores.softmax(dim=1)


@part
class DropPath(nn.Module):
    """In training, zero a sample's update with probability `rate` and scale the others by 1 / (1 - rate)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, update: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return update
        keep = 1.0 - self.rate
        mask = update.new_empty((update.shape[0],) + (1,) * (update.ndim - 1)).bernoulli_(keep)
        return update * (mask / keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


@part
class DynamicReLU(KernelModule):
    """max(a1 x, a2 x) with slopes from the tokens: a1 = 2 theta1 in [0, 2], a2 = 2 theta2 - 1 in [-1, 1].

    theta = hsig(expand(relu(reduce(token)))), 2C values: the first C are theta1, the last C are theta2.
    One theta a sample, from token 0, shared by all positions; or, where `mix` is given, one theta a position:
    theta_i = sum over tokens j of mix_ij theta_j. The mix has sum 1, so the slopes are mixed likewise.
    """

    def __init__(self, channels: int, token_dim: int, *, use_fused: bool) -> None:
        super().__init__(use_fused)
        self.reduce = nn.Linear(token_dim, token_dim // 4)
        self.expand = nn.Linear(token_dim // 4, 2 * channels)

    def forward(self, x: Tensor, tokens: Tensor, mix: Tensor | None = None) -> Tensor:
        """x (B,C,H,W), tokens (B,M,D), mix (B,M,H,W) or None -> (B,C,H,W)."""
        if mix is None:
            return self.ops.dynamic_relu(x, self.logits(tokens[:, 0]))
        return self.ops.spatial_dynamic_relu(x, self.logits(tokens), mix)

    def logits(self, tokens: Tensor) -> Tensor:
        """(..., D) -> (..., 2C), before the hard sigmoid."""
        return self.expand(F.relu(self.reduce(tokens)))

    def theta(self, tokens: Tensor, mix: Tensor | None = None) -> Tensor:
        """The coefficients in [0, 1]: (B,2C,1,1) from token 0, or (B,2C,H,W) with `mix`."""
        if mix is None:
            return hard_sigmoid(self.logits(tokens[:, 0]))[:, :, None, None]
        return torch.einsum("bmk,bmhw->bkhw", hard_sigmoid(self.logits(tokens)), mix)


@part
class MobileToFormer(KernelModule):
    """Tokens gather from the map: LN(tokens + project(gate * attention(query(tokens), x, x))).

    The map is key and value as it is, unprojected; the gate is 2 hsig(Linear(tokens)), a factor for every
    token and channel.
    """

    def __init__(self, channels: int, token_dim: int, *, drop_path: float, use_fused: bool) -> None:
        super().__init__(use_fused)
        self.gate = nn.Linear(token_dim, channels)
        self.query = nn.Linear(token_dim, channels)
        self.project = nn.Linear(channels, token_dim)
        self.norm = nn.LayerNorm(token_dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """x (B,C,H,W), tokens (B,M,D) -> tokens (B,M,D)."""
        gathered = self.ops.mobile_to_former(x, self.query(tokens), num_heads=BRIDGE_HEADS)
        # The gate 2 hsig(t) is 1 + clamp(t, -3, 3) / 3: two operations instead of five.
        gated = torch.addcmul(gathered, gathered, self.gate(tokens).clamp(-3, 3), value=1 / 3)
        update = self.project(gated)
        return self.norm(tokens + self.drop_path(update))

    def token_mix(self, x: Tensor, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """`token_mix` with this bridge's query; tokens as they enter it."""
        return token_mix(x, self.query(tokens), size)


@part
class Former(KernelModule):
    """A transformer layer on the tokens, post-norm: attention with only the query projected, feed-forward.

    Keys and values are the raw tokens, exactly as the bridge reads the map. So the attention is the same
    operator with the tokens as a map of height 1 and width M.
    """

    def __init__(self, token_dim: int, *, drop_path: float, use_fused: bool) -> None:
        super().__init__(use_fused)
        self.ffn_expand = nn.Linear(token_dim, 2 * token_dim)
        self.ffn_project = nn.Linear(2 * token_dim, token_dim)
        self.ffn_norm = nn.LayerNorm(token_dim)
        self.query = nn.Linear(token_dim, token_dim)
        self.project = nn.Linear(token_dim, token_dim)
        self.norm = nn.LayerNorm(token_dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B,M,D) -> (B,M,D)."""
        token_map = tokens.transpose(1, 2).unsqueeze(2)
        gathered = self.ops.mobile_to_former(token_map, self.query(tokens), num_heads=FORMER_HEADS)
        tokens = self.norm(tokens + self.drop_path(self.project(gathered)))
        return self.ffn_norm(tokens + self.ffn_project(F.gelu(self.ffn_expand(tokens))))


@part
class FormerToMobile(KernelModule):
    """The map gathers from the tokens: x + attention(x, key(tokens), value(tokens)), without a norm."""

    def __init__(self, channels: int, token_dim: int, *, drop_path: float, use_fused: bool) -> None:
        super().__init__(use_fused)
        self.key = nn.Linear(token_dim, channels)
        self.value = nn.Linear(token_dim, channels)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """x (B,C,H,W), tokens (B,M,D) -> (B,C,H,W)."""
        # The update is linear in the values, so dropping those drops it, and the operator keeps its residual.
        values = self.drop_path(self.value(tokens))
        return self.ops.former_to_mobile(x, self.key(tokens), values, num_heads=BRIDGE_HEADS)
