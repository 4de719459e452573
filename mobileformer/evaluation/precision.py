"""How well boxes are found: COCO's average precision (AP) and average recall (AR), counted by faster-coco-eval.

A found box is right where it overlaps a true one of its class by an intersection over union (IoU) of at least a
threshold, and no box with a higher score took that one. Precision, the share of found boxes that are right, is read at
101 recalls 0, 0.01, ... 1, as the highest at that recall or beyond; its mean is the AP of a class at a threshold. AP is
the mean over the classes that there are and the thresholds .50, .55, ... .95; AP50 and AP75 are of one threshold. What
lies in a crowd's box is neither right nor wrong. Small are objects below 32^2 pixels, large ones from 96^2 on.

Source: T.-Y. Lin et al., "Microsoft COCO: Common Objects in Context", and the evaluation page at cocodataset.org.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from mobileformer.evaluation.classes import EvaluationError

if TYPE_CHECKING:
    from mobileformer.data.batch import Batch

__all__ = ["THRESHOLDS", "Detections", "Precision", "average_precision"]

THRESHOLDS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))  # of IoU
RECALLS = 101
AREAS = ("all", "small", "medium", "large")  # in the library's order
MOST = (1, 10, 100)  # found boxes of a class that count in an image, the highest scores first
FOUND, TRUE = ("boxes", "labels", "scores"), ("boxes", "labels", "areas", "crowd", "crowd_labels")


@dataclass(frozen=True, eq=False)
class Precision:
    """Figures between 0 and 1; NaN where there is nothing to find. K classes, T = 10 thresholds, R = 101 recalls.

    | name | shape | meaning |
    |---|---|---|
    | ap, ap50, ap75 | | over the thresholds; at .50; at .75 |
    | ap_small, ap_medium, ap_large | | of the objects of a size alone |
    | ar1, ar10, ar100 | | recall with so many boxes of a class and image, the mean over thresholds and classes |
    | ar_small, ar_medium, ar_large | | with 100 boxes, of the objects of a size alone |
    | of_class, of_class50 | (K) | AP and AP50 of each class |
    | recalls | (R) | 0, 0.01, ... 1 |
    | curves | (T, R, K) | precision at each of `THRESHOLDS`, recall and class |
    | images, objects, found | | that were counted; objects without crowds |
    """

    ap: float
    ap50: float
    ap75: float
    ap_small: float
    ap_medium: float
    ap_large: float
    ar1: float
    ar10: float
    ar100: float
    ar_small: float
    ar_medium: float
    ar_large: float
    of_class: npt.NDArray[np.float64]
    of_class50: npt.NDArray[np.float64]
    recalls: npt.NDArray[np.float64]
    curves: npt.NDArray[np.float64]
    images: int
    objects: int
    found: int

    def as_json(self, classes: Sequence[str]) -> dict[str, Any]:
        """The figures under COCO's names, `None` for NaN, which is no JSON; `classes` in the order of the labels."""
        sizes = ("small", "medium", "large")
        figures = {"AP": self.ap, "AP50": self.ap50, "AP75": self.ap75}
        figures |= {f"AP_{size}": getattr(self, f"ap_{size}") for size in sizes}
        figures |= {f"AR{most}": getattr(self, f"ar{most}") for most in MOST}
        figures |= {f"AR_{size}": getattr(self, f"ar_{size}") for size in sizes}
        return {
            **{name: _or_none(value) for name, value in figures.items()},
            "classes": [
                {"name": name, "AP": _or_none(ap), "AP50": _or_none(ap50)}
                for name, ap, ap50 in zip(classes, self.of_class.tolist(), self.of_class50.tolist(), strict=True)
            ],
            "images": self.images,
            "objects": self.objects,
            "found": self.found,
        }


class Detections:
    """What was found in each image of a split and what is there, until it is counted; pixels of the image's file.

    | method | what |
    |---|---|
    | add(index, found, truth) | image `index` of the split; found: boxes (n, 4) corners, labels (n), scores (n); |
    | | truth: a target of `CocoSource` |
    | add_batch(batch, answers) | the same for each image of a `Batch` of `BoxTransform` with its truths |
    | gathered() | those of all processes of torch.distributed, the same on each; itself where there is one |

    Raises:
        EvaluationError: a found box or score that is NaN or infinite, or a label that is no class; the message names
            the image.
        ValueError: an image is added twice; a batch without truths; as many answers as images are expected.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.images: dict[int, tuple[dict[str, npt.NDArray[Any]], dict[str, npt.NDArray[Any]]]] = {}

    def __len__(self) -> int:
        return len(self.images)

    def add(self, index: int, found: Mapping[str, Any], truth: Mapping[str, Any]) -> None:
        mine = {name: _array(found[name]) for name in FOUND}
        if index in self.images:
            raise ValueError(f"index: image {index} was added before")
        if not (np.isfinite(mine["boxes"]).all() and np.isfinite(mine["scores"]).all()):
            raise EvaluationError(f"a box found in image {index} is not finite, so it cannot be counted")
        labels = mine["labels"]
        if len(labels) and not (labels.min() >= 0 and labels.max() < self.num_classes):
            raise EvaluationError(
                f"a box found in image {index} has a label that is none of {self.num_classes} classes"
            )
        self.images[index] = mine, {name: _array(truth[name]) for name in TRUE}

    def add_batch(self, batch: Batch, answers: Sequence[Mapping[str, Any]]) -> None:
        y = batch.y
        if len(y.truths) != len(y):
            raise ValueError("batch: has no truths; BoxTransform.for_evaluation keeps them")
        for place, (index, answer, truth) in enumerate(zip(batch.index.tolist(), answers, y.truths, strict=True)):
            self.add(index, {**answer, "boxes": y.in_original(answer["boxes"], place)}, truth)

    def gathered(self) -> Detections:
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return self
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, self.images)
        whole = Detections(self.num_classes)
        for part in parts:
            whole.images |= part
        return whole


def average_precision(detections: Detections) -> Precision:
    """COCO's figures of the images that were added, whatever the order in which they were.

    Of boxes with equal scores the one of the earlier image counts first, within an image the one given first. Without
    a found box every figure of a class that there is is 0; without a true one all are NaN.

    Raises ImportError where faster-coco-eval is missing.
    """
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError as error:
        raise ImportError("faster-coco-eval: not installed; pip install 'mobileformer[detection]' brings it") from error
    true, found = _records(detections)
    objects = sum(not record["iscrowd"] for record in true)
    shape = len(THRESHOLDS), RECALLS, detections.num_classes, len(AREAS), len(MOST)
    precision, recall = np.full(shape, np.nan), np.full((shape[0], *shape[2:]), np.nan)
    if detections.images:
        rest = {
            "images": [{"id": index} for index in sorted(detections.images)],
            "categories": [{"id": label, "name": str(label)} for label in range(detections.num_classes)],
        }
        truth, answers = COCO({**rest, "annotations": true}), COCO({**rest, "annotations": found})
        counted = COCOeval_faster(truth, answers, "bbox", print_function=lambda *_: None)
        counted.evaluate()
        counted.accumulate()
        # -1 stands for "no such object"
        precision, recall = (
            np.where(values < 0, np.nan, values)
            for values in (
                np.reshape(counted.eval["precision"], shape),
                np.reshape(counted.eval["recall"], recall.shape),
            )
        )
    full = precision[..., 0, -1]  # (T, R, K): all sizes, 100 boxes
    by_size = {name: _mean(precision[..., place, -1]) for place, name in enumerate(AREAS)}
    recall_by_size = {name: _mean(recall[..., place, -1]) for place, name in enumerate(AREAS)}
    return Precision(
        ap=by_size["all"],
        ap50=_mean(full[THRESHOLDS.index(0.5)]),
        ap75=_mean(full[THRESHOLDS.index(0.75)]),
        ap_small=by_size["small"],
        ap_medium=by_size["medium"],
        ap_large=by_size["large"],
        ar1=_mean(recall[..., 0, 0]),
        ar10=_mean(recall[..., 0, 1]),
        ar100=_mean(recall[..., 0, 2]),
        ar_small=recall_by_size["small"],
        ar_medium=recall_by_size["medium"],
        ar_large=recall_by_size["large"],
        of_class=full.mean((0, 1)),  # of a class there are all values, or none
        of_class50=full[THRESHOLDS.index(0.5)].mean(0),
        recalls=np.linspace(0, 1, RECALLS),
        curves=full,
        images=len(detections.images),
        objects=objects,
        found=len(found),
    )


def _records(detections: Detections) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """True and found boxes as the library takes them; numbered from 1, as it takes a 0 for none."""
    true: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for index in sorted(detections.images):
        answer, truth = detections.images[index]
        sides = _sides(answer["boxes"])
        for box, label, score in zip(sides, answer["labels"].tolist(), answer["scores"].tolist(), strict=True):
            record = {"id": len(found) + 1, "image_id": index, "category_id": label, "bbox": box}
            found.append({**record, "score": score, "area": box[2] * box[3], "iscrowd": 0})
        crowds = _sides(truth["crowd"])
        areas = [*truth["areas"].tolist(), *(box[2] * box[3] for box in crowds)]
        labels = [*truth["labels"].tolist(), *truth["crowd_labels"].tolist()]
        for place, box in enumerate([*_sides(truth["boxes"]), *crowds]):
            record = {"id": len(true) + 1, "image_id": index, "category_id": labels[place], "bbox": box}
            true.append({**record, "area": areas[place], "iscrowd": int(place >= len(truth["labels"]))})
    return true, found


def _sides(corners: npt.NDArray[Any]) -> list[list[float]]:
    """Corners (n, 4) as [left, top, width, height] in float64."""
    boxes = corners.astype(np.float64).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], (boxes[:, 2:] - boxes[:, :2]).clip(0)], 1).tolist()


def _array(values: Any) -> npt.NDArray[Any]:
    if not isinstance(values, torch.Tensor):
        return np.asarray(values)
    return (values.float() if values.is_floating_point() else values).detach().cpu().numpy()  # numpy has no bfloat16


def _mean(values: npt.NDArray[np.float64]) -> float:
    there = values[~np.isnan(values)]
    return float(there.mean()) if there.size else math.nan


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value
