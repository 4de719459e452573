"""Numbers the authors published for each variant, and multiply-adds by two named counters. For reading, never for computing.

Top-1: ImageNet-1k validation, 224 x 224, as stated in the README of the authors' code (github.com/AAboys/MobileFormer),
the same as in the paper (Chen et al., Mobile-Former, CVPR 2022, arXiv 2108.05895).

Multiply-adds of one 224 x 224 image, in units of 1e6. Counters do not agree, so the name of the counter belongs to the number:

| counter | counts |
|---|---|
| fvcore | fvcore 0.1.5 on the authors' code, its default operators: rounds to the published names (26M ... 508M) |
| core | convolutions, linear layers and attention matrix products only; half of `torch.utils.flop_counter`'s figure |
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MADDS_COUNTERS", "PUBLISHED", "TOP1_SOURCE", "Published"]

TOP1_SOURCE = "ImageNet-1k validation, 224 x 224, stated by the authors (README of AAboys/MobileFormer; arXiv 2108.05895)"
MADDS_COUNTERS = {
    "fvcore": "fvcore 0.1.5 on the authors' code (the published counts)",
    "core": "convolution + linear + attention matrix products (torch.utils.flop_counter / 2)",
}


@dataclass(frozen=True)
class Published:
    """Top-1 in percent, multiply-adds in 1e6 per 224 x 224 image."""

    top1: float
    madds_fvcore: float
    madds_core: float


PUBLISHED = {
    "26m": Published(64.0, 26.0, 23.550208),
    "52m": Published(68.7, 51.8, 49.290496),
    "96m": Published(72.8, 96.3, 92.017040),
    "151m": Published(75.2, 152.0, 146.249168),
    "214m": Published(76.7, 215.3, 208.374240),
    "294m": Published(77.9, 295.4, 286.732160),
    "508m": Published(79.3, 510.6, 498.467680),
}
