"""What `torch.utils.flop_counter.FlopCounterMode` counts for the operators: the same as for the reference.

It counts convolutions and matrix products, a multiply-add as two, and so do these formulas: not an activation, a norm
or a softmax, and in a backward pass not what a kernel computes again in place of having kept it. An operator that is
not named here has neither. Its own formula for the gradient of a convolution ignores groups; that is used as it is.

That module imports Triton, if it is there. So the formulas wait until somebody imports it.
"""

from __future__ import annotations

import importlib.machinery
import math
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

from mf_kernels.ops import _library

_COUNTER = "torch.utils.flop_counter"
_Shape = Sequence[int]


def register() -> None:
    """Tell the counter now if it is there, else as soon as it is imported."""
    module = sys.modules.get(_COUNTER)
    if module is not None:
        _tell(module)
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


class _Waiting:
    """A finder of modules that knows one, and leaves when that has been asked for."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != _COUNTER:
            return None
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_tell(module: ModuleType) -> None:
            execute(module)
            _tell(module)

        spec.loader.exec_module = execute_and_tell
        return spec


def _tell(counter: Any) -> None:
    operators = torch.ops.mf_kernels

    def depthwise_backward(
        d_y: _Shape, x: _Shape, weight: _Shape, bias: _Shape | None, stride: int, activation: str, out_shape: Any
    ) -> int:
        mask = (True, True, bias is not None)
        return counter.conv_backward_flop(
            d_y, x, weight, bias, stride, None, None, False, None, 1, mask, out_val=out_shape
        )

    formulas = {
        operators.mobile_to_former_fwd: lambda x, q, *_, **__: 2 * _attention(x, q),
        operators.mobile_to_former_bwd: lambda d_out, x, q, *_, **__: 4 * _attention(x, q),
        operators.former_to_mobile_fwd: lambda x, k, *_, **__: 2 * _attention(x, k),
        operators.former_to_mobile_: lambda x, k, *_, **__: 2 * _attention(x, k),
        operators.former_to_mobile_bwd: lambda d_y, x, k, *_, **__: 4 * _attention(x, k),
        operators.spatial_dynamic_relu_fwd: lambda x, theta, *_, **__: 2 * _attention(x, theta),
        operators.spatial_dynamic_relu_: lambda x, theta, *_, **__: 2 * _attention(x, theta),
        operators.spatial_dynamic_relu_bwd: lambda d_y, x, theta, *_, **__: 4 * _attention(x, theta),
        operators.depthwise_conv2d_fwd: lambda x, w, *_, out_shape, **__: counter.conv_flop_count(x, w, out_shape),
        operators.depthwise_conv2d_bwd: depthwise_backward,
        operators.depthwise_dynamic_relu: lambda x, w, *_, out_shape, **__: counter.conv_flop_count(x, w, out_shape),
        operators.token_side: lambda tokens, gathered, parameters, *_, **__: 2 * _token_side(tokens, parameters),
    }
    for operator, formula in formulas.items():
        if operator not in counter.flop_registry:
            counter.register_flop_formula(operator)(formula)


def fvcore_handles() -> dict[str, Callable[[Sequence[Any], Sequence[Any]], int]]:
    """What fvcore counts for the operators of a traced model, a multiply-add as one.

        analysis = fvcore.nn.FlopCountAnalysis(model, x)
        analysis.set_op_handle(**mf_kernels.fvcore_handles())

    Without them fvcore leaves the fused operators out, and names them among those that it does not support. fvcore
    itself is not imported here. Norms, activations and what folds a norm count nothing, as with the plain model's
    multiply-adds of convolutions, linear layers and matrix products.
    """
    nothing = [name for name in _library.DEFINED if not name.endswith("_bwd")]  # but for those named here
    counts: dict[str, Callable[[Sequence[Any], Sequence[Any]], int]] = {
        "mobile_to_former_fwd": lambda given, _: _attention(_sizes(given[0]), _sizes(given[1])),
        "former_to_mobile_fwd": lambda given, _: _attention(_sizes(given[0]), _sizes(given[1])),
        "former_to_mobile_": lambda given, _: _attention(_sizes(given[0]), _sizes(given[1])),
        "spatial_dynamic_relu_fwd": lambda given, _: _attention(_sizes(given[0]), _sizes(given[1])),
        "spatial_dynamic_relu_": lambda given, _: _attention(_sizes(given[0]), _sizes(given[1])),
        "depthwise_conv2d_fwd": lambda given, made: _depthwise(_sizes(given[1]), _sizes(made[0])),
        "depthwise_dynamic_relu": lambda given, made: _depthwise(_sizes(given[1]), _sizes(made[0])),
        "token_side": lambda given, _: _token_side(
            _sizes(given[0]), [_sizes(value) for value in given[2].node().inputs()]
        ),
    }
    counts = dict.fromkeys(nothing, lambda given, made: 0) | counts
    return {f"mf_kernels::{name}": count for name, count in counts.items()}


def _sizes(value: Any) -> _Shape:
    """Of a tensor in a traced graph."""
    return value.type().sizes()


def _attention(x: _Shape, tokens: _Shape) -> int:
    """Multiply-adds of two products of a map and tokens: scores and what they weight, or both slopes of a position."""
    return 2 * math.prod(x) * tokens[1]


def _depthwise(weight: _Shape, y: _Shape) -> int:
    return math.prod(y) * math.prod(weight[2:])


def _token_side(tokens: _Shape, parameters: Sequence[_Shape]) -> int:
    """The linear layers of all tokens, those that make the slopes of the first token, and the attention."""
    batch, count, width = tokens
    layers = [batch * math.prod(shape) for shape in parameters if len(shape) == 2]
    of_all, of_first = layers[:8], layers[8:]
    return count * sum(of_all) + sum(of_first) + _attention((batch, width, count), tokens)
