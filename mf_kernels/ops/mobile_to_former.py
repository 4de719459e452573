"""Mobile -> Former: M tokens attend over the L = H*W positions of the feature map."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from mf_kernels import _checks, _registry, reference
from mf_kernels.ops import _library

NAME = "mobile_to_former"


def mobile_to_former(x: Tensor, q: Tensor, *, num_heads: int = 2) -> Tensor:
    """Tokens gather from the feature map; keys and values are the map itself, unprojected.

    For head n over channels n*E ... (n+1)*E - 1, with E = C / N:

        out[b, m, c] = sum_l softmax_l(E^-0.5 * sum_e q[b, m, e] x[b, e, l]) x[b, c, l]

    ========  =============  ==========================================================
    argument  shape          dtype and layout
    ========  =============  ==========================================================
    x         (B, C, H, W)   floating point; contiguous or channels_last without a copy
    q         (B, M, C)      x's dtype; kernels for M from 1 to 8, the reference above
    returns   (B, M, C)      x's dtype
    ========  =============  ==========================================================

    `num_heads` N divides C. Products and sums are accumulated in float32 (float64 for float64 input).
    Differentiable once in x and q. Under autocast both are cast to its dtype.

    Raises ValueError (shape, device, heads) or TypeError (dtype), naming the argument.
    Source: Mobile-Former, CVPR 2022, section 3.2, "Mobile to Former"; heads and scale as in the published code.
    """
    if has_torch_function_unary(x):  # a tracer's stand-in, or a tensor of somebody's class
        return handle_torch_function(mobile_to_former, (x,), x, q, num_heads=num_heads)
    _checks.feature_map(NAME, x)
    x, q = _checks.autocast(x, q)
    _checks.tokens(NAME, "q", q, x, num_heads)
    backend = _registry.route(NAME, _checks.device_type(x), x.dtype, q.shape[1])
    if backend == "reference":
        return reference.mobile_to_former(x, q, num_heads=num_heads)
    if torch.is_grad_enabled() and (x.requires_grad or q.requires_grad):
        return _MobileToFormer.apply(x, q, num_heads, backend)
    return _FORWARD[backend](x, q, num_heads)[0]


def _forward_fake(x: Tensor, q: Tensor, num_heads: int, *, native: bool) -> tuple[Tensor, Tensor]:
    """With what backward needs: log-sum-exp (B, N, M), of the CPU's library largest score and sum (B, N, M, 2)."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    pairs = (2,) if native and x.is_cpu else ()
    shape = (q.shape[0], num_heads, q.shape[1], *pairs)
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(shape, dtype=dtype)


def _backward_fake(
    d_out: Tensor, x: Tensor, q: Tensor, out: Tensor, statistics: Tensor, num_heads: int
) -> tuple[Tensor, Tensor]:
    d_x = _library.empty_map(x, x.shape[1], x.shape[2], x.shape[3])
    return d_x, torch.empty_like(q, memory_format=torch.contiguous_format)


_FORWARD = _library.define(
    f"{NAME}_fwd",
    "(Tensor x, Tensor q, int num_heads) -> (Tensor out, Tensor statistics)",
    {name: functools.partial(_forward_fake, native=name == "native") for name in ("native", "triton")},
)
_BACKWARD = _library.define(
    f"{NAME}_bwd",
    "(Tensor d_out, Tensor x, Tensor q, Tensor out, Tensor statistics, int num_heads) -> (Tensor d_x, Tensor d_q)",
    _backward_fake,
)


class _MobileToFormer(torch.autograd.Function):
    """Saves x, q, the output and the statistics of the softmax; the attention map is never stored."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, q: Tensor, num_heads: int, backend: str) -> Tensor:
        out, statistics = _FORWARD[backend](x, q, num_heads)
        ctx.save_for_backward(x, q, out, statistics)
        ctx.num_heads, ctx.backend = num_heads, backend
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        gradients = _BACKWARD[ctx.backend](d_out, *ctx.saved_tensors, ctx.num_heads)
        return (*_library.first_order_only(NAME, d_out, gradients), None, None)
