"""Which query answers for which object: the assignment of least cost, one query to one object.

Legend: S sets of predictions, B images, Q queries, K classes, N objects of an image, N' of the image that has most.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mobileformer.detection.boxes import generalised_intersection_over_union, to_corners

__all__ = ["Matches", "match", "matching_cost"]


class Matches(NamedTuple):
    """Of every pair: its set, its image, the query, and the object among that image's. Four of (P) int64."""

    sets: Tensor
    images: Tensor
    queries: Tensor
    objects: Tensor


@torch.no_grad()
def matching_cost(
    class_cost: Tensor, boxes: Tensor, labels: Tensor, true_boxes: Tensor, *, class_weight: float
) -> Tensor:
    """What it costs that a query answers for an object:

        cost = class_weight class_cost[label] + 5 |box - true|_1 - 2 GIoU(box, true)

    ==========  ===========  ==========================================================================
    tensor      shape        meaning
    ==========  ===========  ==========================================================================
    class_cost  (S,B,Q,K)    of the query for each class: minus its probability, or what the focal loss
                             would gain
    boxes       (S,B,Q,4)    the queries', (cx, cy, w, h) as parts of the image
    labels      (B,N')       int64
    true_boxes  (B,N',4)     like boxes
    returns     (S,B,Q,N')
    ==========  ===========  ==========================================================================

    Source: Carion et al., End-to-End Object Detection with Transformers, ECCV 2020, section 3.1.
    """
    sets, _, queries, _ = boxes.shape
    by_label = class_cost.gather(3, labels[None, :, None].expand(sets, -1, queries, -1))
    true_boxes = true_boxes[None].expand(sets, -1, -1, -1)
    distance = torch.cdist(boxes, true_boxes, p=1)
    flat = [to_corners(given).flatten(0, 1) for given in (boxes, true_boxes)]
    overlap = torch.vmap(generalised_intersection_over_union)(*flat).unflatten(0, boxes.shape[:2])
    return class_weight * by_label + 5 * distance - 2 * overlap


def match(
    class_cost: Tensor, boxes: Tensor, labels: Sequence[Tensor], true_boxes: Sequence[Tensor], *, class_weight: float
) -> Matches:
    """The pairs that together cost least, in every set and image: min(Q, N) of them.

    class_cost and boxes as `matching_cost` has them; labels B of (N), true_boxes B of (N,4). Of an image with more
    objects than queries, as many objects as there are queries find one, those that cost least; the others find none.
    Where a cost is not finite, what is found is any pair rather than an error: the loss will say that it diverged.

    Raises ImportError, with what to install, where scipy is missing.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ModuleNotFoundError as error:
        raise ImportError("scipy is not installed: pip install 'mobileformer[detection]'", name=error.name) from None

    counts = [len(each) for each in labels]
    sets = boxes.shape[0]
    pairs: list[np.ndarray] = [np.empty((4, 0), dtype=np.int64)]
    if max(counts) > 0:
        padded = [pad_sequence(list(each), batch_first=True) for each in (labels, true_boxes)]
        costs = matching_cost(class_cost, boxes, *padded, class_weight=class_weight).float().cpu().numpy()
        highest = float(np.finfo(costs.dtype).max)
        costs = np.nan_to_num(costs, copy=False, nan=highest, posinf=highest, neginf=highest)
        for index in range(sets):
            for image, count in enumerate(counts):
                queries, objects = linear_sum_assignment(costs[index, image, :, :count])
                pairs.append(np.stack([np.full_like(queries, index), np.full_like(queries, image), queries, objects]))
    return Matches(*torch.from_numpy(np.concatenate(pairs, axis=1)).to(boxes.device))
