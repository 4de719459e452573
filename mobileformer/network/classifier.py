"""The whole network: tokens and stem, blocks, the last bridge into the tokens, classifier."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from mf_kernels.environment import is_transformed
from mobileformer.config import MIN_SIZE, BlockConfig, VariantConfig, get_variant
from mobileformer.network.blocks import DownBlock, LiteBlock, SameBlock
from mobileformer.network.layers import ConvNorm, MobileToFormer, channel_shuffle
from mobileformer.network.parts import part
from mobileformer.network.recompute import recomputed

__all__ = ["MIN_SIZE", "Classifier", "Head", "unwrap"]


@part
class Head(nn.Module):
    """The classifier.

    pooled = hswish(mean over positions(ReLU6(BatchNorm(pointwise(features), C -> 6C))))
    hidden = hswish(BatchNorm(fc([pooled, token 0])))
    logits = classifier(dropout(hidden))
    """

    def __init__(self, config: VariantConfig, num_classes: int, *, drop_rate: float, use_fused: bool) -> None:
        super().__init__()
        channels = config.feature_channels
        self.groups = config.groups
        self.expand = ConvNorm(
            channels, config.head_channels, 1, groups=config.groups, activation="relu6", use_fused=use_fused
        )
        self.fc = nn.Linear(config.head_channels + config.token_dim, config.hidden_features)
        self.norm = nn.BatchNorm1d(config.hidden_features)
        self.dropout = nn.Dropout(drop_rate)
        self.classifier = nn.Linear(config.hidden_features, num_classes)

    def forward(self, features: Tensor, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """features (B,C,H,W), tokens (B,M,D) -> logits (B,classes), or hidden with `pre_logits`."""
        joint = torch.cat([self.pool(features), tokens[:, 0]], dim=1)
        hidden = F.hardswish(self.norm(self.fc(joint)))
        return hidden if pre_logits else self.classifier(self.dropout(hidden))

    def pool(self, features: Tensor) -> Tensor:
        """(B,C,H,W) -> (B,6C)."""
        if self.groups > 1:
            features = channel_shuffle(features, self.groups)
        return F.hardswish(self.expand(features).mean(dim=(2, 3)))


@part
class Classifier(nn.Module):
    """`mobileformer.Model`, whose text tells it all, without what knows of inference."""

    # A subclass that computes nothing else says so in its own body; without that it is not folded for the engine.
    same_numbers = True
    _grad_checkpointing = False

    def __init__(
        self,
        variant: str = "294m",
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        use_fused: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        spatial_dynamic_relu: bool = False,
    ) -> None:
        super().__init__()
        config = get_variant(variant)
        _check_at_least_one("num_classes", num_classes)
        _check_at_least_one("in_chans", in_chans)
        _check_rate("drop_rate", drop_rate)
        _check_rate("drop_path_rate", drop_path_rate)
        self.config = config
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.spatial_dynamic_relu = spatial_dynamic_relu
        self._use_fused = use_fused

        self.tokens = nn.Parameter(torch.empty(config.num_tokens, config.token_dim))
        self.stem = ConvNorm(in_chans, config.stem_channels, 3, stride=2, activation="relu6", use_fused=use_fused)
        self.blocks = nn.ModuleList()
        channels = config.stem_channels
        for index, block in enumerate(config.blocks):
            drop_path = drop_path_rate * (index + 1) / len(config.blocks)
            self.blocks.append(self._make_block(channels, block, drop_path))
            channels = block.out_channels
        self.mobile_to_former = MobileToFormer(
            channels, config.token_dim, drop_path=drop_path_rate, use_fused=use_fused
        )
        self.head = Head(config, num_classes, drop_rate=drop_rate, use_fused=use_fused)

        nn.init.normal_(self.tokens)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    @property
    def variant(self) -> str:
        """Name of the variant, for instance "294m"."""
        return self.config.name

    @property
    def use_fused(self) -> bool:
        """Whether the model was built on the fused operators. Fixed: build another model to change it."""
        return self._use_fused

    def forward(self, x: Tensor) -> Tensor:
        """x (B,in_chans,H,W) -> logits (B,num_classes)."""
        features, tokens = self.forward_features(x)
        return self.forward_head(features, tokens)

    def forward_features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B,in_chans,H,W) -> features (B,C,ceil(H/32),ceil(W/32)), tokens (B,M,D) of the last bridge."""
        x, tokens = self._enter(x)
        for block in self.blocks:
            x, tokens = self._through(block, x, tokens)
        return x, self.mobile_to_former(x, tokens)

    def forward_head(self, features: Tensor, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """What `forward_features` gave -> logits (B,num_classes), or the vector (B,hidden) before them."""
        return self.head(features, tokens, pre_logits)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether blocks are run again in the backward pass instead of keeping what they computed.

        The memory that a training step takes for activations falls to the maps between blocks and one block's inside;
        it costs a second forward pass. Logits, gradients and running statistics stay the same. It is not part of the
        state dict, and without a gradient nothing changes.
        """
        self._grad_checkpointing = enable

    def _enter(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B,in_chans,H,W) -> map (B,stem,ceil(H/2),ceil(W/2)), tokens (B,M,D): what the first block gets."""
        self._check_input(x)
        if self._use_fused and not is_transformed():
            # Once, here: every operator and convolution after it keeps the layout of its input. Grouped
            # convolutions are several times slower in channels_last, so the variant that has them stays with
            # planes.
            planes = self.config.groups > 1
            x = x.contiguous(memory_format=torch.contiguous_format if planes else torch.channels_last)
            if self.in_chans == 1 and not planes:
                # One channel lies the same in both layouts, and its strides say planes: these say channels_last.
                x = x.reshape(x.shape[0], x.shape[2], x.shape[3], 1).permute(0, 3, 1, 2)
        return self.stem(x), self.tokens.repeat(x.shape[0], 1, 1)

    def _through(self, block: nn.Module, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """One block's map and tokens."""
        if self._grad_checkpointing and torch.is_grad_enabled():
            return recomputed(block, x, tokens)
        return block(x, tokens)

    def _make_block(self, in_channels: int, block: BlockConfig, drop_path: float) -> nn.Module:
        groups = self.config.groups
        if block.kind == "lite":
            return LiteBlock(in_channels, block, groups=groups, use_fused=self._use_fused)
        kind = SameBlock if block.kind == "same" else DownBlock
        return kind(
            in_channels,
            block,
            token_dim=self.config.token_dim,
            groups=groups,
            spatial_dynamic_relu=self.spatial_dynamic_relu,
            drop_path=drop_path,
            use_fused=self._use_fused,
        )

    def _check_input(self, x: Tensor) -> None:
        if isinstance(x, Proxy):  # of torch.fx.symbolic_trace: the graph is for any shape
            return
        if x.ndim != 4:
            raise ValueError(f"x: expected 4 dimensions (B, {self.in_chans}, H, W), got shape {tuple(x.shape)}")
        if x.shape[1] != self.in_chans:
            raise ValueError(f"x: expected {self.in_chans} channels, got {x.shape[1]} (shape {tuple(x.shape)})")
        if x.shape[2] < MIN_SIZE or x.shape[3] < MIN_SIZE:
            raise ValueError(f"x: expected height and width of at least {MIN_SIZE}, got {x.shape[2]} x {x.shape[3]}")
        expected = self.tokens.dtype
        if x.dtype != expected and not (x.is_floating_point() and torch.is_autocast_enabled(x.device.type)):
            raise TypeError(f"x: expected dtype {expected} like the model's parameters, got {x.dtype}")


def unwrap(model: Any) -> Classifier:
    """The model inside `torch.compile`'s or DistributedDataParallel's wrapper. Raises TypeError for anything else."""
    for wrapper in ("_orig_mod", "module"):
        model = getattr(model, wrapper, model)
    if not isinstance(model, Classifier):
        raise TypeError(f"model: expected a mobileformer.Model, got {type(model).__name__}")
    return model


def _check_at_least_one(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")


def _check_rate(name: str, value: float) -> None:
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name}: expected a number in [0, 1), got {value!r}")
