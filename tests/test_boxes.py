"""Boxes: their forms and overlaps against the plain definition, and non-maximum suppression against a slow one."""

from __future__ import annotations

import pytest
import torch
from detection_support import torchvision_ops
from torch import Tensor

from mobileformer.detection import boxes as module
from mobileformer.detection.boxes import (
    clip,
    generalised_intersection_over_union,
    intersection_over_union,
    non_maximum_suppression,
    to_centres,
    to_corners,
)

Box = list[float]


def some_boxes(count: int, spread: float, *, seed: int = 0, side: float = 30) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator, dtype=torch.float64) * spread
    return torch.cat([corner, corner + torch.rand(count, 2, generator=generator, dtype=torch.float64) * side], 1)


def areas(a: Box, b: Box) -> tuple[float, float, float]:
    """Intersection, union, hull."""
    intersection = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)) - intersection
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return intersection, union, hull


def overlap(a: Box, b: Box) -> float:
    intersection, union, _ = areas(a, b)
    return intersection / union if union else 0.0


def greedy(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float) -> list[int]:
    """Non-maximum suppression as it is told: one box after the other, against all that stay."""
    corners, classes, values = boxes.tolist(), labels.tolist(), scores.tolist()
    stays: list[int] = []
    for i in sorted(range(len(values)), key=lambda i: (-values[i], i)):
        if all(classes[i] != classes[j] or overlap(corners[i], corners[j]) <= threshold for j in stays):
            stays.append(i)
    return stays


# Forms and overlaps


def test_the_two_forms_are_each_other_s_reverse() -> None:
    boxes = some_boxes(50, 100)
    assert to_centres(torch.tensor([[2.0, 4, 6, 10]])).tolist() == [[4, 7, 4, 6]]
    torch.testing.assert_close(to_corners(to_centres(boxes)), boxes)


def test_boxes_are_cut_at_the_edges() -> None:
    boxes = torch.tensor([[-3.0, -2, 5, 7], [8, 3, 30, 40], [25, 3, 30, 5]])
    assert clip(boxes, 10, 20).tolist() == [[0, 0, 5, 7], [8, 3, 20, 10], [20, 3, 20, 5]]


def test_overlaps_are_those_of_every_pair() -> None:
    a, b = some_boxes(17, 40), some_boxes(23, 40, seed=1)
    iou, generalised = intersection_over_union(a, b), generalised_intersection_over_union(a, b)
    assert iou.count_nonzero() > 30
    for i, first in enumerate(a.tolist()):
        for j, second in enumerate(b.tolist()):
            intersection, union, hull = areas(first, second)
            assert iou[i, j].item() == pytest.approx(intersection / union, abs=1e-12)
            assert generalised[i, j].item() == pytest.approx(intersection / union - (hull - union) / hull, abs=1e-12)


def test_empty_boxes_overlap_with_nothing_and_give_no_nan() -> None:
    boxes = torch.tensor([[3.0, 3, 3, 3], [3, 3, 3, 9], [0, 0, 9, 9]])
    assert intersection_over_union(boxes, boxes).tolist() == [[0, 0, 0], [0, 0, 0], [0, 0, 1]]
    assert generalised_intersection_over_union(boxes, boxes).isfinite().all()
    assert intersection_over_union(boxes[:0], boxes).shape == (0, 3)
    assert generalised_intersection_over_union(boxes, boxes[:0]).shape == (3, 0)


def test_overlaps_are_torchvision_s() -> None:
    ops = torchvision_ops()
    a, b = some_boxes(40, 60), some_boxes(30, 60, seed=1)
    torch.testing.assert_close(intersection_over_union(a, b), ops.box_iou(a, b))
    torch.testing.assert_close(generalised_intersection_over_union(a, b), ops.generalized_box_iou(a, b))


def test_the_generalised_overlap_has_gradients() -> None:
    a = some_boxes(4, 20).requires_grad_()
    assert torch.autograd.gradcheck(lambda boxes: generalised_intersection_over_union(boxes, some_boxes(3, 20)), a)


# Non-maximum suppression


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_stays_is_what_one_after_the_other_gives(
    threshold: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Crowded, in three classes, with scores that many share; in blocks that end anywhere."""
    monkeypatch.setattr(module, "_BLOCK", 37)
    boxes = some_boxes(300, 30).to(dtype)
    generator = torch.Generator().manual_seed(2)
    scores = torch.randint(0, 9, (300,), generator=generator) / 9
    labels = torch.randint(0, 3, (300,), generator=generator)
    expected = greedy(boxes, scores, labels, threshold)
    assert 3 < len(expected) < 280
    assert non_maximum_suppression(boxes, scores, labels, threshold).tolist() == expected


def test_none_one_and_the_same_many_times() -> None:
    label = torch.zeros(600, dtype=torch.int64)
    box = torch.tensor([[1.0, 2, 8, 9]])
    assert non_maximum_suppression(box[:0], torch.rand(0), label[:0], 0.5).tolist() == []
    assert non_maximum_suppression(box, torch.rand(1), label[:1], 0.5).tolist() == [0]
    scores = torch.linspace(0, 1, 600).roll(7)  # the highest is the seventh
    assert non_maximum_suppression(box.expand(600, 4), scores, label, 0.5).tolist() == [6]
    assert non_maximum_suppression(box.expand(600, 4), torch.ones(600), label, 0.5).tolist() == [0]  # ties: the first
    assert non_maximum_suppression(box.expand(5, 4), torch.ones(5), torch.arange(5), 0.5).tolist() == [0, 1, 2, 3, 4]


def test_an_overlap_of_the_threshold_itself_stays() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5]])
    scores, labels = torch.tensor([0.9, 0.8]), torch.zeros(2, dtype=torch.int64)
    assert non_maximum_suppression(boxes, scores, labels, 0.5).tolist() == [0, 1]
    assert non_maximum_suppression(boxes, scores, labels, 0.499).tolist() == [0]


def test_what_a_dropped_box_overlaps_may_stay() -> None:
    """A row of boxes, each over the next alone: every second one stays, in chains longer than a block."""
    x = torch.arange(600.0)[:, None] * 4
    boxes = torch.cat([x, 0 * x, x + 10, 0 * x + 10], 1)
    stays = non_maximum_suppression(boxes, -torch.arange(600.0), torch.zeros(600, dtype=torch.int64), 0.4)
    assert stays.tolist() == list(range(0, 600, 2))


@pytest.mark.parametrize(("spread", "at_least"), [(300, 1000), (1e6, 9_900)])
def test_ten_thousand_of_one_class(spread: float, at_least: int) -> None:
    """No tensor of all pairs: of 10,000 that is 400 MB, and there would be several."""
    boxes, scores = some_boxes(10_000, spread).float(), torch.rand(10_000, generator=torch.Generator().manual_seed(1))
    labels = torch.zeros(10_000, dtype=torch.int64)
    largest = 0
    with torch.profiler.profile(profile_memory=True) as profile:
        stays = non_maximum_suppression(boxes, scores, labels, 0.5)
    held = 0
    for event in profile.profiler.kineto_results.events():  # allocations and releases in order
        if event.name() == "[memory]":
            held += event.nbytes()
            largest = max(largest, held)
    assert 1e6 < largest < 200e6
    assert len(stays) >= at_least
    assert (scores[stays].diff() <= 0).all()
    kept = torch.zeros(10_000, dtype=torch.bool)
    kept[stays] = True
    for i in torch.randint(0, 10_000, (300,), generator=torch.Generator().manual_seed(2)).tolist():
        above = intersection_over_union(boxes[i : i + 1], boxes)[0] > 0.5
        assert bool(kept[i]) == (not (above & kept & (scores > scores[i])).any())


def test_what_stays_is_what_torchvision_keeps() -> None:
    ops = torchvision_ops(compiled=True)
    boxes, scores = some_boxes(2000, 300).float(), torch.rand(2000)
    labels = torch.randint(0, 4, (2000,))
    expected = ops.batched_nms(boxes, scores, labels, 0.5)
    assert torch.equal(non_maximum_suppression(boxes, scores, labels, 0.5), expected)
