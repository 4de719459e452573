"""What all detectors share: they tell of their backbone, and give no answer that is not finite."""

from __future__ import annotations

from torch import Tensor, nn

from mobileformer.network.backbone import Backbone

__all__ = ["OnBackbone", "check_finite"]


class OnBackbone(nn.Module):
    """A network that holds a `backbone`, and says of itself what that says."""

    backbone: Backbone

    @property
    def variant(self) -> str:
        """Name of the backbone's variant, for instance "294m"."""
        return self.backbone.variant

    @property
    def in_chans(self) -> int:
        """Channels of the images."""
        return self.backbone.in_chans

    @property
    def use_fused(self) -> bool:
        """Whether the model was built on fused operators. Fixed: build another model to change it."""
        return self.backbone.use_fused

    @property
    def spatial_dynamic_relu(self) -> bool:
        """Whether the backbone's dynamic ReLU has slopes for every position."""
        return self.backbone.spatial_dynamic_relu

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As `Backbone.set_grad_checkpointing`, whose memory is the larger part."""
        self.backbone.set_grad_checkpointing(enable)


def check_finite(scores: Tensor, boxes: Tensor) -> None:
    """Raise ValueError where an answer's scores (...) or boxes (...,4) are NaN or infinite: it would be no answer."""
    if not bool(scores.isfinite().all() & boxes.isfinite().all()):
        raise ValueError("images: expected what gives finite scores and boxes, got NaN: an image or a weight is not")
