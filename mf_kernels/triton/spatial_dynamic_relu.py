"""Spatial dynamic ReLU in Triton: y = max(a1 x, a2 x), the slopes of a position mixed from those of the tokens.

Legend: B batch, C channels, L = H*W positions, M tokens, S splits of the position axis.
theta (B, M, 2C) is before the hard sigmoid: theta1 of all channels, then theta2; alpha (B, M, L).
A program has a tile of positions and channels of one sample, and mixes their slopes in registers. Backward, it has all
tiles of one split and one chunk of channels; what each split leaves of d_theta, and each chunk of d_alpha, a second
kernel adds. There all sums are products, and tokens padded to `TOKENS` columns, the least that one takes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mf_kernels import _checks
from mf_kernels.triton import _settings
from mf_kernels.triton._common import (
    hard_sigmoid,
    load_head,
    load_tokens,
    map_offset,
    product,
    slope_gradient,
    store_partial,
    sum_splits,
)
from mf_kernels.triton._launch import (
    allow_tf32,
    capability,
    dense,
    dense_like,
    is_channels_last,
    launch,
    new_map,
    position_arguments,
)
from mf_kernels.triton.dynamic_relu import BLOCK, dynamic_relu_theta, load_slopes


@triton.jit
def spatial_dynamic_relu_forward(
    y_ptr,  # [B, C, L]
    x_ptr,  # [B, C, L]
    theta_ptr,  # [B, M, 2C]
    alpha_ptr,  # [B, M, L]
    L_steps,  # L / L_STEP
    C: tl.constexpr,
    M: tl.constexpr,
    L_STEP: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    L = L_steps * L_STEP
    C_TILES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    tiles = tl.cdiv(L, BLOCK_L)
    c = program % C_TILES * BLOCK_C + tl.arange(0, BLOCK_C)
    pos = program // C_TILES % tiles * BLOCK_L + tl.arange(0, BLOCK_L)
    b = (program // C_TILES // tiles).to(tl.int64)

    slope1 = tl.zeros((BLOCK_C, BLOCK_L), tl.float32)
    slope2 = tl.zeros((BLOCK_C, BLOCK_L), tl.float32)
    for m in tl.static_range(M):
        _, _, token1, token2 = load_slopes(theta_ptr, b * M + m, c, C)
        weight = tl.load(alpha_ptr + (b * M + m) * L + pos, mask=pos < L, other=0.0).to(tl.float32)
        slope1 += token1[:, None] * weight[None, :]
        slope2 += token2[:, None] * weight[None, :]
    sample = b * C * L
    at = map_offset(c[:, None], pos[None, :], L, C, CHANNELS_LAST, WIDE)
    mask = (c[:, None] < C) & (pos[None, :] < L)
    x = tl.load(x_ptr + sample + at, mask=mask, other=0.0).to(tl.float32)
    # y = max(a1 x, a2 x), NaN if either is
    y = tl.maximum(slope1 * x, slope2 * x, propagate_nan=tl.PropagateNan.ALL)
    tl.store(y_ptr + sample + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def spatial_dynamic_relu_backward(
    d_x_ptr,  # [B, C, L]
    d_theta_ptr,  # [B, M, 2C], or where S > 1 [S, B, M, 2C] float32: d_a1, d_a2 of each split
    d_alpha_ptr,  # [B, M, L], or where CHUNKS > 1 [CHUNKS, B, M, L] float32
    d_y_ptr,  # [B, C, L]
    x_ptr,  # [B, C, L]
    theta_ptr,  # [B, M, 2C]
    alpha_ptr,  # [B, M, L]
    B,
    splits,  # S
    tiles,  # of BLOCK_L positions in one split
    L_steps,  # L / L_STEP
    C: tl.constexpr,
    M: tl.constexpr,
    L_STEP: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    TF32: tl.constexpr,
    ONE_SPLIT: tl.constexpr,  # S = 1
    CHUNKS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    L = L_steps * L_STEP
    program = tl.program_id(0)
    chunk = program % CHUNKS
    split = program // CHUNKS % splits
    b = (program // CHUNKS // splits).to(tl.int64)
    m = tl.arange(0, TOKENS)
    c = chunk * BLOCK_C + tl.arange(0, BLOCK_C)
    # theta1 and theta2 lie as two heads of C channels
    theta1 = load_tokens(theta_ptr, b, m, 0, c, M, 2 * C, C)
    theta2 = load_tokens(theta_ptr, b, m, 1, c, M, 2 * C, C)
    token1 = (2.0 * hard_sigmoid(theta1.to(tl.float32))).to(theta1.dtype)  # [TOKENS, BLOCK_C]
    token2 = (2.0 * hard_sigmoid(theta2.to(tl.float32)) - 1.0).to(theta2.dtype)

    acc_1 = tl.zeros((BLOCK_C, TOKENS), tl.float32)
    acc_2 = tl.zeros((BLOCK_C, TOKENS), tl.float32)
    for tile in range(tiles):
        pos = (split * tiles + tile) * BLOCK_L + tl.arange(0, BLOCK_L)
        inside = (pos[:, None] < L) & (m[None, :] < M)
        at_token = (b * M + m[None, :]) * L + pos[:, None]
        alpha = tl.load(alpha_ptr + at_token, mask=inside, other=0.0)
        slope1 = product(alpha, token1, TF32)  # [BLOCK_L, BLOCK_C]
        slope2 = product(alpha, token2, TF32)
        x, at, mask = load_head(x_ptr, b, 0, c, pos, L, C, C, CHANNELS_LAST, WIDE)
        d_y, _, _ = load_head(d_y_ptr, b, 0, c, pos, L, C, C, CHANNELS_LAST, WIDE)
        x = x.to(tl.float32)
        d_y = d_y.to(tl.float32)
        line1 = slope1 * x
        line2 = slope2 * x
        # 1 where the first line wins, 0 where the second, 1/2 each where they meet
        share1 = tl.where(line1 > line2, 1.0, tl.where(line1 < line2, 0.0, 0.5))
        d_1 = d_y * share1
        d_2 = d_y - d_1
        d_x = d_1 * slope1 + d_2 * slope2
        tl.store(d_x_ptr + b * C * L + at, d_x.to(d_x_ptr.dtype.element_ty), mask=mask)
        # d_a1[l, c] = share1 d_y x; d_alpha[m, l] = sum_c a1[m, c] d_a1[l, c] + the same of a2
        d_1 = (d_1 * x).to(theta1.dtype)
        d_2 = (d_2 * x).to(theta1.dtype)
        d_alpha = product(d_1, tl.trans(token1), TF32) + product(d_2, tl.trans(token2), TF32)  # [BLOCK_L, TOKENS]
        if CHUNKS > 1:
            at_token += chunk.to(tl.int64) * B * M * L
        tl.store(d_alpha_ptr + at_token, d_alpha.to(d_alpha_ptr.dtype.element_ty), mask=inside)
        # d_a1[m, c] = sum_l alpha[m, l] d_a1[l, c]
        acc_1 += product(tl.trans(d_1), alpha, TF32)
        acc_2 += product(tl.trans(d_2), alpha, TF32)
    if ONE_SPLIT:
        acc_1 = slope_gradient(acc_1, tl.trans(theta1).to(tl.float32))
        acc_2 = slope_gradient(acc_2, tl.trans(theta2).to(tl.float32))
    target = d_theta_ptr + split.to(tl.int64) * B * (M * 2 * C)
    store_partial(target, acc_1, b, m, 0, c, M, 2 * C, C)
    store_partial(target, acc_2, b, m, 1, c, M, 2 * C, C)


def _check(x: Tensor, theta: Tensor, alpha: Tensor) -> None:
    """A raw call comes here unchecked, and the kernels read by these shapes."""
    _checks.feature_map("spatial_dynamic_relu", x)
    _checks.spatial_slopes("spatial_dynamic_relu", x, theta, alpha)
    _settings.check_tokens("spatial_dynamic_relu", "theta", theta.shape[1])


def forward(x: Tensor, theta: Tensor, alpha: Tensor) -> Tensor:
    """x (B, C, H, W), theta (B, M, 2C), alpha (B, M, H, W) -> y (B, C, H, W)."""
    _check(x, theta, alpha)
    x, theta, alpha = dense(x), theta.contiguous(), alpha.contiguous()
    B, C, H, W = x.shape
    y = new_map(x, C, H, W)
    s = _settings.dynamic_relu(B, C, H * W, x.dtype, is_channels_last(x), capability(x))
    positions, constants = position_arguments(x)
    launch(
        spatial_dynamic_relu_forward,
        B * _settings.ceil_div(C, s.block_c) * _settings.ceil_div(H * W, s.block_l),
        {"y_ptr": y, "x_ptr": x, "theta_ptr": theta, "alpha_ptr": alpha, **positions},
        {"C": C, "M": theta.shape[1], **constants, "BLOCK_C": s.block_c, "BLOCK_L": s.block_l},
        num_warps=s.num_warps,
        # left alone, the assembler spills in a warp alone for the sake of fewer registers
        max_registers=255 if s.num_warps == 1 else None,
    )
    return y


def backward(d_y: Tensor, x: Tensor, theta: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """d_y, x (B, C, H, W), theta (B, M, 2C), alpha (B, M, H, W) -> d_x, d_theta, d_alpha, each like its own."""
    _check(x, theta, alpha)
    _checks.companion("spatial_dynamic_relu", "d_y", d_y, x, tuple(x.shape), "(B, C, H, W)")
    x, theta, alpha = dense(x), theta.contiguous(), alpha.contiguous()
    d_y = dense_like(d_y, x)
    B, C, H, W = x.shape
    s = _settings.spatial_gradient(B, C, H * W, capability(x))
    d_x, d_theta, d_alpha = new_map(x, C, H, W), torch.empty_like(theta), torch.empty_like(alpha)
    of_splits = x.new_empty((s.splits, *theta.shape), dtype=torch.float32) if s.splits > 1 else None
    of_chunks = x.new_empty((s.chunks, *alpha.shape), dtype=torch.float32) if s.chunks > 1 else None
    positions, constants = position_arguments(x)
    launch(
        spatial_dynamic_relu_backward,
        B * s.chunks * s.splits,
        {
            "d_x_ptr": d_x,
            "d_theta_ptr": d_theta if of_splits is None else of_splits,
            "d_alpha_ptr": d_alpha if of_chunks is None else of_chunks,
            "d_y_ptr": d_y,
            "x_ptr": x,
            "theta_ptr": theta,
            "alpha_ptr": alpha,
            "B": B,
            "splits": s.splits,
            "tiles": s.tiles,
            **positions,
        },
        {
            "C": C,
            "M": theta.shape[1],
            **constants,
            "TF32": allow_tf32(),
            "ONE_SPLIT": s.splits == 1,
            "CHUNKS": s.chunks,
            "TOKENS": s.tokens,
            "BLOCK_C": s.block_c,
            "BLOCK_L": s.block_l,
        },
        num_warps=s.num_warps,
        num_stages=2,
        # left alone, the assembler spills in a narrow chunk for the sake of fewer registers
        max_registers=255 if s.block_c == 32 else None,
    )
    if of_splits is not None:
        arguments = {"d_theta_ptr": d_theta, "partial_ptr": of_splits, "theta_ptr": theta}
        _second_stage(dynamic_relu_theta, arguments, theta.numel(), s.splits)
    if of_chunks is not None:
        arguments = {"first_ptr": d_alpha, "second_ptr": None, "partial_ptr": of_chunks}
        _second_stage(sum_splits, arguments, alpha.numel(), s.chunks)
    return d_x, d_theta, d_alpha


def _second_stage(kernel: Any, arguments: dict[str, Tensor | None], count: int, splits: int) -> None:
    """Add what `splits` programs left of each of `count` values."""
    launch(
        kernel,
        _settings.ceil_div(count, BLOCK),
        {**arguments, "count": count, "splits": splits},
        {"BLOCK": BLOCK, "BLOCK_S": min(64, _settings.power_of_two(splits))},
        num_warps=4,
    )


def both_passes(x: Tensor) -> None:
    """A forward and a backward pass over one small map: what `_triton` compiles to see whether it can."""
    theta, alpha = x.new_empty(1, 6, 2 * x.shape[1]), x.new_empty(1, 6, *x.shape[2:])
    backward(forward(x, theta, alpha), x, theta, alpha)
