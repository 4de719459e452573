"""Tile sizes, warps, stages and splits of every kernel: pure functions of shape, dtype and capability.

Rules, and why they are what they are:

* a thread should have two 16-byte loads in flight and a tile should waste few lanes on padding;
* the position axis is split until there are a few programs for every multiprocessor: batch 1 fills the card;
* nothing here is searched for at run time: the same call always launches the same kernels.

Legend: B batch, C channels, L = H*W positions, E head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

INTERPRETER = (0, 0)  # in place of a compute capability


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def multiprocessors(capability: tuple[int, int]) -> int:
    """Of the largest card of a compute capability; enough for it is enough for the smaller ones."""
    if capability == INTERPRETER:
        return 2  # one program after the other: enough to split an axis, and to leave tiles for a loop
    return 132 if capability >= (9, 0) else 108


def block_of(n: int, candidates: Sequence[int]) -> int:
    """The largest candidate that pads n by an eighth at most, else the one that pads least."""

    def used(block: int) -> float:
        return n / (ceil_div(n, block) * block)

    ordered = sorted(candidates, reverse=True)
    return next((block for block in ordered if used(block) >= 0.875), max(ordered, key=used))


def splits_of(tiles: int, programs: int, wanted: int, most: int) -> int:
    """Into how many runs of whole tiles an axis is cut, so that `programs` times that is about `wanted`."""
    splits = min(tiles, most, max(1, ceil_div(wanted, max(programs, 1))))
    return ceil_div(tiles, ceil_div(tiles, splits))  # no empty split


def fill(block: int, least: int, length: int, programs: int, wanted: int) -> int:
    """The block along an axis, halved down to `least` until there are as many programs as wanted."""
    while block > least and programs * ceil_div(length, block) < wanted:
        block //= 2
    return block


class DynamicReLU(NamedTuple):
    """Tile of channels and positions; `tiles` of positions in each of `splits` for the backward sums."""

    block_c: int
    block_l: int
    tiles: int
    splits: int
    num_warps: int


def dynamic_relu(
    B: int, C: int, L: int, dtype: torch.dtype, channels_last: bool, capability: tuple[int, int]
) -> DynamicReLU:
    # 32 bytes, the smallest piece of memory that moves, along the axis whose elements are neighbours
    if channels_last:
        block_c = block_of(C, (16, 32, 64))
        # rows off the 16 bytes that move at once take twice the addresses: half the elements for a thread
        elements = 2048 if C * dtype.itemsize % 16 == 0 else 1024
        block_l = min(elements // block_c, max(4, power_of_two(L)))
        block_l = fill(block_l, 8, L, B * ceil_div(C, block_c), multiprocessors(capability))
    else:
        block_l = block_of(L, (64, 128, 256, 512, 1024)) if L > 32 else power_of_two(L)
        block_c = min(2048 // block_l, power_of_two(C), 32)
        block_c = fill(block_c, 1, C, B * ceil_div(L, block_l), multiprocessors(capability))
    all_tiles = ceil_div(L, block_l)
    splits = splits_of(all_tiles, B * ceil_div(C, block_c), 4 * multiprocessors(capability), 64)
    return DynamicReLU(block_c, block_l, ceil_div(all_tiles, splits), splits, 4 if block_c * block_l >= 1024 else 1)


class Attention(NamedTuple):
    """Tile of positions, channels of one head and padded tokens; the splits of the position axis."""

    block_l: int
    block_e: int  # a head of more channels is cut into `chunks`
    chunks: int
    tokens: int
    tiles: int  # of block_l positions in each split
    splits: int
    num_warps: int
    num_stages: int


def check_tokens(op: str, name: str, tokens: int) -> None:
    """Raise ValueError where the kernels have no room for so many tokens."""
    if not 1 <= tokens <= 8:
        raise ValueError(f"{op}: {name}: expected 1 to 8 tokens, got {tokens}")


def attention(
    B: int,
    L: int,
    E: int,
    num_heads: int,
    dtype: torch.dtype,
    capability: tuple[int, int],
    *,
    backward: bool,
) -> Attention:
    depth = 16  # the least that `tl.dot` takes in Triton 3.6, in float32 too: tokens and channels are padded to it
    block_e = min(max(depth, power_of_two(E)), 64 if dtype == torch.float32 else 128)
    chunks = ceil_div(E, block_e)
    aligned = E * dtype.itemsize % 16 == 0
    elements = 2048 if backward or dtype == torch.float32 or not aligned else 4096
    block_l = max(16, min(128, elements // block_e, power_of_two(L)))
    if backward and dtype == torch.float32 and chunks > 2:
        block_l = 16  # wider tiles spill
    programs = B * num_heads * chunks
    block_l = fill(block_l, min(block_l, 32), L, programs, multiprocessors(capability))
    all_tiles = ceil_div(L, block_l)
    splits = splits_of(all_tiles, programs, 4 * multiprocessors(capability), 128)
    num_warps = 4 if block_l * block_e >= 1024 else 2
    if backward and dtype == torch.float32 and (block_l == 128 or chunks > 1):
        num_warps = 8  # with 4 it spills
    return Attention(block_l, block_e, chunks, depth, ceil_div(all_tiles, splits), splits, num_warps, 2)


class SpatialGradient(NamedTuple):
    """As `Attention`, of all channels as one head."""

    block_l: int
    block_c: int  # more channels are cut into `chunks`
    chunks: int
    tokens: int
    tiles: int  # of block_l positions in each split
    splits: int
    num_warps: int


def spatial_gradient(B: int, C: int, L: int, capability: tuple[int, int]) -> SpatialGradient:
    """Of a spatial dynamic ReLU's backward pass: a tile has two slopes, a chunk two sums for every token."""
    block_c = block_of(C, (32, 64)) if C > 16 else 16
    chunks = ceil_div(C, block_c)
    block_l = max(16, min(1024 // block_c, power_of_two(L)))  # twice of it spills
    all_tiles = ceil_div(L, block_l)
    splits = splits_of(all_tiles, B * chunks, 4 * multiprocessors(capability), 128)
    num_warps = 4 if block_l * block_c >= 1024 else 2
    return SpatialGradient(block_l, block_c, chunks, 16, ceil_div(all_tiles, splits), splits, num_warps)


class Depthwise(NamedTuple):
    """A tile of channels, rows and columns, and how many tiles of positions the whole batch has."""

    block_c: int
    block_h: int
    block_w: int
    tiles: int
    num_warps: int


def depthwise(
    B: int,
    channels: int,
    height: int,
    width: int,
    channels_last: bool,
    heavy: bool,
    capability: tuple[int, int],
    *,
    elements: int = 2048,
) -> Depthwise:
    """`height` and `width` are those of the output, `channels` those that the tiles cut, into `elements` at most.

    `heavy`: an element takes more registers than it has to, so that a thread gets half as many. That is so for
    float32, for 25 taps, and where neighbours are not loaded 16 bytes at once: contiguous maps (a tap shifts the
    row off its alignment), several filters a channel, channels that do not fill 16 bytes.
    """
    if channels_last:
        block_c = block_of(channels, (16, 32, 64))
        block_w = min(8, power_of_two(width))
    else:
        block_c = min(2, power_of_two(channels))
        block_w = min(block_of(width, (8, 16, 32, 64)), power_of_two(width))
    # As square as it goes: the rows above and below a tile are read once more by its neighbours.
    block_h = max(1, min(elements // (block_c * block_w), power_of_two(height), 16))
    rows_of_tiles = B * ceil_div(channels, block_c) * ceil_div(width, block_w)
    block_h = fill(block_h, min(block_h, 2), height, rows_of_tiles, multiprocessors(capability))
    tiles = B * ceil_div(height, block_h) * ceil_div(width, block_w)
    share = elements // 4 if heavy else elements // 2
    return Depthwise(block_c, block_h, block_w, tiles, max(1, min(4, block_c * block_h * block_w // share)))
