"""The table of cases for tests and benchmarks: real layers, and a row for every branch of every kernel.

Legend: B batch, C channels, H W height and width, L = H*W, M tokens, N heads, E = C/N, K kernel side.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mf_kernels import reference

LAYOUTS = ("contiguous", "channels_last", "sliced", "permuted", "unaligned")


@dataclass(frozen=True, eq=False)
class Case:
    """One row: an operator, the shapes of its arguments by name, its options, the branch it is there for."""

    op: str
    name: str
    shapes: dict[str, tuple[int, ...]]
    reaches: str
    options: dict[str, Any] = field(default_factory=dict)
    layer_of: tuple[str, ...] = ()  # variants that have this layer at 224 x 224; such rows are timed

    @property
    def id(self) -> str:
        return f"{self.op}-{self.name}"

    @functools.cached_property
    def output_shape(self) -> tuple[int, ...]:
        arguments = {name: torch.empty(shape, device="meta") for name, shape in self.shapes.items()}
        return tuple(self.function(reference)(**arguments).shape)

    def function(self, module: ModuleType) -> Callable[..., Tensor]:
        """The row's operator of `mf_kernels` or `mf_kernels.reference`, with the row's options."""
        return functools.partial(getattr(module, self.op), **self.options)

    def inputs(
        self, dtype: torch.dtype, *, layout: str = "contiguous", seed: int = 0, device: str = "cpu"
    ) -> dict[str, Tensor]:
        """Arguments by name: the same values for every layout, of a size at which slopes bend."""
        generator = torch.Generator().manual_seed(seed)
        arguments = {}
        for name, shape in self.shapes.items():
            spread = {"theta": 2.0, "weight": 2.0 / shape[-1]}.get(name, 1.0)
            values = spread * torch.randn(shape, generator=generator, dtype=torch.float64)
            values = values.softmax(1) if name == "alpha" else values
            arguments[name] = in_layout(values.to(device=device, dtype=dtype), layout)
        return arguments

    def d_output(self, dtype: torch.dtype, *, layout: str = "contiguous", seed: int = 0, device: str = "cpu") -> Tensor:
        """A gradient of the output."""
        generator = torch.Generator().manual_seed(seed + 1)
        values = torch.randn(self.output_shape, generator=generator, dtype=torch.float64)
        return in_layout(values.to(device=device, dtype=dtype), layout)


def in_layout(values: Tensor, layout: str) -> Tensor:
    """A copy of `values` that lies in memory as `layout` says. What surrounds a view in its buffer is NaN.

    =============  ==================================================================
    contiguous     alone in its memory
    channels_last  the same for four axes; contiguous for the others
    sliced         inside a larger buffer on every axis, every second element of the last
    permuted       dense, with the axes in the reverse order
    unaligned      contiguous, one element into its buffer
    =============  ==================================================================
    """
    shape, dims = values.shape, values.dim()
    if layout == "contiguous":
        return values.clone(memory_format=torch.contiguous_format)
    if layout == "channels_last":
        return values.clone(memory_format=torch.channels_last if dims == 4 else torch.contiguous_format)
    if layout == "sliced":
        buffer = values.new_full([*(n + 2 for n in shape[:-1]), 2 * shape[-1] + 2], float("nan"))
        view = buffer[(*(slice(1, n + 1) for n in shape[:-1]), slice(1, 2 * shape[-1] + 1, 2))]
    elif layout == "permuted":
        view = values.new_full(shape[::-1], float("nan")).permute(*reversed(range(dims)))
    elif layout == "unaligned":
        view = values.new_full((values.numel() + 2,), float("nan"))[1:-1].view(shape)
    else:
        raise ValueError(f"layout: expected one of {LAYOUTS}, got {layout!r}")
    return view.copy_(values)


def _mobile_to_former(reaches: str, B: int, C: int, H: int, W: int, M: int, N: int = 2, layer_of: str = "") -> Case:
    name = f"{B}x{C}x{H}x{W}-{M}tokens-{N}heads"
    shapes = {"x": (B, C, H, W), "q": (B, M, C)}
    return Case("mobile_to_former", name, shapes, reaches, {"num_heads": N}, tuple(layer_of.split()))


def _former_to_mobile(reaches: str, B: int, C: int, H: int, W: int, M: int, N: int = 2, layer_of: str = "") -> Case:
    name = f"{B}x{C}x{H}x{W}-{M}tokens-{N}heads"
    shapes = {"x": (B, C, H, W), "k": (B, M, C), "v": (B, M, C)}
    return Case("former_to_mobile", name, shapes, reaches, {"num_heads": N}, tuple(layer_of.split()))


def _dynamic_relu(reaches: str, B: int, C: int, H: int, W: int, layer_of: str = "") -> Case:
    shapes = {"x": (B, C, H, W), "theta": (B, 2 * C)}
    return Case("dynamic_relu", f"{B}x{C}x{H}x{W}", shapes, reaches, layer_of=tuple(layer_of.split()))


def _spatial_dynamic_relu(reaches: str, B: int, C: int, H: int, W: int, M: int, layer_of: str = "") -> Case:
    shapes = {"x": (B, C, H, W), "theta": (B, M, 2 * C), "alpha": (B, M, H, W)}
    return Case("spatial_dynamic_relu", f"{B}x{C}x{H}x{W}-{M}tokens", shapes, reaches, layer_of=tuple(layer_of.split()))


def _depthwise_conv2d(
    reaches: str,
    B: int,
    C: int,
    H: int,
    W: int,
    mult: int = 1,
    K: int = 3,
    stride: int = 1,
    activation: str = "hardswish",
    bias: bool = True,
    layer_of: str = "",
) -> Case:
    name = f"{B}x{C}x{H}x{W}-mult{mult}-k{K}-s{stride}-{activation}{'' if bias else '-nobias'}"
    shapes: dict[str, tuple[int, ...]] = {"x": (B, C, H, W), "weight": (C * mult, 1, K, K)}
    if bias:
        shapes["bias"] = (C * mult,)
    options = {"stride": stride, "activation": activation}
    return Case("depthwise_conv2d", name, shapes, reaches, options, tuple(layer_of.split()))


def _attention_rows(row: Callable[..., Case]) -> list[Case]:
    return [
        row("one position, one channel a head", 1, 2, 1, 1, 1),
        *(row(f"{M} tokens; an odd head of 7 channels; 15 positions", 2, 14, 3, 5, M) for M in range(1, 9)),
        row("one head of every position of a 7 x 7 map", 2, 20, 7, 7, 6, 1),
        row("four heads; positions fill vectors exactly", 1, 64, 4, 16, 3, 4),
        row("exactly one tile of positions", 1, 24, 16, 16, 6),
        row("a second tile with one position", 1, 6, 1, 257, 4),
        row("tiles cut by the cache: few positions of many channels", 2, 300, 9, 31, 6, 1),
        row("a head of more channels than a tile of one vector of positions holds", 1, 1040, 5, 9, 8, 1),
        row("two spans, the second one short", 1, 12, 46, 45, 6),
        row("three spans, the last one position", 2, 4, 17, 241, 2, 4),
        row("no samples", 0, 12, 5, 5, 3),
    ]


_LAYERS = [
    _mobile_to_former("layer", 1, 16, 112, 112, 6, layer_of="294m"),
    _mobile_to_former("layer", 1, 24, 56, 56, 6, layer_of="294m"),
    _mobile_to_former("layer", 1, 48, 28, 28, 6, layer_of="294m"),
    _mobile_to_former("layer", 1, 96, 14, 14, 6, layer_of="294m"),
    _mobile_to_former("layer", 1, 192, 7, 7, 6, layer_of="294m"),
    _mobile_to_former("the tokens among themselves", 1, 192, 1, 6, 6, 4, layer_of="294m 508m"),
    _mobile_to_former("layer", 1, 12, 56, 56, 3, layer_of="26m"),
    _mobile_to_former("layer", 1, 24, 28, 28, 3, layer_of="26m"),
    _mobile_to_former("layer", 1, 96, 7, 7, 3, layer_of="26m"),
    _mobile_to_former("layer", 1, 40, 56, 56, 6, layer_of="508m"),
    _mobile_to_former("layer", 1, 72, 28, 28, 6, layer_of="508m"),
    _mobile_to_former("layer", 1, 240, 7, 7, 6, layer_of="508m"),
    _former_to_mobile("layer", 1, 24, 56, 56, 6, layer_of="294m"),
    _former_to_mobile("layer", 1, 48, 28, 28, 6, layer_of="294m"),
    _former_to_mobile("layer", 1, 96, 14, 14, 6, layer_of="294m"),
    _former_to_mobile("layer", 1, 192, 7, 7, 6, layer_of="294m"),
    _former_to_mobile("layer", 1, 12, 56, 56, 3, layer_of="26m"),
    _former_to_mobile("layer", 1, 24, 28, 28, 3, layer_of="26m"),
    _former_to_mobile("layer", 1, 96, 7, 7, 3, layer_of="26m"),
    _former_to_mobile("layer", 1, 40, 56, 56, 6, layer_of="508m"),
    _former_to_mobile("layer", 1, 72, 28, 28, 6, layer_of="508m"),
    _former_to_mobile("layer", 1, 240, 7, 7, 6, layer_of="508m"),
    _dynamic_relu("layer", 1, 96, 56, 56, layer_of="294m"),
    _dynamic_relu("layer", 1, 192, 28, 28, layer_of="294m"),
    _dynamic_relu("layer", 1, 384, 14, 14, layer_of="294m"),
    _dynamic_relu("layer", 1, 1152, 7, 7, layer_of="294m"),
    _dynamic_relu("layer", 1, 36, 56, 56, layer_of="26m"),
    _dynamic_relu("layer", 1, 72, 28, 28, layer_of="26m"),
    _dynamic_relu("layer", 1, 576, 7, 7, layer_of="26m"),
    _dynamic_relu("layer", 1, 120, 56, 56, layer_of="508m"),
    _dynamic_relu("layer", 1, 216, 28, 28, layer_of="508m"),
    _dynamic_relu("layer", 1, 1440, 7, 7, layer_of="508m"),
    _spatial_dynamic_relu("layer", 1, 96, 56, 56, 6, layer_of="294m"),
    _spatial_dynamic_relu("layer", 1, 192, 28, 28, 6, layer_of="294m"),
    _spatial_dynamic_relu("layer", 1, 1152, 7, 7, 6, layer_of="294m"),
    _spatial_dynamic_relu("layer", 1, 36, 56, 56, 3, layer_of="26m"),
    _spatial_dynamic_relu("layer", 1, 120, 56, 56, 6, layer_of="508m"),
    _depthwise_conv2d("the stem", 1, 16, 112, 112, 2, activation="relu6", layer_of="294m"),
    _depthwise_conv2d("layer", 1, 16, 112, 112, 6, stride=2, activation="identity", layer_of="294m"),
    _depthwise_conv2d("layer", 1, 96, 56, 56, activation="identity", layer_of="294m"),
    _depthwise_conv2d("layer", 1, 24, 56, 56, 4, activation="identity", layer_of="294m"),
    _depthwise_conv2d("layer", 1, 24, 56, 56, 6, stride=2, activation="identity", layer_of="294m"),
    _depthwise_conv2d("layer", 1, 192, 28, 28, activation="identity", layer_of="294m"),
    _depthwise_conv2d("layer", 1, 384, 14, 14, activation="identity", layer_of="294m"),
    _depthwise_conv2d("layer", 1, 1152, 7, 7, activation="identity", layer_of="294m"),
    _depthwise_conv2d("the stem", 1, 8, 112, 112, 3, stride=2, activation="relu6", layer_of="26m"),
    _depthwise_conv2d("layer", 1, 36, 56, 56, activation="identity", layer_of="26m"),
    _depthwise_conv2d("layer", 1, 72, 28, 28, activation="identity", layer_of="26m"),
    _depthwise_conv2d("layer", 1, 576, 7, 7, activation="identity", layer_of="26m"),
    _depthwise_conv2d("layer", 1, 120, 56, 56, activation="identity", layer_of="508m"),
    _depthwise_conv2d("layer", 1, 216, 28, 28, activation="identity", layer_of="508m"),
    _depthwise_conv2d("layer", 1, 1440, 7, 7, activation="identity", layer_of="508m"),
]

_BRANCHES = [
    *_attention_rows(_mobile_to_former),
    *_attention_rows(_former_to_mobile),
    _dynamic_relu("one value", 1, 1, 1, 1),
    _dynamic_relu("tails of every vector width, in positions and in channels", 3, 13, 3, 5),
    _dynamic_relu("planes that fill vectors exactly", 2, 16, 4, 16),
    _dynamic_relu("four vectors of channels at once, the widest", 2, 64, 5, 7),
    _dynamic_relu("four vectors of channels at once, the middle width", 2, 32, 7, 7),
    _dynamic_relu("groups of channels, the last one short", 2, 133, 3, 3),
    _dynamic_relu("one position a sample", 5, 67, 1, 1),
    _dynamic_relu("more values than one task takes", 2, 36, 25, 37),
    _dynamic_relu("no samples", 0, 5, 4, 4),
    _spatial_dynamic_relu("one value, one token", 1, 1, 1, 1, 1),
    _spatial_dynamic_relu("6 tokens; tails of every vector width, in positions and in channels", 3, 13, 3, 5, 6),
    _spatial_dynamic_relu("8 tokens; vectors filled exactly", 2, 32, 4, 16, 8),
    _spatial_dynamic_relu("5 tokens; tiles cut by the cache", 1, 403, 9, 17, 5),
    _spatial_dynamic_relu("3 tokens; two spans, the second one short", 1, 10, 46, 45, 3),
    _spatial_dynamic_relu("2 tokens; one position a sample", 5, 67, 1, 1, 2),
    _spatial_dynamic_relu("4 tokens", 2, 20, 5, 7, 4),
    _spatial_dynamic_relu("7 tokens", 1, 18, 7, 7, 7),
    _spatial_dynamic_relu("no samples", 0, 5, 4, 4, 2),
    _depthwise_conv2d("one value", 1, 1, 1, 1),
    _depthwise_conv2d("a window wider than the map", 2, 3, 2, 1, K=5, activation="relu6"),
    _depthwise_conv2d("the same, stride 2", 2, 3, 1, 2, K=5, stride=2, activation="identity", bias=False),
    _depthwise_conv2d("whole blocks of channels", 2, 32, 7, 7),
    _depthwise_conv2d("whole blocks, stride 2, even sides", 1, 48, 8, 6, stride=2, activation="relu6"),
    _depthwise_conv2d("whole blocks, 5 x 5", 1, 16, 9, 12, K=5, activation="relu6", bias=False),
    _depthwise_conv2d("whole blocks, 5 x 5, stride 2", 1, 16, 11, 13, K=5, stride=2),
    _depthwise_conv2d("a whole block and channels over", 2, 21, 9, 10, activation="relu6"),
    _depthwise_conv2d("channels over, stride 2, odd sides", 2, 13, 9, 11, stride=2, activation="identity"),
    _depthwise_conv2d("channels over, 5 x 5", 1, 19, 6, 7, K=5, activation="identity"),
    _depthwise_conv2d("channels over, 5 x 5, stride 2", 1, 5, 10, 8, K=5, stride=2, activation="relu6"),
    _depthwise_conv2d("2 filters a channel", 2, 9, 7, 6, 2, bias=False),
    _depthwise_conv2d("3 filters a channel, stride 2", 1, 7, 9, 9, 3, stride=2, activation="relu6"),
    _depthwise_conv2d("4 filters a channel, 5 x 5", 1, 12, 6, 9, 4, K=5),
    _depthwise_conv2d("5 filters a channel, 5 x 5, stride 2", 1, 5, 8, 9, 5, K=5, stride=2),
    _depthwise_conv2d("6 filters a channel, stride 2", 2, 10, 7, 7, 6, stride=2, activation="identity"),
    _depthwise_conv2d("more filters a channel than a vector holds", 1, 3, 5, 6, 18, activation="relu6"),
    _depthwise_conv2d("several strips of rows forward", 1, 17, 67, 5),
    _depthwise_conv2d("several strips forward, stride 2", 1, 16, 131, 3, stride=2),
    _depthwise_conv2d("several strips of wide rows backward", 1, 2, 40, 300),
    _depthwise_conv2d("the same, 5 x 5, stride 2", 1, 1, 57, 301, 2, K=5, stride=2, activation="relu6"),
    _depthwise_conv2d("no samples", 0, 5, 6, 6, 2),
]

CASES: tuple[Case, ...] = (*_LAYERS, *_BRANCHES)
TIMED: tuple[Case, ...] = tuple(case for case in CASES if case.layer_of)

# One row of each operator, at a branch that does most of what its kernels do, for what is asked of all of them
SMALL = {
    op: next(case for case in CASES if case.op == op and branch in case.reaches)
    for op, branch in {
        "mobile_to_former": "6 tokens",
        "former_to_mobile": "6 tokens",
        "dynamic_relu": "tails of",
        "spatial_dynamic_relu": "6 tokens",
        "depthwise_conv2d": "channels over, stride 2",
    }.items()
}

# Arguments of each operator that are small enough for gradcheck's one evaluation an element
TINY: dict[str, dict[str, tuple[int, ...]]] = {
    "mobile_to_former": {"x": (2, 4, 2, 3), "q": (2, 3, 4)},
    "former_to_mobile": {"x": (2, 4, 2, 3), "k": (2, 3, 4), "v": (2, 3, 4)},
    "dynamic_relu": {"x": (2, 3, 2, 3), "theta": (2, 6)},
    "spatial_dynamic_relu": {"x": (2, 2, 2, 3), "theta": (2, 2, 4), "alpha": (2, 2, 2, 3)},
    "depthwise_conv2d": {"x": (2, 2, 4, 3), "weight": (4, 1, 3, 3), "bias": (4,)},
}
