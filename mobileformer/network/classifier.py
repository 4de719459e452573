"""The classifier: behind the backbone, the last bridge into the tokens and what makes logits of them and the map."""

from __future__ import annotations

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobileformer.config import VariantConfig
from mobileformer.files.metadata import Network
from mobileformer.network.backbone import Backbone, check_at_least_one, check_rate
from mobileformer.network.convolution import ConvNorm, channel_shuffle
from mobileformer.network.layers import MobileToFormer
from mobileformer.network.parts import part

__all__ = ["Classifier", "Head", "unwrap"]


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
class Classifier(Backbone):
    """`mobileformer.Model`, whose text tells it all, without what knows of inference."""

    # A subclass that computes nothing else says so in its own body; without that it is not folded for the engine.
    same_numbers = True

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
        check_at_least_one("num_classes", num_classes)
        check_rate("drop_rate", drop_rate)
        super().__init__(
            variant,
            in_chans=in_chans,
            use_fused=use_fused,
            drop_path_rate=drop_path_rate,
            spatial_dynamic_relu=spatial_dynamic_relu,
            initialise=False,
        )
        config = self.config
        self.num_classes = num_classes
        self.mobile_to_former = MobileToFormer(
            config.feature_channels, config.token_dim, drop_path=drop_path_rate, use_fused=use_fused
        )
        self.head = Head(config, num_classes, drop_rate=drop_rate, use_fused=use_fused)
        self.initialise()

    @classmethod
    def from_metadata(cls, metadata: Network, **arguments: Any) -> Self:
        """A fresh network of the variant, classes, channels and slopes that `metadata` tells of.

        `metadata` may be another network too, which tells the same. Other arguments are the class's own, and stand
        in place of what is told. Raises ValueError for one out of range.
        """
        told = {
            "variant": metadata.variant,
            "num_classes": metadata.num_classes,
            "in_chans": metadata.in_chans,
            "spatial_dynamic_relu": metadata.spatial_dynamic_relu,
        }
        return cls(**{**told, **arguments})

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


def unwrap(model: Any) -> Classifier:
    """The model inside `torch.compile`'s or DistributedDataParallel's wrapper. Raises TypeError for anything else."""
    for wrapper in ("_orig_mod", "module"):
        model = getattr(model, wrapper, model)
    if not isinstance(model, Classifier):
        raise TypeError(f"model: expected a mobileformer.Model, got {type(model).__name__}")
    return model
