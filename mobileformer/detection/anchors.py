"""Anchors: boxes laid over the maps, which of them learn which true box, and boxes written as their displacements.

Legend: A anchors, N true boxes of one image. Boxes are corners (x1, y1, x2, y2) in pixels.

The rules are torchvision's, the code is not: that is an extra, rounds anchors to whole pixels (which one of 16 pixels
notices), and takes the padded image over the map for the stride (which is off for odd sizes). A test compares them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mobileformer.detection.boxes import intersection_over_union, to_centres, to_corners

__all__ = ["ANCHORS", "BACKGROUND", "UNDECIDED", "anchors_on", "decode", "encode", "match"]

_SCALES = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))
_RATIOS = (0.5, 1.0, 2.0)  # of height to width
ANCHORS = len(_SCALES) * len(_RATIOS)
"""At every position of a map."""

BACKGROUND = -1
UNDECIDED = -2
_OVERLAP = 0.5  # from here on an anchor learns a box
_NO_OVERLAP = 0.4  # below it learns that there is none

_LARGEST_GROWTH = math.log(1000 / 16)  # of an anchor's side, as a logarithm: exp of more would be no box


def anchors_on(
    sizes: Sequence[tuple[int, int]], strides: Sequence[int], scale: float, *, like: Tensor
) -> tuple[Tensor, Tensor]:
    """All anchors of maps of these heights and widths, map by map, row by row, position by position.

    At the position (i, j) of a map of stride s lie `ANCHORS` around the pixel (j s, i s), which the convolutions that
    lead there have in their middle: squares of the sides `scale` s (1, 2^1/3, 2^2/3), and the same area twice as wide
    and twice as high.

    Returns anchors (A,4) and their centres (A,2) as (x, y), on the device of `like` and in its dtype.
    Source: RetinaNet (Lin et al., ICCV 2017), section 4.
    """
    corners, middles = [], []
    for (height, width), stride in zip(sizes, strides, strict=True):
        side = [
            [stride * scale * s * w for w in (ratio**-0.5, ratio**0.5)] for ratio in _RATIOS for s in _SCALES
        ]  # (width, height)
        y = torch.arange(height, device=like.device) * stride
        x = torch.arange(width, device=like.device) * stride
        middle = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], -1).to(like.dtype)
        middle = middle[:, :, None].expand(height, width, ANCHORS, 2)
        sides = torch.tensor(side, device=like.device, dtype=like.dtype).expand(height, width, ANCHORS, 2)
        corners.append(to_corners(torch.cat([middle, sides], -1)).reshape(-1, 4))
        middles.append(middle.reshape(-1, 2))
    return torch.cat(corners), torch.cat(middles)


def match(boxes: Tensor, anchors: Tensor) -> Tensor:
    """What each anchor learns: boxes (N,4), anchors (A,4) -> (A) int64, a position in `boxes` or one of two others.

    The box with which its IoU is largest, where that is at least 0.5, or where the anchor is the best there is for some
    box that it overlaps at all: a box that no anchor fits well is learned, too. Of the others an anchor is `BACKGROUND`
    below 0.4, and `UNDECIDED` between, which learns nothing.
    """
    if not len(boxes):
        return torch.full((len(anchors),), BACKGROUND, device=anchors.device)
    overlap = intersection_over_union(boxes, anchors)
    largest, chosen = overlap.max(0)
    best_of_box = overlap.amax(1, keepdim=True)
    learns = (largest >= _OVERLAP) | ((overlap == best_of_box) & (best_of_box > 0)).any(0)
    none = torch.where(largest < _NO_OVERLAP, BACKGROUND, UNDECIDED)
    return torch.where(learns, chosen, none)


def encode(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Boxes (A,4) as displacements (A,4) of the anchors (A,4): of the centre in sides, of the sides as logarithms.

    ((cx - ax) / aw, (cy - ay) / ah, log(w / aw), log(h / ah))
    """
    box, anchor = to_centres(boxes), to_centres(anchors)
    return torch.cat([(box[:, :2] - anchor[:, :2]) / anchor[:, 2:], (box[:, 2:] / anchor[:, 2:]).log()], -1)


def decode(displacements: Tensor, anchors: Tensor) -> Tensor:
    """The reverse of `encode`, (...,A,4) and (A,4) -> (...,A,4). No side grows to more than 1000 / 16 anchors."""
    anchor = to_centres(anchors)
    centre = displacements[..., :2] * anchor[..., 2:] + anchor[..., :2]
    sides = displacements[..., 2:].clamp(max=_LARGEST_GROWTH).exp() * anchor[..., 2:]
    return to_corners(torch.cat([centre, sides], -1))
