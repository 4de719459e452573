"""The operators as equations in plain PyTorch: the specification of every kernel here, and its fallback.

Legend: B batch, C channels, H W height and width, L = H*W positions, M tokens, N heads, E = C/N head width,
K kernel side.
Heads are contiguous channel chunks: head n owns channels n*E ... (n+1)*E - 1. The scale of a dot product is E^-0.5.
Nothing here is tuned. A kernel is right when it agrees with these lines evaluated in float64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["depthwise_conv2d", "dynamic_relu", "former_to_mobile", "mobile_to_former", "spatial_dynamic_relu"]


def mobile_to_former(x: Tensor, q: Tensor, *, num_heads: int = 2) -> Tensor:
    """Tokens gather from the map: softmax over the L positions of q.x, times x. x (B,C,H,W), q (B,M,C) -> (B,M,C)."""
    keys = _split_heads(x.flatten(2), num_heads)  # (B, N, E, L), also the values
    queries = q.unflatten(2, (num_heads, -1)).transpose(1, 2)  # (B, N, M, E)
    scores = (queries @ keys) * queries.shape[-1] ** -0.5  # (B, N, M, L)
    gathered = scores.softmax(dim=-1) @ keys.transpose(-1, -2)  # (B, N, M, E)
    return gathered.transpose(1, 2).flatten(2)


def former_to_mobile(x: Tensor, k: Tensor, v: Tensor, *, num_heads: int = 2) -> Tensor:
    """The map gathers from tokens: x + softmax over the M tokens of x.k, times v.

    x (B,C,H,W), k v (B,M,C) -> (B,C,H,W).
    """
    queries = _split_heads(x.flatten(2), num_heads)  # (B, N, E, L)
    keys = k.unflatten(2, (num_heads, -1)).transpose(1, 2)  # (B, N, M, E)
    values = v.unflatten(2, (num_heads, -1)).transpose(1, 2)  # (B, N, M, E)
    scores = (keys @ queries) * keys.shape[-1] ** -0.5  # (B, N, M, L)
    gathered = values.transpose(-1, -2) @ scores.softmax(dim=-2)  # (B, N, E, L)
    return x + gathered.flatten(1, 2).view_as(x)


def dynamic_relu(x: Tensor, theta: Tensor) -> Tensor:
    """max(a1 x, a2 x) with a1 = 2 hsig(theta1) in [0, 2] and a2 = 2 hsig(theta2) - 1 in [-1, 1].

    x (B,C,H,W), theta (B,2C): the first C entries are theta1, the last C are theta2, both before the hard sigmoid.
    hsig is clamp(t + 3, 0, 6) / 6: `F.hardsigmoid` keeps 1/6 in float32, which a float64 gradient shows.
    Where both branches are equal the gradient is shared half and half, as `torch.maximum` does.
    """
    slope1, slope2 = (slope[:, :, None, None] for slope in _slopes(theta))
    return torch.maximum(slope1 * x, slope2 * x)


def spatial_dynamic_relu(x: Tensor, theta: Tensor, alpha: Tensor) -> Tensor:
    """max(a1 x, a2 x) with slopes of every position: those of the tokens, mixed by alpha after the hard sigmoid.

    x (B,C,H,W), theta (B,M,2C) as in `dynamic_relu` for each token, alpha (B,M,H,W) of sum 1 over the tokens.
    For any alpha: a1 = sum over m of alpha_m 2 hsig(theta1_m), a2 = sum over m of alpha_m (2 hsig(theta2_m) - 1).
    """
    slopes = torch.cat(_slopes(theta), dim=2)
    slope1, slope2 = torch.einsum("bmc,bmhw->bchw", slopes, alpha).chunk(2, dim=1)
    return torch.maximum(slope1 * x, slope2 * x)


def depthwise_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int = 1, activation: str = "hardswish"
) -> Tensor:
    """activation(conv(x)): each channel with its own K x K filters, padding K//2.

    x (B,C,H,W), weight (C*mult,1,K,K), bias (C*mult) -> (B,C*mult,ceil(H/stride),ceil(W/stride)).
    Output channel o reads input channel o // mult.
    """
    y = F.conv2d(x, weight, bias, stride=stride, padding=weight.shape[-1] // 2, groups=x.shape[1])
    if activation == "hardswish":
        return F.hardswish(y)
    if activation == "relu6":
        return F.relu6(y)
    if activation == "identity":
        return y
    raise ValueError(f"activation: expected 'hardswish', 'relu6' or 'identity', got {activation!r}")


def _slopes(theta: Tensor) -> tuple[Tensor, Tensor]:
    """a1 = 2 hsig(theta1) and a2 = 2 hsig(theta2) - 1 of (..., 2C)."""
    hard_sigmoid = (theta + 3).clamp(0, 6) / 6
    theta1, theta2 = hard_sigmoid.chunk(2, dim=-1)
    return 2 * theta1, 2 * theta2 - 1


def _split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, C, L) -> (B, N, E, L)."""
    return x.unflatten(1, (num_heads, -1))
