"""The feature pyramid: the backbone's maps, each with what the coarser ones know, in one width.

Legend: B batch, C channels of a map of the backbone, H W height and width, F width of the pyramid.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["FeaturePyramid"]


class FeaturePyramid(nn.Module):
    """One map of F channels for every map that is given, and `coarser` more at twice the stride each.

        inner_i = lateral_i(c_i) + nearest(inner_{i+1})      lateral: 1 x 1
        p_i     = output_i(inner_i)                          output: 3 x 3
        p_{n+1} = coarser(p_n)                               coarser: 3 x 3, stride 2, no activation between

    `nearest` repeats positions up to exactly the finer map's height and width, whatever these are.

    ========  ===================================  =================================================
    tensor    shape                                which
    ========  ===================================  =================================================
    maps      (B,C,H,W) each, the finest first     of the backbone, strides 8, 16 and 32 for instance
    returns   (B,F,H,W) each, and then             as many as maps, and `coarser` more
              (B,F,ceil(H/2),ceil(W/2)) and so on
    ========  ===================================  =================================================

    Convolutions have biases, 0 at first, and weights uniform in +-sqrt(3 / fan-in), with which they keep the variance.
    Source: Lin et al., Feature Pyramid Networks for Object Detection, CVPR 2017; the coarser maps are RetinaNet's,
    which has its first on the last map of the pyramid here and a ReLU before the second there.
    """

    def __init__(self, channels: Sequence[int], width: int, coarser: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(count, width, 1) for count in channels)
        self.output = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in channels)
        self.coarser = nn.ModuleList(nn.Conv2d(width, width, 3, stride=2, padding=1) for _ in range(coarser))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        inner = [lateral(x) for lateral, x in zip(self.lateral, maps, strict=True)]
        for level in range(len(inner) - 1, 0, -1):
            size = inner[level - 1].shape[2:]
            inner[level - 1] = inner[level - 1] + F.interpolate(inner[level], size=size, mode="nearest")
        found = [output(x) for output, x in zip(self.output, inner, strict=True)]
        for coarser in self.coarser:
            found.append(coarser(found[-1]))
        return found
