"""Former -> Mobile in Triton: y = x + softmax_m(E^-0.5 x.k) v, for every position and head.

Legend: B batch, C channels, L = H*W positions, M tokens, N heads, E = C/N head width, S splits of positions.
A program has a tile of positions of one head. x is read once and written once; the softmax over at most 8
scores stays in registers, and backward redoes it. A head of more channels than a tile holds is cut into chunks:
each chunk's program adds up the scores of the whole head and writes its own channels.
Tokens are padded to `TOKENS` columns of weight 0, the least that a product takes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mf_kernels import _checks
from mf_kernels.triton import _settings
from mf_kernels.triton._common import load_head, load_tokens, product, store_partial, sum_splits
from mf_kernels.triton._launch import (
    allow_tf32,
    capability,
    dense,
    dense_like,
    launch,
    new_map,
    position_arguments,
)

BLOCK = 64  # token channels that one program of the second stage finishes


@triton.jit
def softmax_over_tokens(
    scores,  # [BLOCK_L, TOKENS]
    m,  # [TOKENS]
    M: tl.constexpr,
):
    """weight[l, m] = exp(score) / sum_m exp(score), float32; padding has weight 0."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    scores = tl.where(m[None, :] < M, scores, float("-inf"))
    weight = tl.exp2((scores - tl.max(scores, axis=1)[:, None]) * LOG2_E)
    return weight / tl.sum(weight, axis=1)[:, None]


@triton.jit
def former_to_mobile_forward(
    y_ptr,  # [B, C, L]
    x_ptr,  # [B, C, L]
    k_ptr,  # [B, M, C]
    v_ptr,  # [B, M, C]
    L_steps,  # L / L_STEP
    C: tl.constexpr,
    E: tl.constexpr,
    M: tl.constexpr,
    SCALE: tl.constexpr,  # E^-0.5
    L_STEP: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    TF32: tl.constexpr,
    CHUNKS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    L = L_steps * L_STEP
    N: tl.constexpr = C // E
    # chunks and heads of the same positions run side by side: they share lines of memory
    program = tl.program_id(0)
    chunk = program % CHUNKS
    n = program // CHUNKS % N
    tile = program // (CHUNKS * N) % tl.cdiv(L, BLOCK_L)
    b = (program // (CHUNKS * N) // tl.cdiv(L, BLOCK_L)).to(tl.int64)
    m = tl.arange(0, TOKENS)
    pos = tile * BLOCK_L + tl.arange(0, BLOCK_L)

    # score[l, m] = E^-0.5 sum_e x[e, l] k[m, e]
    scores = tl.zeros((BLOCK_L, TOKENS), tl.float32)
    for i in tl.static_range(CHUNKS):
        e = i * BLOCK_E + tl.arange(0, BLOCK_E)
        x, at, mask = load_head(x_ptr, b, n, e, pos, L, C, E, CHANNELS_LAST, WIDE)
        scores += product(x, tl.trans(load_tokens(k_ptr, b, m, n, e, M, C, E)), TF32)
    weight = softmax_over_tokens(scores * SCALE, m, M)

    e = chunk * BLOCK_E + tl.arange(0, BLOCK_E)
    if CHUNKS > 1:
        x, at, mask = load_head(x_ptr, b, n, e, pos, L, C, E, CHANNELS_LAST, WIDE)
    # y[e, l] = x[e, l] + sum_m weight[l, m] v[m, e]
    v = load_tokens(v_ptr, b, m, n, e, M, C, E)
    y = x.to(tl.float32) + product(weight.to(v.dtype), v, TF32)
    tl.store(y_ptr + b * C * L + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def former_to_mobile_backward(
    d_x_ptr,  # [B, C, L]
    d_k_ptr,  # [B, M, C], or where S > 1 [S, 2, B, M, C] float32: d_k and d_v of each split
    d_v_ptr,  # [B, M, C], or where S > 1 None
    d_y_ptr,  # [B, C, L]
    x_ptr,  # [B, C, L]
    k_ptr,  # [B, M, C]
    v_ptr,  # [B, M, C]
    B,
    splits,  # S
    tiles,  # of BLOCK_L positions in one split
    L_steps,  # L / L_STEP
    C: tl.constexpr,
    E: tl.constexpr,
    M: tl.constexpr,
    SCALE: tl.constexpr,  # E^-0.5
    L_STEP: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    TF32: tl.constexpr,
    CHUNKS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    L = L_steps * L_STEP
    N: tl.constexpr = C // E
    program = tl.program_id(0)
    chunk = program % CHUNKS
    n = program // CHUNKS % N
    split = program // (CHUNKS * N) % splits
    b = (program // (CHUNKS * N) // splits).to(tl.int64)
    m = tl.arange(0, TOKENS)
    own = chunk * BLOCK_E + tl.arange(0, BLOCK_E)
    k = load_tokens(k_ptr, b, m, n, own, M, C, E)
    v = load_tokens(v_ptr, b, m, n, own, M, C, E)

    acc_k = tl.zeros((BLOCK_E, TOKENS), tl.float32)
    acc_v = tl.zeros((BLOCK_E, TOKENS), tl.float32)
    for tile in range(tiles):
        pos = (split * tiles + tile) * BLOCK_L + tl.arange(0, BLOCK_L)
        x, at, mask = load_head(x_ptr, b, n, own, pos, L, C, E, CHANNELS_LAST, WIDE)
        d_y, _, _ = load_head(d_y_ptr, b, n, own, pos, L, C, E, CHANNELS_LAST, WIDE)
        # d_weight[l, m] = sum_e d_y[e, l] v[m, e], and the scores again
        if CHUNKS == 1:
            scores = product(x, tl.trans(k), TF32)
            d_weight = product(d_y, tl.trans(v), TF32)
        else:
            scores = tl.zeros((BLOCK_L, TOKENS), tl.float32)
            d_weight = tl.zeros((BLOCK_L, TOKENS), tl.float32)
            for i in range(CHUNKS):
                e = i * BLOCK_E + tl.arange(0, BLOCK_E)
                x_i, _, _ = load_head(x_ptr, b, n, e, pos, L, C, E, CHANNELS_LAST, WIDE)
                d_y_i, _, _ = load_head(d_y_ptr, b, n, e, pos, L, C, E, CHANNELS_LAST, WIDE)
                scores += product(x_i, tl.trans(load_tokens(k_ptr, b, m, n, e, M, C, E)), TF32)
                d_weight += product(d_y_i, tl.trans(load_tokens(v_ptr, b, m, n, e, M, C, E)), TF32)
        weight = softmax_over_tokens(scores * SCALE, m, M)
        # d_score = weight (d_weight - sum_m weight d_weight); padding is 0, even beside inf
        inside = (pos[:, None] < L) & (m[None, :] < M)
        weight = tl.where(inside, weight, 0.0)
        d_weight = tl.where(inside, d_weight, 0.0)
        d_score = weight * (d_weight - tl.sum(weight * d_weight, axis=1)[:, None])
        # d_x[e, l] = d_y[e, l] + E^-0.5 sum_m d_score[l, m] k[m, e]
        d_score = d_score.to(k.dtype)
        d_x = d_y.to(tl.float32) + SCALE * product(d_score, k, TF32)
        tl.store(d_x_ptr + b * C * L + at, d_x.to(d_x_ptr.dtype.element_ty), mask=mask)
        # d_k[m, e] = E^-0.5 sum_l d_score[l, m] x[e, l],  d_v[m, e] = sum_l weight[l, m] d_y[e, l]
        acc_k += product(tl.trans(x), d_score, TF32)
        acc_v += product(tl.trans(d_y), weight.to(v.dtype), TF32)
    if d_v_ptr is not None:
        store_partial(d_k_ptr, SCALE * acc_k, b, m, n, own, M, C, E)
        store_partial(d_v_ptr, acc_v, b, m, n, own, M, C, E)
    else:
        first = split.to(tl.int64) * (2 * B * M * C)
        store_partial(d_k_ptr + first, SCALE * acc_k, b, m, n, own, M, C, E)
        store_partial(d_k_ptr + first + B * M * C, acc_v, b, m, n, own, M, C, E)


def _check(x: Tensor, k: Tensor, v: Tensor, num_heads: int) -> None:
    """A raw call comes here unchecked, and the kernels read by these shapes."""
    _checks.feature_map("former_to_mobile", x)
    _checks.tokens("former_to_mobile", "k", k, x, num_heads)
    _checks.companion("former_to_mobile", "v", v, x, tuple(k.shape), "(B, M, C)")
    _settings.check_tokens("former_to_mobile", "k", k.shape[1])


def _plan(
    x: Tensor, M: int, num_heads: int, backward: bool
) -> tuple[_settings.Attention, dict[str, Any], dict[str, Any]]:
    B, C, H, W = x.shape
    E = C // num_heads
    s = _settings.attention(B, H * W, E, num_heads, x.dtype, capability(x), backward=backward)
    positions, constants = position_arguments(x)
    return (
        s,
        positions,
        {
            "C": C,
            "E": E,
            "M": M,
            "SCALE": E**-0.5,
            **constants,
            "TF32": allow_tf32(),
            "CHUNKS": s.chunks,
            "TOKENS": s.tokens,
            "BLOCK_E": s.block_e,
            "BLOCK_L": s.block_l,
        },
    )


def forward(x: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """x (B, C, H, W), k and v (B, M, C) -> y (B, C, H, W)."""
    _check(x, k, v, num_heads)
    x, k, v = dense(x), k.contiguous(), v.contiguous()
    B, C, H, W = x.shape
    s, positions, constants = _plan(x, k.shape[1], num_heads, backward=False)
    y = new_map(x, C, H, W)
    launch(
        former_to_mobile_forward,
        B * num_heads * s.chunks * _settings.ceil_div(H * W, s.block_l),
        {"y_ptr": y, "x_ptr": x, "k_ptr": k, "v_ptr": v, **positions},
        constants,
        num_warps=s.num_warps,
    )
    return y


def backward(d_y: Tensor, x: Tensor, k: Tensor, v: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """d_y, x (B, C, H, W), k and v (B, M, C) -> d_x (B, C, H, W), d_k and d_v (B, M, C)."""
    _check(x, k, v, num_heads)
    _checks.companion("former_to_mobile", "d_y", d_y, x, tuple(x.shape), "(B, C, H, W)")
    x, k, v = dense(x), k.contiguous(), v.contiguous()
    d_y = dense_like(d_y, x)
    B, C, H, W = x.shape
    s, positions, constants = _plan(x, k.shape[1], num_heads, backward=True)
    d_x, d_k, d_v = new_map(x, C, H, W), torch.empty_like(k), torch.empty_like(v)
    partial = x.new_empty((s.splits, 2, *k.shape), dtype=torch.float32) if s.splits > 1 else None
    launch(
        former_to_mobile_backward,
        B * num_heads * s.chunks * s.splits,
        {
            "d_x_ptr": d_x,
            "d_k_ptr": d_k if partial is None else partial,
            "d_v_ptr": d_v if partial is None else None,
            "d_y_ptr": d_y,
            "x_ptr": x,
            "k_ptr": k,
            "v_ptr": v,
            "B": B,
            "splits": s.splits,
            "tiles": s.tiles,
            **positions,
        },
        constants,
        num_warps=s.num_warps,
        num_stages=s.num_stages,
        # left alone, the assembler spills in a narrow head for the sake of fewer registers
        max_registers=255 if s.block_e == 16 else None,
    )
    if partial is not None:
        launch(
            sum_splits,
            2 * _settings.ceil_div(k.numel(), BLOCK),
            {
                "first_ptr": d_k,
                "second_ptr": d_v,
                "partial_ptr": partial,
                "count": k.numel(),
                "splits": s.splits,
            },
            {"BLOCK": BLOCK, "BLOCK_S": min(64, _settings.power_of_two(s.splits))},
            num_warps=4,
        )
    return d_x, d_k, d_v


def both_passes(x: Tensor) -> None:
    """A forward and a backward pass over one small map: what `_triton` compiles to see whether it can."""
    tokens = x.new_empty(1, 6, x.shape[1])
    backward(forward(x, tokens, tokens, 1), x, tokens, tokens, 1)
