"""Former -> Mobile: every position of the feature map attends over the M tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from mf_kernels import _checks, _registry, reference
from mf_kernels.ops import _library

NAME = "former_to_mobile"


def former_to_mobile(x: Tensor, k: Tensor, v: Tensor, *, num_heads: int = 2) -> Tensor:
    """The feature map gathers from the tokens; queries are the map itself, unprojected; the residual is included.

    For head n over channels n*E ... (n+1)*E - 1, with E = C / N:

        y[b, c, l] = x[b, c, l] + sum_m softmax_m(E^-0.5 * sum_e x[b, e, l] k[b, m, e]) v[b, m, c]

    ========  =============  ==========================================================
    argument  shape          dtype and layout
    ========  =============  ==========================================================
    x         (B, C, H, W)   floating point; contiguous or channels_last without a copy
    k, v      (B, M, C)      x's dtype; kernels for M from 1 to 8, the reference above
    returns   (B, C, H, W)   x's dtype and layout
    ========  =============  ==========================================================

    `num_heads` N divides C. Products and sums are accumulated in float32 (float64 for float64 input).
    Differentiable once in x, k and v. Under autocast all are cast to its dtype.

    Raises ValueError (shape, device, heads) or TypeError (dtype), naming the argument.
    Source: Mobile-Former, CVPR 2022, section 3.2, "Former to Mobile"; heads and scale as in the published code.
    """
    if has_torch_function_unary(x):  # a tracer's stand-in, or a tensor of somebody's class
        return handle_torch_function(former_to_mobile, (x,), x, k, v, num_heads=num_heads)
    _checks.feature_map(NAME, x)
    x, k, v = _checks.autocast(x, k, v)
    _checks.tokens(NAME, "k", k, x, num_heads)
    _checks.companion(NAME, "v", v, x, tuple(k.shape), "(B, M, C)")
    backend = _registry.route(NAME, _checks.device_type(x), x.dtype, k.shape[1])
    if backend == "reference":
        return reference.former_to_mobile(x, k, v, num_heads=num_heads)
    if torch.is_grad_enabled() and (x.requires_grad or k.requires_grad or v.requires_grad):
        return _FormerToMobile.apply(x, k, v, num_heads, backend)
    return _FORWARD[backend](x, k, v, num_heads)


def former_to_mobile_(x: Tensor, k: Tensor, v: Tensor, *, num_heads: int = 2) -> Tensor:
    """`former_to_mobile(x, k, v)` for a caller who is done with x: x may hold the result afterwards, or anything.

    Written over x where a kernel serves, no gradient is needed and x lies contiguous or channels_last; else a new map.
    Always use the returned map. Shapes, dtypes and errors as `former_to_mobile`.
    """
    if has_torch_function_unary(x):  # a tracer's stand-in, or a tensor of somebody's class
        return handle_torch_function(former_to_mobile_, (x,), x, k, v, num_heads=num_heads)
    if not _library.serves_in_place(NAME, x) or k.dim() != 3 or k.shape[1] > _registry.MAX_TOKENS:
        return former_to_mobile(x, k, v, num_heads=num_heads)
    _checks.feature_map(NAME, x)
    _checks.tokens(NAME, "k", k, x, num_heads)
    _checks.companion(NAME, "v", v, x, tuple(k.shape), "(B, M, C)")
    _IN_PLACE["native"](x, k, v, num_heads)
    torch.autograd.graph.increment_version(x)  # or a gradient that needs the old x would not notice
    return x


def _forward_fake(x: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    return _library.empty_map(x, x.shape[1], x.shape[2], x.shape[3])


def _backward_fake(d_y: Tensor, x: Tensor, k: Tensor, v: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    d_x = _library.empty_map(x, x.shape[1], x.shape[2], x.shape[3])
    d_k = torch.empty_like(k, memory_format=torch.contiguous_format)
    return d_x, d_k, torch.empty_like(v, memory_format=torch.contiguous_format)


_FORWARD = _library.define(f"{NAME}_fwd", "(Tensor x, Tensor k, Tensor v, int num_heads) -> Tensor", _forward_fake)
_IN_PLACE = _library.define(
    f"{NAME}_", "(Tensor(a!) x, Tensor k, Tensor v, int num_heads) -> ()", lambda x, k, v, num_heads: None
)
_BACKWARD = _library.define(
    f"{NAME}_bwd",
    "(Tensor d_y, Tensor x, Tensor k, Tensor v, int num_heads) -> (Tensor d_x, Tensor d_k, Tensor d_v)",
    _backward_fake,
)


class _FormerToMobile(torch.autograd.Function):
    """Saves its inputs only: a softmax over at most 8 scores costs less to redo than to keep."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, k: Tensor, v: Tensor, num_heads: int, backend: str) -> Tensor:
        ctx.save_for_backward(x, k, v)
        ctx.num_heads, ctx.backend = num_heads, backend
        return _FORWARD[backend](x, k, v, num_heads)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        gradients = _BACKWARD[ctx.backend](d_y, *ctx.saved_tensors, ctx.num_heads)
        return (*_library.first_order_only(NAME, d_y, gradients), None, None)
