"""Depthwise convolution in Triton: y = act(conv(x)), each channel under its own K x K filters.

Legend: B batch, C channels, O = C * MULT output channels, H W height and width, OH OW those of the output,
K kernel side, P = K // 2 padding, S tiles. Output (i, j) reads input (STRIDE i + u - P, STRIDE j + v - P).

forward     a tile of output positions and channels; the K^2 shifted tiles of x come from the first-level cache
gradient    where there is an activation: the same, and d_z = d_y act'(z) in place of y
backward    a tile of input positions and channels. The tile of d_z that a filter tap wants for d_x is the one that
            the tap's own gradient wants beside x: one pass reads x and d_z and writes d_x, and the K^2 + 1 sums
            of each channel (d_weight and d_bias) are left in partials
filters     adds the partials
With stride 2 the input positions are taken in four phases, by their parity, so that no tap is tried in vain.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mf_kernels import _checks
from mf_kernels.triton import _launch, _settings
from mf_kernels.triton._common import hard_sigmoid, map_offset, sum_over_splits
from mf_kernels.triton._launch import capability, dense, dense_like, is_channels_last, launch, new_map

BLOCK = 8  # filter taps that one program of the second stage finishes


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """act(z) in float32; NaN stays NaN."""
    if ACTIVATION == "hardswish":
        return z * hard_sigmoid(z)
    if ACTIVATION == "relu6":
        return tl.clamp(z, 0.0, 6.0, propagate_nan=tl.PropagateNan.ALL)
    return z


@triton.jit
def activation_gradient(d_y, z, ACTIVATION: tl.constexpr):
    """d_y act'(z) with the corners of `activation_gradient` in csrc/common/math.h, which are torch's."""
    if ACTIVATION == "hardswish":
        return tl.where(z <= -3.0, 0.0, tl.where(z < 3.0, d_y * (z / 3.0 + 0.5), d_y))
    return tl.where((z > 0.0) & (z < 6.0), d_y, 0.0)


@triton.jit
def tile_of(
    program,
    height,
    width,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Sample, rows and columns [BLOCK_H * BLOCK_W] of one tile; columns are neighbours."""
    tiles_w = tl.cdiv(width, BLOCK_W)
    tiles_h = tl.cdiv(height, BLOCK_H)
    p = tl.arange(0, BLOCK_H * BLOCK_W)
    i = program // tiles_w % tiles_h * BLOCK_H + p // BLOCK_W
    j = program % tiles_w * BLOCK_W + p % BLOCK_W
    return (program // tiles_w // tiles_h).to(tl.int64), i, j


@triton.jit
def depthwise_forward(
    y_ptr,  # [B, O, OH, OW]: y, or d_z
    d_y_ptr,  # [B, O, OH, OW], or None for y
    x_ptr,  # [B, C, H, W]
    weight_ptr,  # [O, K, K]
    bias_ptr,  # [O] or None
    H,
    W,
    OH,
    OW_steps,  # OW / OW_STEP
    C: tl.constexpr,
    MULT: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OW_STEP: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    OW = OW_steps * OW_STEP
    O: tl.constexpr = C * MULT
    P: tl.constexpr = K // 2
    POSITION: tl.constexpr = C if CHANNELS_LAST else 1  # from one position to the next
    O_TILES: tl.constexpr = (O + BLOCK_C - 1) // BLOCK_C
    b, i, j = tile_of(tl.program_id(0) // O_TILES, OH, OW, BLOCK_H, BLOCK_W)
    o = tl.program_id(0) % O_TILES * BLOCK_C + tl.arange(0, BLOCK_C)
    c = o // MULT

    # z[o, i, j] = bias[o] + sum_uv weight[o, u, v] x[o // MULT, STRIDE i + u - P, STRIDE j + v - P]
    z = tl.zeros((BLOCK_H * BLOCK_W, BLOCK_C), tl.float32)
    middle = map_offset(c[None, :], (STRIDE * (i * W + j))[:, None], H * W, C, CHANNELS_LAST, WIDE)
    for u in range(K):  # not unrolled: a row of taps in flight is enough, all of them need too many registers
        row = STRIDE * i + u - P
        for v in tl.static_range(K):
            column = STRIDE * j + v - P
            inside = (row >= 0) & (row < H) & (column >= 0) & (column < W)
            tap_ptr = x_ptr + b * C * H * W + ((u - P) * W + v - P) * POSITION
            x = tl.load(tap_ptr + middle, mask=inside[:, None] & (o < O)[None, :], other=0.0)
            weight = tl.load(weight_ptr + o * (K * K) + (u * K + v), mask=o < O, other=0.0)
            z += weight.to(tl.float32)[None, :] * x.to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + o, mask=o < O, other=0.0).to(tl.float32)[None, :]

    sample = b * O * OH * OW
    at = map_offset(o[None, :], (i * OW + j)[:, None], OH * OW, O, CHANNELS_LAST, WIDE)
    mask = ((i < OH) & (j < OW))[:, None] & (o < O)[None, :]
    if d_y_ptr is None:
        y = activate(z, ACTIVATION)
    else:
        d_y = tl.load(d_y_ptr + sample + at, mask=mask, other=0.0).to(tl.float32)
        y = activation_gradient(d_y, z, ACTIVATION)
    tl.store(y_ptr + sample + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def depthwise_backward(
    d_x_ptr,  # [B, C, H, W]
    partial_ptr,  # [S, K^2 + 1, O] float32: d_weight by tap, then d_bias, of each tile
    d_z_ptr,  # [B, O, OH, OW]
    x_ptr,  # [B, C, H, W]
    weight_ptr,  # [O, K, K]
    H,
    OH,
    OW,
    W_steps,  # W / W_STEP
    C: tl.constexpr,
    MULT: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    W_STEP: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    W = W_steps * W_STEP
    O: tl.constexpr = C * MULT
    P: tl.constexpr = K // 2
    POSITION: tl.constexpr = O if CHANNELS_LAST else 1  # from one output position to the next
    C_TILES: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    c = tl.program_id(0) % C_TILES * BLOCK_C + tl.arange(0, BLOCK_C)
    # (i, j) counts output positions; the input positions are STRIDE (i, j) + phase
    b, i, j = tile_of(tl.program_id(0) // C_TILES, OH, OW, BLOCK_H, BLOCK_W)
    partial_ptr += (tl.program_id(0) // C_TILES).to(tl.int64) * ((K * K + 1) * O)

    for phase in tl.static_range(STRIDE * STRIDE):
        row = STRIDE * i + phase // STRIDE
        column = STRIDE * j + phase % STRIDE
        mask = ((row < H) & (column < W))[:, None] & (c < C)[None, :]
        at = map_offset(c[None, :], (row * W + column)[:, None], H * W, C, CHANNELS_LAST, WIDE)
        x = tl.load(x_ptr + b * C * H * W + at, mask=mask, other=0.0).to(tl.float32)
        d_x = tl.zeros((BLOCK_H * BLOCK_W, BLOCK_C), tl.float32)
        # a tap carries these inputs to output i' where STRIDE i' + u - P = row: every STRIDE-th tap does
        for filter in range(MULT):
            o = c * MULT + filter
            middle = map_offset(o[None, :], (i * OW + j)[:, None], OH * OW, O, CHANNELS_LAST, WIDE)
            for u in range((phase // STRIDE + P) % STRIDE, K, STRIDE):
                down = (phase // STRIDE + P - u) // STRIDE
                for v in tl.static_range((phase % STRIDE + P) % STRIDE, K, STRIDE):
                    right = (phase % STRIDE + P - v) // STRIDE
                    out_i = i + down
                    out_j = j + right
                    inside = (out_i >= 0) & (out_i < OH) & (out_j >= 0) & (out_j < OW)
                    tap_ptr = d_z_ptr + b * O * OH * OW + (down * OW + right) * POSITION
                    d_z = tl.load(tap_ptr + middle, mask=inside[:, None] & mask, other=0.0).to(tl.float32)
                    tap = u * K + v
                    weight = tl.load(weight_ptr + o * (K * K) + tap, mask=c < C, other=0.0)
                    # d_x[c] += weight[o, u, v] d_z[o],  d_weight[o, u, v] = sum_ij x[c] d_z[o]
                    d_x += weight.to(tl.float32)[None, :] * d_z
                    tl.store(partial_ptr + tap * O + o, tl.sum(x * d_z, axis=0), mask=c < C)
            if phase == 0:  # STRIDE (i, j) meets every output once: d_bias[o] = sum_ij d_z[o]
                inside = ((i < OH) & (j < OW))[:, None] & mask
                d_z = tl.load(d_z_ptr + b * O * OH * OW + middle, mask=inside, other=0.0).to(tl.float32)
                tl.store(partial_ptr + K * K * O + o, tl.sum(d_z, axis=0), mask=c < C)
        tl.store(d_x_ptr + b * C * H * W + at, d_x.to(d_x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def depthwise_filters(
    d_weight_ptr,  # [O, K, K]
    d_bias_ptr,  # [O]
    partial_ptr,  # [S, K^2 + 1, O] float32
    tiles,  # S
    O: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < (K * K + 1) * O
    value = sum_over_splits(partial_ptr, index, mask, (K * K + 1) * O, tiles, BLOCK, BLOCK_S)
    tap = index // O
    o = index % O
    weight_at = d_weight_ptr + o * (K * K) + tap
    tl.store(weight_at, value.to(d_weight_ptr.dtype.element_ty), mask=tap < K * K)
    tl.store(d_bias_ptr + o, value.to(d_bias_ptr.dtype.element_ty), mask=mask & (tap == K * K))


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, activation: str) -> None:
    """A raw call comes here unchecked, and the kernels read by these shapes."""
    _checks.feature_map("depthwise_conv2d", x)
    _checks.depthwise("depthwise_conv2d", x, weight, bias, stride, activation)


def _step(side: int) -> int:
    """The largest power of two up to 16 that divides a side: how its rows are aligned."""
    return min(side & -side, 16)


def _heavy(x: Tensor, weight: Tensor) -> bool:
    C, several_filters = x.shape[1], weight.shape[0] > x.shape[1]
    whole_vectors = is_channels_last(x) and not several_filters and C * x.element_size() % 16 == 0
    return not whole_vectors or x.dtype == torch.float32 or weight.shape[2] > 3


def _run_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, activation: str, d_y: Tensor | None
) -> Tensor:
    """y, or given d_y the gradient before the activation."""
    B, C, H, W = x.shape
    O, K = weight.shape[0], weight.shape[2]
    OH, OW = (H - 1) // stride + 1, (W - 1) // stride + 1
    channels_last = is_channels_last(x)
    s = _settings.depthwise(B, O, OH, OW, channels_last, _heavy(x, weight), capability(x))
    y = new_map(x, O, OH, OW)
    launch(
        depthwise_forward,
        _settings.ceil_div(O, s.block_c) * s.tiles,
        {
            "y_ptr": y,
            "d_y_ptr": d_y,
            "x_ptr": x,
            "weight_ptr": weight,
            "bias_ptr": bias,
            "H": H,
            "W": W,
            "OH": OH,
            "OW_steps": OW // _step(OW),
        },
        {
            "C": C,
            "MULT": O // C,
            "K": K,
            "STRIDE": stride,
            "ACTIVATION": activation,
            "OW_STEP": _step(OW),
            "CHANNELS_LAST": channels_last,
            "WIDE": max(C * H * W, O * OH * OW) >= _launch.WIDE_FROM,
            "BLOCK_C": s.block_c,
            "BLOCK_H": s.block_h,
            "BLOCK_W": s.block_w,
        },
        num_warps=s.num_warps,
        # rows of several filters off the 16 bytes that move at once: their addresses are what the assembler spills
        max_registers=200 if O > C and C % 16 else None,
    )
    return y


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, activation: str) -> Tensor:
    """x (B, C, H, W), weight (O, 1, K, K), bias (O) or None -> y (B, O, OH, OW)."""
    _check(x, weight, bias, stride, activation)
    bias = bias.contiguous() if bias is not None else None
    return _run_forward(dense(x), weight.contiguous(), bias, stride, activation, None)


def backward(
    d_y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """d_y (B, O, OH, OW) and the inputs of forward -> d_x (B, C, H, W), d_weight (O, 1, K, K), d_bias (O)."""
    _check(x, weight, bias, stride, activation)
    side = ((x.shape[2] - 1) // stride + 1, (x.shape[3] - 1) // stride + 1)
    shape = (x.shape[0], weight.shape[0], *side)
    _checks.companion("depthwise_conv2d", "d_y", d_y, x, shape, "(B, C*mult, OH, OW)")
    x, weight = dense(x), weight.contiguous()
    d_z = dense_like(d_y, x)
    if activation != "identity":
        bias = bias.contiguous() if bias is not None else None
        d_z = _run_forward(x, weight, bias, stride, activation, d_z)
    B, C, H, W = x.shape
    O, K = weight.shape[0], weight.shape[2]
    OH, OW = d_z.shape[2:]
    channels_last = is_channels_last(x)
    several_filters = O > C  # then 16 elements a thread spill, and so do 8 where the assembler saves on registers
    elements = 1024 if several_filters else 2048
    s = _settings.depthwise(B, C, OH, OW, channels_last, _heavy(x, weight), capability(x), elements=elements)
    d_x, d_weight = new_map(x, C, H, W), torch.empty_like(weight)
    d_bias = weight.new_empty(O)
    partial = x.new_empty((s.tiles, K * K + 1, O), dtype=torch.float32)
    launch(
        depthwise_backward,
        _settings.ceil_div(C, s.block_c) * s.tiles,
        {
            "d_x_ptr": d_x,
            "partial_ptr": partial,
            "d_z_ptr": d_z,
            "x_ptr": x,
            "weight_ptr": weight,
            "H": H,
            "OH": OH,
            "OW": OW,
            "W_steps": W // _step(W),
        },
        {
            "C": C,
            "MULT": O // C,
            "K": K,
            "STRIDE": stride,
            "W_STEP": _step(W),
            "CHANNELS_LAST": channels_last,
            "WIDE": max(C * H * W, O * OH * OW) >= _launch.WIDE_FROM,
            "BLOCK_C": s.block_c,
            "BLOCK_H": s.block_h,
            "BLOCK_W": s.block_w,
        },
        num_warps=max(s.num_warps, 2) if K > 3 else s.num_warps,
        # left alone, the assembler spills a value or two for the sake of fewer registers
        max_registers=200 if several_filters else 255,
    )
    launch(
        depthwise_filters,
        _settings.ceil_div((K * K + 1) * O, BLOCK),
        {"d_weight_ptr": d_weight, "d_bias_ptr": d_bias, "partial_ptr": partial, "tiles": s.tiles},
        {"O": O, "K": K, "BLOCK": BLOCK, "BLOCK_S": min(512, _settings.power_of_two(max(s.tiles, 1)))},
        num_warps=4,
    )
    return d_x, d_weight, d_bias


def both_passes(x: Tensor) -> None:
    """A forward and a backward pass over one small map: what `_triton` compiles to see whether it can."""
    weight = x.new_empty(x.shape[1], 1, 3, 3)
    backward(forward(x, weight, None, 1, "identity"), x, weight, None, 1, "identity")
