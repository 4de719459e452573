"""What a set of predictions costs against the objects that are there, by two presets.

Legend: S sets of predictions, B images, Q queries, K classes, K' numbers of the class layer, P matched pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mobileformer.detection.boxes import generalised_intersection_over_union, to_centres, to_corners
from mobileformer.detection.inputs import Target
from mobileformer.detection.losses import sigmoid_focal_loss
from mobileformer.detection.matching import Matches, match

__all__ = ["PRESETS", "Preset", "get_preset", "set_loss"]

NO_OBJECT_WEIGHT = 0.1
FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0


@dataclass(frozen=True, slots=True)
class Preset:
    """How classes are told apart. Boxes cost 5 L1 + 2 (1 - GIoU) in both.

    ============  ==============================================================================================
    field         meaning
    ============  ==============================================================================================
    no_object     True: a softmax over the classes and one more, which says that there is nothing; False: a sigmoid
                  for each class
    class_cost    weight of the class when queries and objects are matched
    class_weight  weight of the class loss
    ============  ==============================================================================================
    """

    no_object: bool
    class_cost: float
    class_weight: float

    def outputs(self, num_classes: int) -> int:
        """Width of the class layer, K'."""
        return num_classes + self.no_object

    def scores(self, logits: Tensor) -> Tensor:
        """(...,K') -> how sure of each class, (...,K) in [0, 1]."""
        return logits.softmax(-1)[..., :-1] if self.no_object else logits.sigmoid()

    def matching(self, logits: Tensor) -> Tensor:
        """(...,K') -> what the class costs in the matching, before its weight, (...,K).

        Minus the probability; or what the focal loss of a 1 is above that of a 0.
        """
        if self.no_object:
            return -self.scores(logits)
        ones, zeros = torch.ones_like(logits), torch.zeros_like(logits)
        return sigmoid_focal_loss(logits, ones, FOCAL_ALPHA, FOCAL_GAMMA) - sigmoid_focal_loss(
            logits, zeros, FOCAL_ALPHA, FOCAL_GAMMA
        )

    def best(self, logits: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of (B,Q,K') the surest answers, the surest first: scores, queries and labels, each (B,n).

        With a softmax every query has one class, n = min(count, Q); with sigmoids any class of any query is an answer
        of its own, n = min(count, Q K). So they are counted in DETR and in Conditional DETR.
        """
        scores = self.scores(logits)
        classes = scores.shape[2]
        if self.no_object:
            scores, labels = scores.max(-1)
            scores, queries = scores.topk(min(count, scores.shape[1]))
            return scores, queries, labels.gather(1, queries)
        scores, places = scores.flatten(1).topk(min(count, scores[0].numel()))
        return scores, places // classes, places % classes


PRESETS = {
    "detr": Preset(no_object=True, class_cost=1.0, class_weight=1.0),
    "focal": Preset(no_object=False, class_cost=2.0, class_weight=2.0),
}


def get_preset(name: str) -> Preset:
    """The preset called `name`. Raises ValueError naming those that exist."""
    if name not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]


def set_loss(
    logits: Tensor, boxes: Tensor, targets: Sequence[Target], sizes: Tensor, preset: Preset
) -> dict[str, Tensor]:
    """Losses by name, weighted; each is the sum over all S sets, which are matched on their own.

        class  detr:  weighted mean over the queries of the cross-entropy, "no object" weighing 0.1
               focal: 2 / N times the sum over queries and classes of the sigmoid focal loss
        box    5 / N times the sum over pairs of |box - true|_1, boxes as (cx, cy, w, h) in parts of the image
        giou   2 / N times the sum over pairs of 1 - GIoU(box, true)

    N is the number of objects in the batch, and at least 1; where torch.distributed is initialised it is the mean over
    the processes, since those average their gradients.

    =======  ===========  ==============================================================
    tensor   shape        meaning
    =======  ===========  ==============================================================
    logits   (S,B,Q,K')
    boxes    (S,B,Q,4)    (cx, cy, w, h), in parts of each image
    targets  B            of {"boxes": (N,4) corners in pixels, "labels": (N) int64}
    sizes    (B,2)        height and width of each image in pixels
    =======  ===========  ==============================================================

    Source: Carion et al., ECCV 2020; with the focal loss as Meng et al., Conditional DETR, ICCV 2021.
    """
    # Where a forward pass ran in half precision, its losses and costs are still those of float32.
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logits, boxes = logits.to(dtype), boxes.to(dtype)
    labels = [target["labels"].to(boxes.device) for target in targets]
    scale = sizes.flip(1).repeat(1, 2).to(boxes)  # (B,4): width, height, width, height
    true = [to_centres(target["boxes"].to(boxes)) / own for target, own in zip(targets, scale, strict=True)]
    matches = match(preset.matching(logits.detach()), boxes.detach(), labels, true, class_weight=preset.class_cost)
    count = _mean_over_processes(sum(map(len, labels)), boxes)

    firsts = torch.tensor([0, *map(len, labels[:-1])], device=boxes.device).cumsum(0)
    chosen = firsts[matches.images] + matches.objects  # among the objects of all images
    label, wanted = torch.cat(labels)[chosen], torch.cat(true)[chosen]
    found = boxes[matches.sets, matches.images, matches.queries]
    overlap = torch.vmap(generalised_intersection_over_union)(to_corners(found)[:, None], to_corners(wanted)[:, None])
    return {
        "class": preset.class_weight * _class_loss(logits, matches, label, count, preset),
        "box": 5 * (found - wanted).abs().sum() / count,
        "giou": 2 * (1 - overlap).sum() / count,
    }


def _class_loss(logits: Tensor, matches: Matches, label: Tensor, count: Tensor, preset: Preset) -> Tensor:
    place = matches.sets, matches.images, matches.queries
    if not preset.no_object:
        wanted = torch.zeros_like(logits)
        wanted[(*place, label)] = 1
        return sigmoid_focal_loss(logits, wanted, FOCAL_ALPHA, FOCAL_GAMMA).sum() / count
    nothing = logits.shape[-1] - 1
    wanted = torch.full(logits.shape[:-1], nothing, device=logits.device)
    wanted[place] = label
    weight = torch.ones_like(logits[0, 0, 0])
    weight[nothing] = NO_OBJECT_WEIGHT
    losses = F.cross_entropy(logits.flatten(0, 2), wanted.flatten(), weight, reduction="none").view_as(wanted)
    return (losses.sum((1, 2)) / weight[wanted].sum((1, 2))).sum()


def _mean_over_processes(objects: int, like: Tensor) -> Tensor:
    count = like.new_tensor(float(objects))
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(count)
        count = count / dist.get_world_size()
    return count.clamp(min=1)
