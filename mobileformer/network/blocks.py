"""The three blocks. Each maps (features, tokens) to (features, tokens).

Legend: B batch, C channels, H W height and width, M tokens, D token width. Order inside a block with tokens:
tokens <- Mobile-to-Former, tokens <- Former, features <- convolutions with slopes from the new tokens, skip,
features <- Former-to-Mobile. So the bridge in reads the block's input map and the bridge out its output map.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

import mf_kernels
from mobileformer.config import BlockConfig
from mobileformer.network.convolution import ConvNorm
from mobileformer.network.layers import (
    BRIDGE_HEADS,
    FORMER_HEADS,
    DropPath,
    DynamicReLU,
    Former,
    FormerToMobile,
    MobileToFormer,
    token_mix,
)
from mobileformer.network.parts import are_plain, is_untouched, part, watched_globally

__all__ = ["DownBlock", "LiteBlock", "SameBlock"]


@part
class LiteBlock(nn.Module):
    """Depthwise expansion, ReLU6, pointwise; skip where the shapes allow. Tokens pass untouched."""

    def __init__(self, in_channels: int, config: BlockConfig, *, groups: int, use_fused: bool) -> None:
        super().__init__()
        hidden = config.expansion * in_channels
        # The shuffle follows ReLU6 in the paper's order; acting on each value alone, ReLU6 commutes with it.
        self.expand = ConvNorm(
            in_channels,
            hidden,
            3,
            stride=config.stride,
            groups=in_channels,
            activation="relu6",
            shuffle=in_channels if groups > 1 else 1,
            use_fused=use_fused,
        )
        self.project = ConvNorm(hidden, config.out_channels, 1, groups=groups, use_fused=use_fused)
        self.has_skip = config.stride == 1 and in_channels == config.out_channels

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """x (B,C,H,W), tokens (B,M,D) -> (B,C',ceil(H/stride),ceil(W/stride)), the same tokens."""
        y = self.project(self.expand(x))
        return (x + y if self.has_skip else y), tokens


class TokenBlock(nn.Module):
    """What both blocks with tokens share: the inference forms of the operators, with `use_fused`.

    In evaluation BatchNorm is a constant, so the depthwise convolution, the norm and the activation behind it
    are one operator, and all that the block computes on tokens alone is another. The numbers are the same. With
    slopes by position the activation is an operator of its own, and the slopes of all tokens are made apart.
    """

    mobile_to_former: MobileToFormer
    former: Former
    former_to_mobile: FormerToMobile
    use_fused: bool
    spatial_dynamic_relu: bool
    stride: int
    drop_path: DropPath
    _shapes: list[torch.Size]

    def inference_parameters(
        self, relus: tuple[DynamicReLU, ...], convolutions: tuple[ConvNorm, ...]
    ) -> list[Tensor] | None:
        """The parameters of the token side in the operator's order, or None to go part by part.

        None is: in training, also where only a norm is; and where a part is not what it was built as.
        """
        if not self.use_fused or self.training or watched_globally():
            return None
        bridge, former, outward = self.mobile_to_former, self.former, self.former_to_mobile
        if not (
            is_untouched(bridge, MobileToFormer)
            and is_untouched(former, Former)
            and is_untouched(outward, FormerToMobile)
            and all(is_untouched(relu, DynamicReLU) for relu in relus)
            and all(_drops_nothing(owner) for owner in (self, bridge, former, outward))
            # Their outputs are written over: for that, too, nobody may be looking.
            and all(is_untouched(conv, conv.__class__) and _is_joinable(conv) for conv in convolutions)
        ):
            return None
        layers = _layers(bridge, former, outward)
        parameters: list[Tensor] = []
        for layer in (*layers, *_slopes(relus)):
            if not is_untouched(layer, nn.Linear, nn.LayerNorm):
                return None
            parameters += _weight_and_bias(cast(nn.Module, layer))
        norms = cast(list[nn.LayerNorm], [layers.bridge_norm, layers.attention_norm, layers.ffn_norm])
        if not (
            are_plain(parameters)
            and [parameter.shape for parameter in parameters] == self._shapes
            and all(norm.eps == norms[1].eps and norm.normalized_shape == self._shapes[4] for norm in norms)
        ):
            return None
        return parameters

    def token_side(
        self, x: Tensor, tokens: Tensor, parameters: list[Tensor], relus: tuple[DynamicReLU, ...]
    ) -> tuple[list[Tensor], Tensor | None]:
        """[new tokens, key, value, theta of every dynamic ReLU], all that the map needs of the tokens; and their mix.

        Slopes by position come from all tokens, (B,M,2C) each, with the mix (B,M,H,W); else from token 0, without one.
        """
        query = self.mobile_to_former.query(tokens)
        gathered = mf_kernels.mobile_to_former(x, query, num_heads=BRIDGE_HEADS)
        of_slopes = 4 * len(relus) if self.spatial_dynamic_relu else 0  # weight and bias of two layers each
        made = mf_kernels.token_side(
            tokens,
            gathered,
            parameters[: len(parameters) - of_slopes],
            num_heads=FORMER_HEADS,
            eps=self.former.norm.eps,
        )
        if not self.spatial_dynamic_relu:
            return made, None
        return [*made, *(relu.logits(made[0]) for relu in relus)], token_mix(x, query, self.size_out(x))

    def size_out(self, x: Tensor) -> tuple[int, int]:
        """Height and width of the maps that the block makes of x."""
        return -(-x.shape[2] // self.stride), -(-x.shape[3] // self.stride)

    def _remember(self, *relus: DynamicReLU) -> None:
        """Keep the shapes that the token side was built with."""
        layers = _layers(self.mobile_to_former, self.former, self.former_to_mobile)
        every = cast(list[nn.Module], [*layers, *_slopes(relus)])
        self._shapes = [parameter.shape for layer in every for parameter in _weight_and_bias(layer)]


def _layers(
    bridge: MobileToFormer, former: Former, outward: FormerToMobile
) -> mf_kernels.TokenSideLayers[nn.Module | None]:
    """The layers of the token side in the operator's order, without `nn.Module.__getattr__`, which is slow."""
    enter, between, leave = bridge._modules, former._modules, outward._modules
    return mf_kernels.TokenSideLayers(
        gate=enter["gate"],
        bridge=enter["project"],
        bridge_norm=enter["norm"],
        query=between["query"],
        mix=between["project"],
        attention_norm=between["norm"],
        expand=between["ffn_expand"],
        contract=between["ffn_project"],
        ffn_norm=between["ffn_norm"],
        key=leave["key"],
        value=leave["value"],
    )


def _slopes(relus: tuple[DynamicReLU, ...]) -> list[nn.Module | None]:
    """What follows them: the layers that make the slopes."""
    return [relu._modules[name] for relu in relus for name in ("reduce", "expand")]


def _weight_and_bias(layer: nn.Module) -> list[Tensor]:
    parameters = layer._parameters
    return [cast(Tensor, parameters.get("weight")), cast(Tensor, parameters.get("bias"))]


def _drops_nothing(owner: nn.Module) -> bool:
    drop = owner._modules["drop_path"]
    return is_untouched(drop, DropPath) and not cast(DropPath, drop).training


def _is_joinable(conv: ConvNorm) -> bool:
    """Whether convolution and norm can be one, with the dynamic ReLU that is to come as the only activation."""
    return conv.activation == "identity" and conv.use_fused and conv.has_constant_norm


def add_over(y: Tensor, x: Tensor) -> Tensor:
    """y + x, written over y where no gradient will ask for it."""
    return y + x if torch.is_grad_enabled() or x.dtype != y.dtype else y.add_(x)


def relu_over(x: Tensor, theta: Tensor, mix: Tensor | None) -> Tensor:
    """Dynamic ReLU, by position where there is a mix, written over x where no gradient will ask for it."""
    return mf_kernels.dynamic_relu_(x, theta) if mix is None else mf_kernels.spatial_dynamic_relu_(x, theta, mix)


def depthwise_with_relu(depthwise: ConvNorm, x: Tensor, theta: Tensor, mix: Tensor | None) -> Tensor:
    """Depthwise convolution, BatchNorm, dynamic ReLU in evaluation; two operators if shuffled between or with a mix."""
    if depthwise.shuffle > 1 or mix is not None:
        return relu_over(depthwise.run_folded(x), theta, mix)
    weight, bias = depthwise.folded()
    return mf_kernels.depthwise_dynamic_relu(x, weight, bias, theta, stride=depthwise.stride)


def convolve_with_relu(conv: ConvNorm, relu: DynamicReLU, x: Tensor, tokens: Tensor, mix: Tensor | None) -> Tensor:
    """relu(conv(x), tokens, mix); in training norm and ReLU are one operator, unless somebody is at either of them."""
    if (
        mix is None
        and is_untouched(relu, DynamicReLU)
        and is_untouched(conv, ConvNorm)
        and conv.activation == "identity"
        and conv.joins_relu
    ):
        return conv(x, relu.logits(tokens[:, 0]))
    return relu(conv(x), tokens, mix)


@part
class SameBlock(TokenBlock):
    """Pointwise expansion, depthwise, pointwise, at the same resolution; skip where the width stays."""

    stride = 1

    def __init__(
        self,
        in_channels: int,
        config: BlockConfig,
        *,
        token_dim: int,
        groups: int,
        spatial_dynamic_relu: bool,
        drop_path: float,
        use_fused: bool,
    ) -> None:
        super().__init__()
        hidden = config.expansion * in_channels
        out_channels = config.out_channels
        self.expand = ConvNorm(in_channels, hidden, 1, groups=groups, shuffle=groups, use_fused=use_fused)
        self.expand_relu = DynamicReLU(hidden, token_dim, use_fused=use_fused)
        self.depthwise = ConvNorm(hidden, hidden, 3, groups=hidden, use_fused=use_fused)
        self.depthwise_relu = DynamicReLU(hidden, token_dim, use_fused=use_fused)
        self.project = ConvNorm(hidden, out_channels, 1, groups=groups, shuffle=groups, use_fused=use_fused)
        self.mobile_to_former = MobileToFormer(in_channels, token_dim, drop_path=drop_path, use_fused=use_fused)
        self.former = Former(token_dim, drop_path=drop_path, use_fused=use_fused)
        self.former_to_mobile = FormerToMobile(out_channels, token_dim, drop_path=drop_path, use_fused=use_fused)
        self.drop_path = DropPath(drop_path)
        self.use_fused = use_fused
        self.has_skip = in_channels == out_channels
        self.spatial_dynamic_relu = spatial_dynamic_relu
        self._remember(self.expand_relu, self.depthwise_relu)

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """x (B,C,H,W), tokens (B,M,D) -> (B,C',H,W), (B,M,D)."""
        parameters = self.inference_parameters(
            (self.expand_relu, self.depthwise_relu), (self.expand, self.depthwise, self.project)
        )
        if parameters is not None:
            return self._infer(x, tokens, parameters)
        mix = None
        if self.spatial_dynamic_relu:
            mix = self.mobile_to_former.token_mix(x, tokens, self.size_out(x))
        tokens = self.former(self.mobile_to_former(x, tokens))
        y = convolve_with_relu(self.expand, self.expand_relu, x, tokens, mix)
        y = convolve_with_relu(self.depthwise, self.depthwise_relu, y, tokens, mix)
        y = self.project(y)
        if self.has_skip:
            y = x + self.drop_path(y)
        return self.former_to_mobile(y, tokens), tokens

    def _infer(self, x: Tensor, tokens: Tensor, parameters: list[Tensor]) -> tuple[Tensor, Tensor]:
        relus = (self.expand_relu, self.depthwise_relu)
        (tokens, key, value, theta1, theta2), mix = self.token_side(x, tokens, parameters, relus)
        y = relu_over(self.expand.run_folded(x), theta1, mix)
        y = self.project.run_folded(depthwise_with_relu(self.depthwise, y, theta2, mix))
        y = add_over(y, x) if self.has_skip else y
        return mf_kernels.former_to_mobile_(y, key, value, num_heads=BRIDGE_HEADS), tokens


@part
class DownBlock(TokenBlock):
    """Half the resolution: depthwise of stride 2, pointwise; then depthwise and pointwise inside a skip."""

    stride = 2

    def __init__(
        self,
        in_channels: int,
        config: BlockConfig,
        *,
        token_dim: int,
        groups: int,
        spatial_dynamic_relu: bool,
        drop_path: float,
        use_fused: bool,
    ) -> None:
        super().__init__()
        out_channels = config.out_channels
        hidden = config.expansion * in_channels
        second_hidden = config.second_expansion * out_channels
        self.down = ConvNorm(
            in_channels,
            hidden,
            3,
            stride=2,
            groups=in_channels,
            shuffle=in_channels if groups > 1 else 1,
            use_fused=use_fused,
        )
        self.down_relu = DynamicReLU(hidden, token_dim, use_fused=use_fused)
        self.squeeze = ConvNorm(hidden, out_channels, 1, groups=groups, use_fused=use_fused)
        self.expand = ConvNorm(
            out_channels,
            second_hidden,
            3,
            groups=out_channels,
            shuffle=out_channels if groups > 1 else 1,
            use_fused=use_fused,
        )
        self.expand_relu = DynamicReLU(second_hidden, token_dim, use_fused=use_fused)
        self.project = ConvNorm(second_hidden, out_channels, 1, groups=groups, use_fused=use_fused)
        self.mobile_to_former = MobileToFormer(in_channels, token_dim, drop_path=drop_path, use_fused=use_fused)
        self.former = Former(token_dim, drop_path=drop_path, use_fused=use_fused)
        self.former_to_mobile = FormerToMobile(out_channels, token_dim, drop_path=drop_path, use_fused=use_fused)
        self.drop_path = DropPath(drop_path)
        self.use_fused = use_fused
        self.spatial_dynamic_relu = spatial_dynamic_relu
        self._remember(self.down_relu, self.expand_relu)

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """x (B,C,H,W), tokens (B,M,D) -> (B,C',ceil(H/2),ceil(W/2)), (B,M,D)."""
        parameters = self.inference_parameters(
            (self.down_relu, self.expand_relu), (self.down, self.squeeze, self.expand, self.project)
        )
        if parameters is not None:
            return self._infer(x, tokens, parameters)
        mix = None
        if self.spatial_dynamic_relu:
            mix = self.mobile_to_former.token_mix(x, tokens, self.size_out(x))
        tokens = self.former(self.mobile_to_former(x, tokens))
        y = convolve_with_relu(self.down, self.down_relu, x, tokens, mix)
        middle = self.squeeze(y)
        y = convolve_with_relu(self.expand, self.expand_relu, middle, tokens, mix)
        y = middle + self.drop_path(self.project(y))
        return self.former_to_mobile(y, tokens), tokens

    def _infer(self, x: Tensor, tokens: Tensor, parameters: list[Tensor]) -> tuple[Tensor, Tensor]:
        relus = (self.down_relu, self.expand_relu)
        (tokens, key, value, theta1, theta2), mix = self.token_side(x, tokens, parameters, relus)
        middle = self.squeeze.run_folded(depthwise_with_relu(self.down, x, theta1, mix))
        y = add_over(self.project.run_folded(depthwise_with_relu(self.expand, middle, theta2, mix)), middle)
        return mf_kernels.former_to_mobile_(y, key, value, num_heads=BRIDGE_HEADS), tokens
