"""Boxes: two ways to write them, how much two of them share, and which of many on one object stays.

Legend: N boxes, K boxes of another set, B images. A box is (x1, y1, x2, y2), its left, top, right and lower edge in
pixels, from corner to corner, or (cx, cy, w, h), its centre, width and height; x runs to the right and y down.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "clip",
    "generalised_intersection_over_union",
    "intersection_over_union",
    "non_maximum_suppression",
    "to_centres",
    "to_corners",
]

_BLOCK = 256  # boxes that are compared at once with all that stay: of 10,000 in one class that takes 10 MB a tensor


def to_corners(boxes: Tensor) -> Tensor:
    """(..., 4) of (cx, cy, w, h) -> (..., 4) of (x1, y1, x2, y2)."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)


def to_centres(boxes: Tensor) -> Tensor:
    """(..., 4) of (x1, y1, x2, y2) -> (..., 4) of (cx, cy, w, h)."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], -1)


def clip(boxes: Tensor, height: float, width: float) -> Tensor:
    """Corners (..., 4), cut at the edges of an image of this height and width in pixels."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack([x1.clamp(0, width), y1.clamp(0, height), x2.clamp(0, width), y2.clamp(0, height)], -1)


def intersection_over_union(a: Tensor, b: Tensor) -> Tensor:
    """Of every pair: corners a (N,4), b (K,4) -> (N,K) in [0, 1]; 0 where both are empty."""
    intersection, union = _intersection_and_union(a, b)
    return intersection / union.clamp(min=torch.finfo(union.dtype).tiny)


def generalised_intersection_over_union(a: Tensor, b: Tensor) -> Tensor:
    """Of every pair: IoU less the share of the hull that neither covers. Corners (N,4), (K,4) -> (N,K) in [-1, 1].

    Source: Rezatofighi et al., CVPR 2019.
    """
    intersection, union = _intersection_and_union(a, b)
    sides = torch.maximum(a[:, None, 2:], b[None, :, 2:]) - torch.minimum(a[:, None, :2], b[None, :, :2])
    tiny = torch.finfo(union.dtype).tiny
    hull = sides.clamp(min=0).prod(-1).clamp(min=tiny)
    return intersection / union.clamp(min=tiny) - (hull - union) / hull


def _intersection_and_union(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    # Coordinate by coordinate, each in one piece: over a last axis of 2, every step would be a loop of two.
    ax1, ay1, ax2, ay2 = a.T.contiguous()[:, :, None]
    bx1, by1, bx2, by2 = b.T.contiguous()
    width = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp(min=0)
    height = (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp(min=0)
    intersection = width * height
    area_a = (ax2 - ax1).clamp(min=0) * (ay2 - ay1).clamp(min=0)
    area_b = (bx2 - bx1).clamp(min=0) * (by2 - by1).clamp(min=0)
    return intersection, area_a + area_b - intersection


def non_maximum_suppression(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """Positions of the boxes that stay, the highest score first: (N,4), (N), (N) -> (n) int64.

    A box goes where one of its own class with a higher score, which stays, has an IoU above `threshold` with it. Of
    equal scores the first in order counts as the higher.
    """
    order = scores.argsort(descending=True, stable=True)
    boxes, labels = boxes[order], labels[order]
    stays = order.new_empty(0)  # in the order of the scores
    for block in torch.arange(len(order), device=order.device).split(_BLOCK):
        gone = _suppress(boxes, labels, block, stays, threshold).any(1)
        block = block[~gone]
        above = _suppress(boxes, labels, block, block, threshold).tril(-1)  # [i, j]: j comes before i and overlaps it
        stays = torch.cat([stays, block[_stays(above)]])
    return order[stays]


def _suppress(boxes: Tensor, labels: Tensor, rows: Tensor, columns: Tensor, threshold: float) -> Tensor:
    """Of every pair of boxes by their positions, whether they are of one class and overlap too much for both to stay.

    (n), (m) -> (n,m) bool.
    """
    overlap = intersection_over_union(boxes[rows], boxes[columns]) > threshold
    return overlap & (labels[rows][:, None] == labels[columns])


def _stays(above: Tensor) -> Tensor:
    """Whether each box stays, of which [i, j] says whether j comes before i and overlaps it: (N,N) bool -> (N) bool.

    A pass keeps all that no undecided box before them overlaps, and drops what those overlap: as many passes as the
    longest chain of boxes that suppress one another in turn, which is a handful, not one for each box.
    """
    undecided = torch.ones(len(above), dtype=torch.bool, device=above.device)
    stays = torch.zeros_like(undecided)
    while bool(undecided.any()):
        first = undecided & ~(above & undecided).any(1)
        stays |= first
        undecided &= ~first & ~(above & first).any(1)
    return stays
