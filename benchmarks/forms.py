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
from mobileformer import layout

VARIANT = "294m"
# Layers of a block in the order of `mf_kernels.token_side`, which then wants those of its dynamic ReLUs
TOKEN_SIDE = (
    *(f"mobile_to_former.{layer}" for layer in ("gate", "project", "norm")),
    *(f"former.{layer}" for layer in ("query", "project", "norm", "ffn_expand", "ffn_project", "ffn_norm")),
    *(f"former_to_mobile.{layer}" for layer in ("key", "value")),
)


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
    weights = {layer.name: layer.shape for layer in layout.layers(config, num_classes=1000, in_chans=3)}
    for index, block in enumerate(config.blocks):
        C, incoming = incoming, block.out_channels
        if block.kind != "same" or incoming != C:
            continue
        relus = [c for c in layout.convolutions(block, C, config.groups) if c.dynamic_relu]
        names = [*TOKEN_SIDE, *(f"{relu.name}_relu.{layer}" for relu in relus for layer in ("reduce", "expand"))]
        shapes: dict[str, tuple[int, ...]] = {"tokens": (1, M, D), "gathered": (1, M, C)}
        for number, name in enumerate(names):
            weight = weights[f"blocks.{index}.{name}"]
            shapes |= {f"p{number}_weight": weight, f"p{number}_bias": weight[:1]}
        name = f"1x{M}x{D}-{C}channels-{relus[0].out_channels}slopes"
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
