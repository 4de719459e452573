"""What a block computes on its tokens alone, in one call: for inference, where calls and cold weights are the cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from mf_kernels import _checks, _registry
from mf_kernels.ops import _library
from mf_kernels.ops.mobile_to_former import mobile_to_former

NAME = "token_side"
MAX_ROWS = 64
_Of = TypeVar("_Of")


class TokenSideLayers(NamedTuple, Generic[_Of]):
    """Something of every layer of `token_side` before the slopes, in the order of its parameters.

    The kernel has the same names in the same order (csrc/cpu/token_side.h).
    """

    gate: _Of  # (C, D)
    bridge: _Of  # (D, C)
    bridge_norm: _Of  # (D,)
    query: _Of  # (D, D)
    mix: _Of  # (D, D)
    attention_norm: _Of  # (D,)
    expand: _Of  # (2D, D)
    contract: _Of  # (D, 2D)
    ffn_norm: _Of  # (D,)
    key: _Of  # (C', D)
    value: _Of  # (C', D)


_NAMES = TokenSideLayers._fields
_BEFORE_SLOPES = 2 * len(_NAMES)  # a weight and a bias each
_KEY, _VALUE = 2 * _NAMES.index("key"), 2 * _NAMES.index("value")


def token_side(
    tokens: Tensor, gathered: Tensor, parameters: Sequence[Tensor], *, num_heads: int = 4, eps: float = 1e-5
) -> list[Tensor]:
    """Put what the bridge gathered into the tokens, run the Former, and make what the block needs of the new tokens.

        t = LN(tokens + bridge(gathered 2 hsig(gate(tokens))))
        t = LN(t + mix(attention(query(t), t, t)))
        t = LN(t + contract(gelu(expand(t))))
        returns [t, key(t), value(t)] and for every dynamic ReLU expand_i(relu(reduce_i(t[:, 0])))

    ==========  =====================================  =========================================================
    argument    shape                                  dtype
    ==========  =====================================  =========================================================
    tokens      (B, M, D)                              any; the kernel serves float32 on CPU
    gathered    (B, M, C), of `mobile_to_former`       tokens'
    parameters  weight and bias of each layer of       tokens'
                `TokenSideLayers`, in that order, then
                for each dynamic ReLU of reduce
                (D/4,D) and expand (2K,D/4)
    returns     (B,M,D), (B,M,C'), (B,M,C'), (B,2K)..  tokens'
    ==========  =====================================  =========================================================

    One call in place of some 45, and every weight read once as it lies: for the few rows of a small batch, packing
    a weight costs more than multiplying by it. Serves B*M up to 64, D a multiple of 16 * `num_heads`, no gradient;
    everything else is these equations in PyTorch, differentiable.

    Raises ValueError (shape, device, heads, eps, how many parameters) or TypeError (dtype), naming the argument.
    Source: Mobile-Former, CVPR 2022, section 3.2 and figure 3, with the published code's gate and projections.
    """
    if has_torch_function_unary(tokens):  # a tracer's stand-in, or a tensor of somebody's class
        return handle_torch_function(token_side, (tokens,), tokens, gathered, parameters, num_heads=num_heads, eps=eps)
    _check(tokens, gathered, parameters, num_heads, eps)
    batch, num_tokens, width = tokens.shape
    fits = (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()  # a graph must not depend on the size of its batch
        and tokens.is_cpu
        and tokens.dtype == gathered.dtype == parameters[0].dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and batch * num_tokens <= MAX_ROWS
        and num_tokens <= _registry.MAX_TOKENS
        and width % (16 * num_heads) == 0
    )
    if not fits or _registry.helper_missing(NAME, "cpu"):
        _check_parameters(tokens, gathered, parameters)
        return _token_side_in_pytorch(tokens, gathered, parameters, num_heads, eps)
    try:
        return _FORWARD["native"](tokens, gathered, parameters, num_heads, eps)
    except RuntimeError:  # the kernel checks the same, at a tenth of the time; this has the words and the type
        _check_parameters(tokens, gathered, parameters)
        raise


def _check(tokens: Tensor, gathered: Tensor, parameters: Sequence[Tensor], num_heads: int, eps: float) -> None:
    _checks.tensor(NAME, "tokens", tokens)
    if tokens.dim() != 3 or tokens.shape[1] == 0 or tokens.shape[2] == 0:
        raise ValueError(f"{NAME}: tokens: expected (B, M, D), M and D of at least 1, got {tuple(tokens.shape)}")
    if tokens.dtype not in _checks.FLOATS:
        raise TypeError(f"{NAME}: tokens: expected a floating point dtype, got {tokens.dtype}")
    _checks.whole(NAME, "num_heads", num_heads)
    if num_heads < 1 or tokens.shape[2] % num_heads != 0:
        raise ValueError(f"{NAME}: num_heads: expected a divisor of D = {tokens.shape[2]}, got {num_heads}")
    _checks.epsilon(NAME, eps)
    _checks.tensor(NAME, "gathered", gathered)
    if gathered.dim() != 3 or gathered.shape[:2] != tokens.shape[:2] or gathered.shape[2] == 0:
        raise ValueError(
            f"{NAME}: gathered: expected (B, M, C) to go with tokens {tuple(tokens.shape)}, got {tuple(gathered.shape)}"
        )
    if not isinstance(parameters, Sequence) or not all(isinstance(parameter, Tensor) for parameter in parameters):
        raise TypeError(f"{NAME}: parameters: expected a sequence of tensors, got {type(parameters).__name__}")
    if len(parameters) < _BEFORE_SLOPES or len(parameters) % 4 != 2:
        raise ValueError(f"{NAME}: parameters: expected 22 tensors and 4 for each dynamic ReLU, got {len(parameters)}")


def _check_parameters(tokens: Tensor, gathered: Tensor, parameters: Sequence[Tensor]) -> None:
    """Every tensor's shape and device; its dtype, unless autocast sees to that."""
    width, channels = tokens.shape[2], gathered.shape[2]

    def outputs(place: int) -> int:  # as many as the weight has
        weight = parameters[place]
        return weight.shape[0] if weight.dim() == 2 and weight.shape[0] > 0 else 1

    layers: TokenSideLayers[tuple[int, ...]] = TokenSideLayers(
        gate=(channels, width),
        bridge=(width, channels),
        bridge_norm=(width,),
        query=(width, width),
        mix=(width, width),
        attention_norm=(width,),
        expand=(2 * width, width),
        contract=(width, 2 * width),
        ffn_norm=(width,),
        key=(outputs(_KEY), width),
        value=(outputs(_KEY), width),
    )
    weights = list(layers)
    for place in range(_BEFORE_SLOPES, len(parameters), 4):
        weights += [(width // 4, width), (outputs(place + 2), width // 4)]
    same = not _checks.autocasts(tokens)
    _checks.companion(NAME, "gathered", gathered, tokens, tuple(gathered.shape), "(B, M, C)", of="tokens", same=same)
    for place, shape in enumerate(weights):
        for offset, (expected, letters) in enumerate(((shape, "a weight"), (shape[:1], "a bias"))):
            name = f"parameters[{2 * place + offset}]"
            t = parameters[2 * place + offset]
            _checks.companion(NAME, name, t, tokens, expected, letters, of="tokens", same=same)


def _token_side_in_pytorch(
    tokens: Tensor, gathered: Tensor, parameters: Sequence[Tensor], num_heads: int, eps: float
) -> list[Tensor]:
    layers = [(parameters[i], parameters[i + 1]) for i in range(0, len(parameters), 2)]
    layer, slopes = TokenSideLayers(*layers[: len(_NAMES)]), layers[len(_NAMES) :]
    width = (tokens.shape[-1],)
    factor = (F.linear(tokens, *layer.gate) + 3).clamp(0, 6) / 3
    t = F.layer_norm(tokens + F.linear(gathered * factor, *layer.bridge), width, *layer.bridge_norm, eps)
    attended = mobile_to_former(t.transpose(1, 2).unsqueeze(2), F.linear(t, *layer.query), num_heads=num_heads)
    t = F.layer_norm(t + F.linear(attended, *layer.mix), width, *layer.attention_norm, eps)
    hidden = F.gelu(F.linear(t, *layer.expand))
    t = F.layer_norm(t + F.linear(hidden, *layer.contract), width, *layer.ffn_norm, eps)
    thetas = [
        F.linear(F.relu(F.linear(t[:, 0], *reduce)), *widen)
        for reduce, widen in zip(slopes[::2], slopes[1::2], strict=True)
    ]
    return [t, F.linear(t, *layer.key), F.linear(t, *layer.value), *thetas]


def _fake(tokens: Tensor, gathered: Tensor, parameters: Sequence[Tensor], num_heads: int, eps: float) -> list[Tensor]:
    batch, num_tokens, _ = tokens.shape
    outputs = [tokens.new_empty(tokens.shape)]
    outputs += [tokens.new_empty((batch, num_tokens, parameters[i].shape[0])) for i in (_KEY, _VALUE)]
    widened = range(_BEFORE_SLOPES + 2, len(parameters), 4)  # the second layer of each pair
    return outputs + [tokens.new_empty((batch, parameters[i].shape[0])) for i in widened]


_FORWARD = _library.define(
    NAME, "(Tensor tokens, Tensor gathered, Tensor[] parameters, int num_heads, float eps) -> Tensor[]", _fake
)
