"""The inference forms of the operators as rows: what a block calls where no gradient is needed.

Made from the rows of `mf_kernels.testing`, and of the blocks of a variant; no shapes of their own. Their plain
form is the chain of operations they stand for, so a row is checked and timed like any other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

import mf_kernels
import mobileformer
from mf_kernels import reference, testing

VARIANT = "294m"


@dataclass(frozen=True, eq=False)
class Form(testing.Case):
    """A row of an operator that `mf_kernels.reference` has no equation of its own for."""

    fused: Callable[..., Tensor] = mf_kernels.dynamic_relu
    plain: Callable[..., Tensor] = reference.dynamic_relu

    def function(self, module: ModuleType) -> Callable[..., Tensor]:
        return functools.partial(self.plain if module is reference else self.fused, **self.options)

    def inputs(
        self, dtype: torch.dtype, *, layout: str = "contiguous", seed: int = 0, device: str = "cpu"
    ) -> dict[str, Tensor]:
        """As every row's, with the matrices of linear layers of a size that keeps values of size 1."""
        arguments = super().inputs(dtype, layout=layout, seed=seed, device=device)
        return {
            name: t / t.shape[-1] ** 0.5 if name.startswith("p") and t.dim() == 2 else t
            for name, t in arguments.items()
        }


def _plain_depthwise_dynamic_relu(x: Tensor, weight: Tensor, bias: Tensor, theta: Tensor, *, stride: int) -> Tensor:
    y = reference.depthwise_conv2d(x, weight, bias, stride=stride, activation="identity")
    return reference.dynamic_relu(y, theta)


def _depthwise_dynamic_relu(case: testing.Case) -> Form:
    outputs = case.shapes["weight"][0]
    shapes = case.shapes | {"theta": (case.shapes["x"][0], 2 * outputs)}
    stride = case.options["stride"]
    name = case.name.replace("-identity", "")
    return Form(
        "depthwise_dynamic_relu",
        name,
        shapes,
        "layer",
        {"stride": stride},
        (VARIANT,),
        mf_kernels.depthwise_dynamic_relu,
        _plain_depthwise_dynamic_relu,
    )


def _token_side(tokens: Tensor, gathered: Tensor, **parameters: Tensor) -> Tensor:
    """All its results in a row, which costs some microseconds on both sides."""
    results = mf_kernels.token_side(tokens, gathered, list(parameters.values()))
    return torch.cat([result.flatten() for result in results])


def _plain_token_side(*arguments: Tensor, **named: Tensor) -> Tensor:
    with mf_kernels.use_backend("reference"):
        return _token_side(*arguments, **named)


def _token_sides() -> list[Form]:
    """Of the same blocks of the variant, one of every width."""
    config = mobileformer.VARIANTS[VARIANT]
    M, D = config.num_tokens, config.token_dim
    forms: dict[str, Form] = {}
    incoming = config.stem_channels
    for block in config.blocks:
        C, incoming = incoming, block.out_channels
        if block.kind != "same" or incoming != C:
            continue
        slopes = [block.expansion * C] * 2
        layers = [(C, D), (D, C), None, (D, D), (D, D), None, (2 * D, D), (D, 2 * D), None, (C, D), (C, D)]
        for width in slopes:
            layers += [(D // 4, D), (2 * width, D // 4)]
        shapes: dict[str, tuple[int, ...]] = {"tokens": (1, M, D), "gathered": (1, M, C)}
        for index, layer in enumerate(layers):
            shapes |= {f"p{index}_weight": layer or (D,), f"p{index}_bias": (layer or (D,))[:1]}
        name = f"1x{M}x{D}-{C}channels-{slopes[0]}slopes"
        forms[name] = Form(
            "token_side", name, shapes, "layer", {}, (VARIANT,), fused=_token_side, plain=_plain_token_side
        )
    return list(forms.values())


FORMS: tuple[Form, ...] = (
    *(
        _depthwise_dynamic_relu(case)
        for case in testing.TIMED
        if case.op == "depthwise_conv2d" and VARIANT in case.layer_of and case.options["activation"] == "identity"
    ),
    *_token_sides(),
)
