"""What the kernels share on the device: where an element lies, the hard sigmoid, products, sums over splits.

Legend: B batch, C channels, L = H*W positions, S splits of the position axis.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def map_offset(
    c,  # channel
    pos,  # position
    L,
    C: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,  # a sample has 2^31 elements or more
):
    """Where (c, pos) lies from the start of its sample."""
    if WIDE:
        c = c.to(tl.int64)
        pos = pos.to(tl.int64)
    if CHANNELS_LAST:
        return pos * C + c
    return c * L + pos


@triton.jit
def hard_sigmoid(t):
    """clamp(t + 3, 0, 6) / 6; NaN stays NaN."""
    return tl.clamp(t + 3.0, 0.0, 6.0, propagate_nan=tl.PropagateNan.ALL) / 6.0


@triton.jit
def slope_gradient(d_slope, theta):
    """d_theta of a slope 2 hsig(theta) + const: torch.clamp passes the gradient at both ends, and 0 beyond them."""
    return tl.where((theta + 3.0 >= 0.0) & (theta + 3.0 <= 6.0), d_slope * (1.0 / 3.0), 0.0)


@triton.jit
def product(a, b, ALLOW_TF32: tl.constexpr):
    """a @ b accumulated in float32. a and b have one dtype."""
    if INTERPRETED:  # which multiplies the bits of bfloat16 as if they were integers
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision="tf32" if ALLOW_TF32 else "ieee")


@triton.jit
def sum_over_splits(
    partial_ptr,  # [S, count] float32
    index,  # [BLOCK] which of `count`
    mask,  # [BLOCK]
    count,
    splits,  # S
    BLOCK: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """[BLOCK]: the sum over S, in an order that depends on nothing but S."""
    acc = tl.zeros((BLOCK_S, BLOCK), tl.float32)
    for first in range(0, splits, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        offset = s[:, None].to(tl.int64) * count + index[None, :]
        acc += tl.load(partial_ptr + offset, mask=(s[:, None] < splits) & mask[None, :], other=0.0)
    return tl.sum(acc, axis=0)


@triton.jit
def load_tokens(
    tokens_ptr,  # [B, M, C]
    b,
    m,  # [TOKENS]: token, M or higher is padding
    n,  # head
    e,  # [BLOCK_E]: channel of the head, E or higher is padding
    M: tl.constexpr,
    C: tl.constexpr,
    E: tl.constexpr,
):
    """[TOKENS, BLOCK_E]: some channels of one head of every token; padding is 0."""
    at = (b * M + m[:, None]) * C + n * E + e[None, :]
    return tl.load(tokens_ptr + at, mask=(m[:, None] < M) & (e[None, :] < E), other=0.0)


@triton.jit
def load_head(
    x_ptr,  # [B, C, L]
    b,
    n,  # head
    e,  # [BLOCK_E]: channel of the head
    pos,  # [BLOCK_L]
    L,
    C: tl.constexpr,
    E: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
):
    """[BLOCK_L, BLOCK_E] of a map, where that lies in its sample, and which of it is no padding."""
    at = map_offset(n * E + e[None, :], pos[:, None], L, C, CHANNELS_LAST, WIDE)
    mask = (pos[:, None] < L) & (e[None, :] < E)
    return tl.load(x_ptr + b * C * L + at, mask=mask, other=0.0), at, mask


@triton.jit
def store_partial(
    partial_ptr,  # [B, M, C] float32 of one split
    value,  # [BLOCK_E, TOKENS]
    b,
    m,  # [TOKENS]
    n,
    e,  # [BLOCK_E]
    M: tl.constexpr,
    C: tl.constexpr,
    E: tl.constexpr,
):
    at = (b * M + m[None, :]) * C + n * E + e[:, None]
    mask = (m[None, :] < M) & (e[:, None] < E)
    tl.store(partial_ptr + at, value.to(partial_ptr.dtype.element_ty), mask=mask)


@triton.jit
def sum_splits(
    first_ptr,  # [count]
    second_ptr,  # [count] or None
    partial_ptr,  # [S, 1 or 2, count] float32
    count,
    splits,  # S
    BLOCK: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Second stage of a gradient of tokens: what the splits left is added and rounded once."""
    blocks = tl.cdiv(count, BLOCK)
    index = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = index < count
    if second_ptr is None:
        value = sum_over_splits(partial_ptr, index, mask, count, splits, BLOCK, BLOCK_S)
        tl.store(first_ptr + index, value.to(first_ptr.dtype.element_ty), mask=mask)
    else:
        which = tl.program_id(0) // blocks
        value = sum_over_splits(partial_ptr + which * count, index, mask, 2 * count, splits, BLOCK, BLOCK_S)
        if which == 0:
            tl.store(first_ptr + index, value.to(first_ptr.dtype.element_ty), mask=mask)
        else:
            tl.store(second_ptr + index, value.to(second_ptr.dtype.element_ty), mask=mask)
