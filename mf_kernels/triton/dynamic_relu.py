"""Dynamic ReLU in Triton: y = max(a1 x, a2 x), slopes per sample and channel.

Legend: B batch, C channels, L = H*W positions, S splits of the position axis.
theta (B, 2C) is before the hard sigmoid: theta1 of all channels, then theta2.
A program has a tile of channels by positions of one sample. Forward streams x to y. Backward streams x and
d_y to d_x and keeps the two sums of each channel in registers; where the positions are split, a second kernel
adds the splits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mf_kernels import _checks
from mf_kernels.triton import _settings
from mf_kernels.triton._common import hard_sigmoid, map_offset, slope_gradient, sum_over_splits
from mf_kernels.triton._launch import (
    capability,
    dense,
    dense_like,
    is_channels_last,
    launch,
    new_map,
    position_arguments,
)

BLOCK = 64  # slopes that one program of the second stage finishes


@triton.jit
def load_slopes(
    theta_ptr,  # [B, 2C]
    b,
    c,  # [BLOCK_C]
    C: tl.constexpr,
):
    """theta1, theta2 of some channels in float32, and a1 = 2 hsig(theta1), a2 = 2 hsig(theta2) - 1."""
    theta1 = tl.load(theta_ptr + b * (2 * C) + c, mask=c < C, other=0.0).to(tl.float32)
    theta2 = tl.load(theta_ptr + b * (2 * C) + C + c, mask=c < C, other=0.0).to(tl.float32)
    return theta1, theta2, 2.0 * hard_sigmoid(theta1), 2.0 * hard_sigmoid(theta2) - 1.0


@triton.jit
def dynamic_relu_forward(
    y_ptr,  # [B, C, L]
    x_ptr,  # [B, C, L]
    theta_ptr,  # [B, 2C]
    L_steps,  # L / L_STEP
    C: tl.constexpr,
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

    _, _, slope1, slope2 = load_slopes(theta_ptr, b, c, C)
    sample = b * C * L
    at = map_offset(c[:, None], pos[None, :], L, C, CHANNELS_LAST, WIDE)
    mask = (c[:, None] < C) & (pos[None, :] < L)
    x = tl.load(x_ptr + sample + at, mask=mask, other=0.0).to(tl.float32)
    # y = max(a1 x, a2 x), NaN if either is
    y = tl.maximum(slope1[:, None] * x, slope2[:, None] * x, propagate_nan=tl.PropagateNan.ALL)
    tl.store(y_ptr + sample + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def dynamic_relu_backward(
    d_x_ptr,  # [B, C, L]
    d_theta_ptr,  # [B, 2C], written where S = 1
    partial_ptr,  # [S, B, 2C] float32: d_a1, d_a2 of each split, written where S > 1
    d_y_ptr,  # [B, C, L]
    x_ptr,  # [B, C, L]
    theta_ptr,  # [B, 2C]
    B,
    splits,  # S
    tiles,  # of BLOCK_L positions in one split
    L_steps,  # L / L_STEP
    C: tl.constexpr,
    L_STEP: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    ONE_SPLIT: tl.constexpr,  # S = 1
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    L = L_steps * L_STEP
    C_TILES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    c = program % C_TILES * BLOCK_C + tl.arange(0, BLOCK_C)
    split = program // C_TILES % splits
    b = (program // C_TILES // splits).to(tl.int64)

    theta1, theta2, slope1, slope2 = load_slopes(theta_ptr, b, c, C)
    sample = b * C * L
    acc_1 = tl.zeros((BLOCK_C, BLOCK_L), tl.float32)
    acc_2 = tl.zeros((BLOCK_C, BLOCK_L), tl.float32)
    for tile in range(tiles):
        pos = (split * tiles + tile) * BLOCK_L + tl.arange(0, BLOCK_L)
        at = map_offset(c[:, None], pos[None, :], L, C, CHANNELS_LAST, WIDE)
        mask = (c[:, None] < C) & (pos[None, :] < L)
        x = tl.load(x_ptr + sample + at, mask=mask, other=0.0).to(tl.float32)
        d_y = tl.load(d_y_ptr + sample + at, mask=mask, other=0.0).to(tl.float32)
        line1 = slope1[:, None] * x
        line2 = slope2[:, None] * x
        # 1 where the first line wins, 0 where the second, 1/2 each where they meet
        share1 = tl.where(line1 > line2, 1.0, tl.where(line1 < line2, 0.0, 0.5))
        d_1 = d_y * share1
        d_2 = d_y - d_1
        d_x = d_1 * slope1[:, None] + d_2 * slope2[:, None]
        tl.store(d_x_ptr + sample + at, d_x.to(d_x_ptr.dtype.element_ty), mask=mask)
        acc_1 += d_1 * x  # d_a1 = sum_l share1 d_y x
        acc_2 += d_2 * x
    d_slope1 = tl.sum(acc_1, axis=1)
    d_slope2 = tl.sum(acc_2, axis=1)
    if ONE_SPLIT:
        # d_theta = 2 hsig'(theta) d_a, for both slopes
        at = b * (2 * C) + c
        d_theta1 = slope_gradient(d_slope1, theta1)
        d_theta2 = slope_gradient(d_slope2, theta2)
        tl.store(d_theta_ptr + at, d_theta1.to(d_theta_ptr.dtype.element_ty), mask=c < C)
        tl.store(d_theta_ptr + at + C, d_theta2.to(d_theta_ptr.dtype.element_ty), mask=c < C)
    else:
        at = (split.to(tl.int64) * B + b) * (2 * C) + c
        tl.store(partial_ptr + at, d_slope1, mask=c < C)
        tl.store(partial_ptr + at + C, d_slope2, mask=c < C)


@triton.jit
def dynamic_relu_theta(
    d_theta_ptr,  # [B, 2C]
    partial_ptr,  # [S, B, 2C] float32
    theta_ptr,  # [B, 2C]
    count,  # B * 2C
    splits,  # S
    BLOCK: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < count
    d_slope = sum_over_splits(partial_ptr, index, mask, count, splits, BLOCK, BLOCK_S)
    theta = tl.load(theta_ptr + index, mask=mask, other=0.0).to(tl.float32)
    d_theta = slope_gradient(d_slope, theta)
    tl.store(d_theta_ptr + index, d_theta.to(d_theta_ptr.dtype.element_ty), mask=mask)


def _check(x: Tensor, theta: Tensor) -> None:
    """A raw call comes here unchecked, and the kernels read by these shapes."""
    _checks.feature_map("dynamic_relu", x)
    _checks.companion("dynamic_relu", "theta", theta, x, (x.shape[0], 2 * x.shape[1]), "(B, 2C)")


def _settings_of(x: Tensor) -> _settings.DynamicReLU:
    B, C, H, W = x.shape
    return _settings.dynamic_relu(B, C, H * W, x.dtype, is_channels_last(x), capability(x))


def forward(x: Tensor, theta: Tensor) -> Tensor:
    """x (B, C, H, W), theta (B, 2C) -> y (B, C, H, W)."""
    _check(x, theta)
    x, theta = dense(x), theta.contiguous()
    B, C, H, W = x.shape
    y, s = new_map(x, C, H, W), _settings_of(x)
    positions, constants = position_arguments(x)
    launch(
        dynamic_relu_forward,
        B * _settings.ceil_div(C, s.block_c) * _settings.ceil_div(H * W, s.block_l),
        {"y_ptr": y, "x_ptr": x, "theta_ptr": theta, **positions},
        {"C": C, **constants, "BLOCK_C": s.block_c, "BLOCK_L": s.block_l},
        num_warps=s.num_warps,
    )
    return y


def backward(d_y: Tensor, x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """d_y, x (B, C, H, W), theta (B, 2C) -> d_x (B, C, H, W), d_theta (B, 2C)."""
    _check(x, theta)
    _checks.companion("dynamic_relu", "d_y", d_y, x, tuple(x.shape), "(B, C, H, W)")
    x, theta = dense(x), theta.contiguous()
    d_y = dense_like(d_y, x)
    B, C, H, W = x.shape
    s = _settings_of(x)
    d_x, d_theta = new_map(x, C, H, W), torch.empty_like(theta)
    partial = x.new_empty((s.splits, B, 2 * C), dtype=torch.float32) if s.splits > 1 else None
    positions, constants = position_arguments(x)
    launch(
        dynamic_relu_backward,
        B * _settings.ceil_div(C, s.block_c) * s.splits,
        {
            "d_x_ptr": d_x,
            "d_theta_ptr": d_theta,
            "partial_ptr": partial,
            "d_y_ptr": d_y,
            "x_ptr": x,
            "theta_ptr": theta,
            "B": B,
            "splits": s.splits,
            "tiles": s.tiles,
            **positions,
        },
        {"C": C, **constants, "ONE_SPLIT": s.splits == 1, "BLOCK_C": s.block_c, "BLOCK_L": s.block_l},
        num_warps=s.num_warps,
    )
    if partial is not None:
        launch(
            dynamic_relu_theta,
            _settings.ceil_div(theta.numel(), BLOCK),
            {
                "d_theta_ptr": d_theta,
                "partial_ptr": partial,
                "theta_ptr": theta,
                "count": theta.numel(),
                "splits": s.splits,
            },
            {"BLOCK": BLOCK, "BLOCK_S": min(64, _settings.power_of_two(s.splits))},
            num_warps=4,
        )
    return d_x, d_theta


def both_passes(x: Tensor) -> None:
    """A forward and a backward pass over one small map: what `_triton` compiles to see whether it can."""
    theta = x.new_empty(1, 2 * x.shape[1])
    backward(forward(x, theta), x, theta)
