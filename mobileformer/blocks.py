"""The three blocks. Each maps (features, tokens) to (features, tokens).

Legend: B batch, C channels, H W height and width, M tokens, D token width. Order inside a block with tokens:
tokens <- Mobile-to-Former, tokens <- Former, features <- convolutions with slopes from the new tokens, skip,
features <- Former-to-Mobile. So the bridge in reads the block's input map and the bridge out its output map.
"""

from __future__ import annotations

from torch import Tensor, nn

from mobileformer.config import BlockConfig
from mobileformer.layers import ConvNorm, DropPath, DynamicReLU, Former, FormerToMobile, MobileToFormer

__all__ = ["DownBlock", "LiteBlock", "SameBlock"]


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


class SameBlock(nn.Module):
    """Pointwise expansion, depthwise, pointwise, at the same resolution; skip where the width stays."""

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
        self.mobile_to_former = MobileToFormer(
            in_channels, token_dim, drop_path=drop_path, use_fused=use_fused
        )
        self.former = Former(token_dim, drop_path=drop_path, use_fused=use_fused)
        self.former_to_mobile = FormerToMobile(
            out_channels, token_dim, drop_path=drop_path, use_fused=use_fused
        )
        self.drop_path = DropPath(drop_path)
        self.has_skip = in_channels == out_channels
        self.spatial_dynamic_relu = spatial_dynamic_relu

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """x (B,C,H,W), tokens (B,M,D) -> (B,C',H,W), (B,M,D)."""
        mix = None
        if self.spatial_dynamic_relu:
            mix = self.mobile_to_former.token_mix(x, tokens, (x.shape[2], x.shape[3]))
        tokens = self.former(self.mobile_to_former(x, tokens))
        y = self.expand_relu(self.expand(x), tokens, mix)
        y = self.depthwise_relu(self.depthwise(y), tokens, mix)
        y = self.project(y)
        if self.has_skip:
            y = x + self.drop_path(y)
        return self.former_to_mobile(y, tokens), tokens


class DownBlock(nn.Module):
    """Half the resolution: depthwise expansion of stride 2, pointwise, then depthwise expansion and pointwise inside a skip."""

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
        self.mobile_to_former = MobileToFormer(
            in_channels, token_dim, drop_path=drop_path, use_fused=use_fused
        )
        self.former = Former(token_dim, drop_path=drop_path, use_fused=use_fused)
        self.former_to_mobile = FormerToMobile(
            out_channels, token_dim, drop_path=drop_path, use_fused=use_fused
        )
        self.drop_path = DropPath(drop_path)
        self.spatial_dynamic_relu = spatial_dynamic_relu

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """x (B,C,H,W), tokens (B,M,D) -> (B,C',ceil(H/2),ceil(W/2)), (B,M,D)."""
        mix = None
        if self.spatial_dynamic_relu:
            mix = self.mobile_to_former.token_mix(x, tokens, ((x.shape[2] + 1) // 2, (x.shape[3] + 1) // 2))
        tokens = self.former(self.mobile_to_former(x, tokens))
        y = self.down_relu(self.down(x), tokens, mix)
        middle = self.squeeze(y)
        y = self.expand_relu(self.expand(middle), tokens, mix)
        y = middle + self.drop_path(self.project(y))
        return self.former_to_mobile(y, tokens), tokens
