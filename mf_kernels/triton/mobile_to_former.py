"""Mobile -> Former in Triton: out = softmax_l(E^-0.5 q.x) x; keys and values are the map itself, unprojected.

Legend: B batch, C channels, L = H*W positions, M tokens, N heads, E = C/N head width, S splits of positions.
A program has one head and one split of the positions. It reads x once: the same tile gives the scores and is
summed under the softmax, online, with a running maximum. The splits leave (maximum, sum, weighted sum); a
second kernel merges them. Backward recomputes the weights from the log-sum-exp: one read of x, one write of
d_x. A head of more channels than a tile holds is cut into chunks: each chunk's program adds up the scores of
the whole head and sums its own channels. Tokens are padded to `TOKENS` columns, the least that a product takes.
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
    launch,
    new_map,
    position_arguments,
)

BLOCK = 64  # token channels that one program of the second stage of d_q finishes
MERGED_E = 32  # channels that one program of the merge finishes


@triton.jit
def exp_nonpositive(t):
    """exp(t) for t that is above 0 only by rounding; NaN stays NaN."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    return tl.exp2(tl.minimum(t, 0.0, propagate_nan=tl.PropagateNan.ALL) * LOG2_E)


@triton.jit
def finite_or_zero(highest):
    """A maximum to subtract: where all scores are -inf, 0, so that they weigh exp(-inf) = 0 and not NaN."""
    return tl.where(highest == float("-inf"), 0.0, highest)


@triton.jit
def mobile_to_former_forward(
    out_ptr,  # [B, M, C], or where S > 1 [S, B, M, C] float32: weighted sums, not yet divided
    log_sum_exp_ptr,  # [B, N, M] float32, or where S > 1 None
    maximum_ptr,  # [S, B, N, M] float32, or where S = 1 None
    sum_ptr,  # [S, B, N, M] float32, or where S = 1 None
    x_ptr,  # [B, C, L]
    q_ptr,  # [B, M, C]
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
    # chunks and heads of the same positions run side by side: they share lines of memory
    program = tl.program_id(0)
    chunk = program % CHUNKS
    n = program // CHUNKS % N
    split = program // (CHUNKS * N) % splits
    b = (program // (CHUNKS * N) // splits).to(tl.int64)
    m = tl.arange(0, TOKENS)
    own = chunk * BLOCK_E + tl.arange(0, BLOCK_E)
    q = load_tokens(q_ptr, b, m, n, own, M, C, E)

    highest = tl.full((TOKENS,), float("-inf"), tl.float32)
    acc_sum = tl.zeros((BLOCK_L, TOKENS), tl.float32)  # over positions at the end, not in every step
    acc = tl.zeros((BLOCK_E, TOKENS), tl.float32)
    for tile in range(tiles):
        pos = (split * tiles + tile) * BLOCK_L + tl.arange(0, BLOCK_L)
        x, _, _ = load_head(x_ptr, b, n, own, pos, L, C, E, CHANNELS_LAST, WIDE)
        # score[l, m] = E^-0.5 sum_e x[e, l] q[m, e]
        if CHUNKS == 1:
            scores = product(x, tl.trans(q), TF32)
        else:
            scores = tl.zeros((BLOCK_L, TOKENS), tl.float32)
            for i in range(CHUNKS):
                e = i * BLOCK_E + tl.arange(0, BLOCK_E)
                x_i, _, _ = load_head(x_ptr, b, n, e, pos, L, C, E, CHANNELS_LAST, WIDE)
                scores += product(x_i, tl.trans(load_tokens(q_ptr, b, m, n, e, M, C, E)), TF32)
        scores = tl.where(pos[:, None] < L, scores * SCALE, float("-inf"))
        # online softmax: what was summed under the old maximum is scaled to the new one
        before = highest
        highest = tl.maximum(before, tl.max(scores, axis=0))
        correction = exp_nonpositive(before - finite_or_zero(highest))
        weight = exp_nonpositive(scores - finite_or_zero(highest)[None, :])
        acc_sum = acc_sum * correction[None, :] + weight
        acc = acc * correction[None, :] + product(tl.trans(x), weight.to(x.dtype), TF32)
    total = tl.sum(acc_sum, axis=0)

    at = (b * N + n) * M + m
    if log_sum_exp_ptr is not None:
        store_partial(out_ptr, acc / total[None, :], b, m, n, own, M, C, E)
        if chunk == 0:
            tl.store(log_sum_exp_ptr + at, highest + tl.log(total), mask=m < M)
    else:
        first = split.to(tl.int64) * B * M
        store_partial(out_ptr + first * C, acc, b, m, n, own, M, C, E)
        if chunk == 0:
            tl.store(maximum_ptr + first * N + at, highest, mask=m < M)
            tl.store(sum_ptr + first * N + at, total, mask=m < M)


@triton.jit
def mobile_to_former_merge(
    out_ptr,  # [B, M, C]
    log_sum_exp_ptr,  # [B, N, M] float32
    partial_ptr,  # [S, B, M, C] float32
    maximum_ptr,  # [S, B, N, M] float32
    sum_ptr,  # [S, B, N, M] float32
    B,
    splits,  # S
    C: tl.constexpr,
    E: tl.constexpr,
    M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_S: tl.constexpr,  # no less than S
):
    """One token, some channels of one head: the splits' sums, each scaled to the maximum of all."""
    N: tl.constexpr = C // E
    CHUNKS: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    program = tl.program_id(0)
    chunk = program % CHUNKS
    n = program // CHUNKS % N
    m = program // (CHUNKS * N) % M
    b = (program // (CHUNKS * N * M)).to(tl.int64)
    s = tl.arange(0, BLOCK_S).to(tl.int64)
    e = chunk * BLOCK_E + tl.arange(0, BLOCK_E)

    at = (b * N + n) * M + m
    stride = B * M  # rows of one split
    maximum = tl.load(maximum_ptr + s * stride * N + at, mask=s < splits, other=float("-inf"))
    sums = tl.load(sum_ptr + s * stride * N + at, mask=s < splits, other=0.0)
    offset = (s[:, None] * stride + b * M + m) * C + n * E + e[None, :]
    partial = tl.load(partial_ptr + offset, mask=(s[:, None] < splits) & (e[None, :] < E), other=0.0)

    highest = tl.max(maximum, axis=0)
    correction = exp_nonpositive(maximum - finite_or_zero(highest))
    total = tl.sum(sums * correction, axis=0)
    out = tl.sum(partial * correction[:, None], axis=0) / total
    tl.store(out_ptr + (b * M + m) * C + n * E + e, out.to(out_ptr.dtype.element_ty), mask=e < E)
    if chunk == 0:
        tl.store(log_sum_exp_ptr + at, highest + tl.log(total))


@triton.jit
def mobile_to_former_backward(
    d_x_ptr,  # [B, C, L]
    d_q_ptr,  # [B, M, C], or where S > 1 [S, B, M, C] float32
    d_out_ptr,  # [B, M, C]
    x_ptr,  # [B, C, L]
    q_ptr,  # [B, M, C]
    out_ptr,  # [B, M, C]
    log_sum_exp_ptr,  # [B, N, M] float32
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
    q = load_tokens(q_ptr, b, m, n, own, M, C, E)
    d_out = load_tokens(d_out_ptr, b, m, n, own, M, C, E)
    log_sum_exp = tl.load(log_sum_exp_ptr + (b * N + n) * M + m, mask=m < M, other=0.0)

    # delta[m] = sum_e out[m, e] d_out[m, e] over the whole head: the diagonal of a product like d_weight below.
    # Where one position has all the weight, out is its x, and d_weight - delta has to be nothing at all.
    products = tl.zeros((TOKENS, TOKENS), tl.float32)
    for i in range(CHUNKS):
        e = i * BLOCK_E + tl.arange(0, BLOCK_E)
        d_out_i = load_tokens(d_out_ptr, b, m, n, e, M, C, E)
        products += product(load_tokens(out_ptr, b, m, n, e, M, C, E), tl.trans(d_out_i), TF32)
    delta = tl.sum(tl.where(m[:, None] == m[None, :], products, 0.0), axis=1)

    acc = tl.zeros((BLOCK_E, TOKENS), tl.float32)
    for tile in range(tiles):
        pos = (split * tiles + tile) * BLOCK_L + tl.arange(0, BLOCK_L)
        x, at, mask = load_head(x_ptr, b, n, own, pos, L, C, E, CHANNELS_LAST, WIDE)
        # d_weight[l, m] = sum_e x[e, l] d_out[m, e], and the scores again
        if CHUNKS == 1:
            scores = product(x, tl.trans(q), TF32)
            d_weight = product(x, tl.trans(d_out), TF32)
        else:
            scores = tl.zeros((BLOCK_L, TOKENS), tl.float32)
            d_weight = tl.zeros((BLOCK_L, TOKENS), tl.float32)
            for i in range(CHUNKS):
                e = i * BLOCK_E + tl.arange(0, BLOCK_E)
                x_i, _, _ = load_head(x_ptr, b, n, e, pos, L, C, E, CHANNELS_LAST, WIDE)
                scores += product(x_i, tl.trans(load_tokens(q_ptr, b, m, n, e, M, C, E)), TF32)
                d_weight += product(x_i, tl.trans(load_tokens(d_out_ptr, b, m, n, e, M, C, E)), TF32)
        # weight = exp(score - log_sum_exp), d_score = weight (d_weight - delta); padding is 0, even beside inf
        inside = (pos[:, None] < L) & (m[None, :] < M)
        weight = tl.where(inside, exp_nonpositive(scores * SCALE - log_sum_exp[None, :]), 0.0)
        d_score = tl.where(inside, weight * (d_weight - delta[None, :]), 0.0).to(q.dtype)
        # d_x[e, l] = E^-0.5 sum_m d_score[l, m] q[m, e] as key + sum_m weight[l, m] d_out[m, e] as value
        d_x = SCALE * product(d_score, q, TF32) + product(weight.to(d_out.dtype), d_out, TF32)
        tl.store(d_x_ptr + b * C * L + at, d_x.to(d_x_ptr.dtype.element_ty), mask=mask)
        # d_q[m, e] = E^-0.5 sum_l d_score[l, m] x[e, l]
        acc += product(tl.trans(x), d_score, TF32)
    first = split.to(tl.int64) * B * M * C  # 0 where S = 1
    store_partial(d_q_ptr + first, SCALE * acc, b, m, n, own, M, C, E)


def _check(x: Tensor, num_heads: int, q: Tensor, **others: Tensor) -> None:
    """A raw call comes here unchecked, and the kernels read by these shapes."""
    _checks.feature_map("mobile_to_former", x)
    _checks.tokens("mobile_to_former", "q", q, x, num_heads)
    _settings.check_tokens("mobile_to_former", "q", q.shape[1])
    for name, tokens in others.items():
        _checks.companion("mobile_to_former", name, tokens, x, tuple(q.shape), "(B, M, C)")


def _plan(
    x: Tensor, M: int, num_heads: int, backward: bool
) -> tuple[_settings.Attention, dict[str, Any], dict[str, Any]]:
    B, C, H, W = x.shape
    E = C // num_heads
    s = _settings.attention(B, H * W, E, num_heads, x.dtype, capability(x), backward=backward)
    positions, constants = position_arguments(x)
    arguments = {"B": B, "splits": s.splits, "tiles": s.tiles, **positions}
    return (
        s,
        arguments,
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


def forward(x: Tensor, q: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    """x (B, C, H, W), q (B, M, C) -> out (B, M, C), log_sum_exp (B, N, M) float32."""
    _check(x, num_heads, q)
    x, q = dense(x), q.contiguous()
    B, M, C = q.shape
    s, arguments, constants = _plan(x, M, num_heads, backward=False)
    out = torch.empty_like(q)
    log_sum_exp = x.new_empty((B, num_heads, M), dtype=torch.float32)
    split = s.splits > 1
    partial = x.new_empty((s.splits, B, M, C), dtype=torch.float32) if split else None
    maximum, sums = (x.new_empty((s.splits, B, num_heads, M), dtype=torch.float32) if split else None for _ in range(2))
    launch(
        mobile_to_former_forward,
        B * num_heads * s.chunks * s.splits,
        {
            "out_ptr": partial if split else out,
            "log_sum_exp_ptr": None if split else log_sum_exp,
            "maximum_ptr": maximum,
            "sum_ptr": sums,
            "x_ptr": x,
            "q_ptr": q,
            **arguments,
        },
        constants,
        num_warps=s.num_warps,
        num_stages=s.num_stages,
    )
    if split:
        E = C // num_heads
        block_e = min(MERGED_E, _settings.power_of_two(E))
        launch(
            mobile_to_former_merge,
            B * M * num_heads * _settings.ceil_div(E, block_e),
            {
                "out_ptr": out,
                "log_sum_exp_ptr": log_sum_exp,
                "partial_ptr": partial,
                "maximum_ptr": maximum,
                "sum_ptr": sums,
                "B": B,
                "splits": s.splits,
            },
            {"C": C, "E": E, "M": M, "BLOCK_E": block_e, "BLOCK_S": _settings.power_of_two(s.splits)},
            num_warps=4,
        )
    return out, log_sum_exp


def backward(
    d_out: Tensor, x: Tensor, q: Tensor, out: Tensor, log_sum_exp: Tensor, num_heads: int
) -> tuple[Tensor, Tensor]:
    """d_out, q, out (B, M, C), x (B, C, H, W), log_sum_exp (B, N, M) -> d_x (B, C, H, W), d_q (B, M, C)."""
    _check(x, num_heads, q, d_out=d_out, out=out)
    wanted = (q.shape[0], num_heads, q.shape[1])
    if tuple(log_sum_exp.shape) != wanted or log_sum_exp.dtype != torch.float32 or log_sum_exp.device != x.device:
        told = f"{tuple(log_sum_exp.shape)} of {log_sum_exp.dtype} on {log_sum_exp.device}"
        raise ValueError(f"mobile_to_former: statistics: expected (B, N, M) = {wanted} of torch.float32, got {told}")
    x, q, d_out, out = dense(x), q.contiguous(), d_out.contiguous(), out.contiguous()
    B, C, H, W = x.shape
    s, arguments, constants = _plan(x, q.shape[1], num_heads, backward=True)
    d_x, d_q = new_map(x, C, H, W), torch.empty_like(q)
    partial = x.new_empty((s.splits, *q.shape), dtype=torch.float32) if s.splits > 1 else None
    launch(
        mobile_to_former_backward,
        B * num_heads * s.chunks * s.splits,
        {
            "d_x_ptr": d_x,
            "d_q_ptr": d_q if partial is None else partial,
            "d_out_ptr": d_out,
            "x_ptr": x,
            "q_ptr": q,
            "out_ptr": out,
            "log_sum_exp_ptr": log_sum_exp.contiguous(),
            **arguments,
        },
        constants,
        num_warps=s.num_warps,
        num_stages=s.num_stages,
        # a narrow head needs fewer than the assembler tries to save, by spilling; a wide one needs all there are
        max_registers=168 if s.block_e == 16 else None,
    )
    if partial is not None:
        launch(
            sum_splits,
            _settings.ceil_div(q.numel(), BLOCK),
            {
                "first_ptr": d_q,
                "second_ptr": None,
                "partial_ptr": partial,
                "count": q.numel(),
                "splits": s.splits,
            },
            {"BLOCK": BLOCK, "BLOCK_S": min(64, _settings.power_of_two(s.splits))},
            num_warps=4,
        )
    return d_x, d_q


def both_passes(x: Tensor) -> None:
    """A forward and a backward pass over one small map: what `_triton` compiles to see whether it can."""
    tokens = x.new_empty(1, 6, x.shape[1])
    gathered, log_sum_exp = forward(x, tokens, 1)
    backward(gathered, x, tokens, gathered, log_sum_exp, 1)
