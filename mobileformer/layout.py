"""Every layer of a network as one table, from a variant's blocks. No torch here: the inference engine reads it too.

Names, order and shapes are those of the model's state dict. What else speaks of layers is read off this table: the
published names (`weights.keys`), the arrays of a folded network (`inference.folded`), the shapes that a file of
weights is told apart by (`weights.load`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from mobileformer.config import STEM_STRIDE, BlockConfig, VariantConfig

__all__ = ["TOKENS", "Convolution", "Layer", "convolutions", "layers", "state_shapes"]

TOKENS = "tokens"  # the one parameter that belongs to no layer: (M, D)

LayerKind = Literal["convolution", "batch_norm", "linear", "layer_norm"]
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Layer:
    """One module with parameters.

    =====  ===============================================================================================
    field  meaning
    =====  ===============================================================================================
    name   of the module, for instance "blocks.3.expand.conv"
    kind   "convolution" (no bias), "batch_norm", "linear" or "layer_norm" (weight and bias)
    shape  of its weight: (C', C/groups, K, K); (features out, features in) of a linear layer; (C) of a norm
    =====  ===============================================================================================
    """

    name: str
    kind: LayerKind
    shape: Shape

    def state(self) -> dict[str, Shape]:
        """Name -> shape of what it adds to the state dict, in order."""
        state = {f"{self.name}.weight": self.shape}
        if self.kind != "convolution":
            state[f"{self.name}.bias"] = self.shape[:1]
        if self.kind == "batch_norm":
            state[f"{self.name}.running_mean"] = state[f"{self.name}.running_var"] = self.shape
            state[f"{self.name}.num_batches_tracked"] = ()
        return state


@dataclass(frozen=True, slots=True)
class Convolution:
    """A convolution of a block, with its BatchNorm and what follows.

    ============  ====================================================================
    field         meaning
    ============  ====================================================================
    name          inside its block
    in_channels   C
    out_channels  C'
    kernel_size   K: 3 where it is depthwise, else 1
    groups        C where it is depthwise, else those of the variant
    stride        1 or 2
    dynamic_relu  whether a dynamic ReLU of C' channels follows, called `<name>_relu`
    ============  ====================================================================
    """

    name: str
    in_channels: int
    out_channels: int
    kernel_size: int
    groups: int
    stride: int = 1
    dynamic_relu: bool = False

    def layers(self, prefix: str) -> Iterator[Layer]:
        """The convolution and its norm below `prefix`."""
        side = self.kernel_size
        yield Layer(f"{prefix}.conv", "convolution", (self.out_channels, self.in_channels // self.groups, side, side))
        yield Layer(f"{prefix}.norm", "batch_norm", (self.out_channels,))


def convolutions(block: BlockConfig, in_channels: int, groups: int) -> tuple[Convolution, ...]:
    """Those of one block, in the order in which they run. `groups`: the variant's."""
    out, hidden = block.out_channels, block.expansion * in_channels

    def pointwise(name: str, into: int, out: int, *, dynamic_relu: bool = False) -> Convolution:
        return Convolution(name, into, out, 1, groups, 1, dynamic_relu)

    def depthwise(name: str, into: int, out: int, stride: int = 1, *, dynamic_relu: bool = True) -> Convolution:
        return Convolution(name, into, out, 3, into, stride, dynamic_relu)

    if block.kind == "lite":
        return (
            depthwise("expand", in_channels, hidden, block.stride, dynamic_relu=False),
            pointwise("project", hidden, out),
        )
    if block.kind == "same":
        return (
            pointwise("expand", in_channels, hidden, dynamic_relu=True),
            depthwise("depthwise", hidden, hidden),
            pointwise("project", hidden, out),
        )
    second = block.second_expansion * out
    return (
        depthwise("down", in_channels, hidden, block.stride),
        pointwise("squeeze", hidden, out),
        depthwise("expand", out, second),
        pointwise("project", second, out),
    )


def layers(config: VariantConfig, *, num_classes: int, in_chans: int) -> tuple[Layer, ...]:
    """All layers of a classifier, in the order of its state dict; before them stands the table of tokens."""
    return tuple(_layers(config, num_classes, in_chans))


def state_shapes(config: VariantConfig, *, num_classes: int, in_chans: int) -> dict[str, Shape]:
    """Key -> shape of a classifier's whole state dict, in its order."""
    shapes: dict[str, Shape] = {TOKENS: (config.num_tokens, config.token_dim)}
    for layer in layers(config, num_classes=num_classes, in_chans=in_chans):
        shapes |= layer.state()
    return shapes


def _layers(config: VariantConfig, num_classes: int, in_chans: int) -> Iterator[Layer]:
    width, channels = config.token_dim, config.stem_channels
    yield from Convolution("stem", in_chans, channels, 3, 1, STEM_STRIDE).layers("stem")
    for index, block in enumerate(config.blocks):
        name = f"blocks.{index}"
        for convolution in convolutions(block, channels, config.groups):
            yield from convolution.layers(f"{name}.{convolution.name}")
            if convolution.dynamic_relu:
                relu = f"{name}.{convolution.name}_relu"
                yield Layer(f"{relu}.reduce", "linear", (width // 4, width))
                yield Layer(f"{relu}.expand", "linear", (2 * convolution.out_channels, width // 4))
        if block.kind != "lite":
            yield from _mobile_to_former(f"{name}.mobile_to_former", channels, width)
            yield from _former(f"{name}.former", width)
            for part in ("key", "value"):
                yield Layer(f"{name}.former_to_mobile.{part}", "linear", (block.out_channels, width))
        channels = block.out_channels
    yield from _mobile_to_former("mobile_to_former", channels, width)
    head, hidden = config.head_channels, config.hidden_features
    yield from Convolution("expand", channels, head, 1, config.groups).layers("head.expand")
    yield Layer("head.fc", "linear", (hidden, head + width))
    yield Layer("head.norm", "batch_norm", (hidden,))
    yield Layer("head.classifier", "linear", (num_classes, hidden))


def _mobile_to_former(name: str, channels: int, width: int) -> Iterator[Layer]:
    yield Layer(f"{name}.gate", "linear", (channels, width))
    yield Layer(f"{name}.query", "linear", (channels, width))
    yield Layer(f"{name}.project", "linear", (width, channels))
    yield Layer(f"{name}.norm", "layer_norm", (width,))


def _former(name: str, width: int) -> Iterator[Layer]:
    yield Layer(f"{name}.ffn_expand", "linear", (2 * width, width))
    yield Layer(f"{name}.ffn_project", "linear", (width, 2 * width))
    yield Layer(f"{name}.ffn_norm", "layer_norm", (width,))
    yield Layer(f"{name}.query", "linear", (width, width))
    yield Layer(f"{name}.project", "linear", (width, width))
    yield Layer(f"{name}.norm", "layer_norm", (width,))
