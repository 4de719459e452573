"""COCO's metric: known cases, a slow count of our own, nothing to find, several processes; curves and boxes drawn."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mobileformer.data.batch import Batch
from mobileformer.data.box_transforms import BoxTransform
from mobileformer.evaluation.classes import EvaluationError
from mobileformer.evaluation.precision import THRESHOLDS, Detections, Precision, average_precision
from mobileformer.visualize.boxes import draw_box_sheet, draw_boxes
from mobileformer.visualize.precision_recall import draw_precision_recall

pytest.importorskip("faster_coco_eval")


def corners(boxes: Any) -> np.ndarray:
    return np.array(boxes, np.float32).reshape(-1, 4)


def truth(boxes: Any = (), labels: Any = (), crowd: Any = (), crowd_labels: Any = ()) -> dict[str, np.ndarray]:
    box = corners(boxes)
    areas = (box[:, 2:] - box[:, :2]).prod(1)
    found = {"boxes": box, "labels": np.array(labels, np.int64), "areas": areas}
    return found | {"crowd": corners(crowd), "crowd_labels": np.array(crowd_labels, np.int64)}


def answer(boxes: Any = (), labels: Any = (), scores: Any = ()) -> dict[str, np.ndarray]:
    return {"boxes": corners(boxes), "labels": np.array(labels, np.int64), "scores": np.array(scores, np.float32)}


def counted(pairs: Iterable[tuple[dict[str, Any], dict[str, Any]]], classes: int = 3) -> Precision:
    detections = Detections(classes)
    for index, (found, true) in enumerate(pairs):
        detections.add(index, found, true)
    return average_precision(detections)


A, B, C = [0, 0, 40, 40], [50, 50, 90, 90], [100, 0, 140, 40]


def test_known_cases() -> None:
    right = counted([(answer([A, B], [0, 1], [0.9, 0.8]), truth([A, B], [0, 1]))])
    assert (right.ap, right.ap50, right.ap75, right.ar100) == (1, 1, 1, 1)
    assert (right.images, right.objects, right.found) == (1, 2, 2)
    assert right.of_class[:2].tolist() == [1, 1]
    # Right, wrong, right of two: precision 1 up to recall .5, then 2/3
    mixed = counted([(answer([A, C, B], [0, 0, 0], [0.9, 0.8, 0.7]), truth([A, B], [0, 0]))])
    assert mixed.ap == pytest.approx((51 + 50 * 2 / 3) / 101)
    # The wrong one first: 1/2 and 2/3, of which the higher one counts everywhere
    mixed = counted([(answer([A, C, B], [0, 0, 0], [0.7, 0.8, 0.6]), truth([A, B], [0, 0]))])
    assert mixed.ap50 == pytest.approx(2 / 3)
    # One found twice is wrong the second time, one is missed
    twice = counted([(answer([A, A], [0, 0], [0.9, 0.8]), truth([A, B], [0, 0]))])
    assert (twice.ap, twice.ar1, twice.ar100) == (pytest.approx(51 / 101), 0.5, 0.5)
    # IoU 0.8: right at .50 to .80, seven thresholds of ten
    moved = counted([(answer([[0, 0, 40, 32]], [0], [0.9]), truth([A], [0]))])
    assert (moved.ap, moved.ap50, moved.ap75) == (pytest.approx(0.7), 1, 1)
    assert moved.curves[:, 0, 0].tolist() == [1] * 7 + [0] * 3
    # In a crowd's box nothing is wrong, of another class it is
    crowd = [[40, 40, 300, 300]]
    assert counted([(answer([A, B, C], [0, 0, 1], [0.5, 0.9, 0.9]), truth([A], [0], crowd, [0]))]).ap == 1
    assert counted([(answer([A, B], [0, 0], [0.5, 0.9]), truth([A], [0], crowd, [1]))]).ap == 0.5
    # Another class is not right
    assert counted([(answer([A], [1], [0.9]), truth([A], [0]))]).ap == 0


def test_sizes_are_apart() -> None:
    small, large = [0, 0, 30, 30], [0, 100, 97, 197]
    found = counted([(answer([small, B], [0, 0], [0.9, 0.8]), truth([small, B, large], [0, 0, 0]))])
    assert (found.ap_small, found.ap_medium, found.ap_large) == (1, 1, 0)
    assert (found.ar_small, found.ar_medium, found.ar_large) == (1, 1, 0)
    # The outline decides, not the box
    thin = truth([large], [0]) | {"areas": np.array([900.0])}
    assert counted([(answer([large], [0], [1]), thin)]).ap_small == 1


# Counted as the definition says, one box after another


def overlap(a: Any, b: Any, crowd: bool) -> float:
    wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0.0, wide) * max(0.0, high)
    sizes = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return shared / (sizes[0] if crowd else sizes[0] + sizes[1] - shared)


def slow_precision(pairs: list[Any], label: int, threshold: float) -> float:
    marks: list[tuple[float, bool]] = []
    objects = 0
    for found, true in pairs:
        mine = [box.astype(float) for box, of in zip(true["boxes"], true["labels"], strict=True) if of == label]
        crowds = [box.astype(float) for box, of in zip(true["crowd"], true["crowd_labels"], strict=True) if of == label]
        objects += len(mine)
        taken: set[int] = set()
        rows = [row for row in zip(found["scores"], found["boxes"], found["labels"], strict=True) if row[2] == label]
        for score, box, _ in sorted(rows, key=lambda row: -row[0])[:100]:
            free = [(overlap(box, other, False), n) for n, other in enumerate(mine) if n not in taken]
            best = max(free, default=(0.0, -1))
            if best[0] >= threshold:
                taken.add(best[1])
                marks.append((score, True))
            elif not any(overlap(box, other, True) >= threshold for other in crowds):
                marks.append((score, False))
    if not objects:
        return math.nan
    marks.sort(key=lambda mark: -mark[0])
    right = np.cumsum([good for _, good in marks]) if marks else np.zeros(0)
    points = [(r / objects, r / (n + 1)) for n, r in enumerate(right)]
    return float(np.mean([max((p for r, p in points if r >= at - 1e-12), default=0.0) for at in np.arange(101) / 100]))


def some_pairs(seed: int, images: int = 12, classes: int = 3) -> list[Any]:
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(images):
        low = rng.integers(0, 100, (6, 2))
        boxes = np.concatenate([low, low + rng.integers(8, 60, (6, 2))], 1).astype(np.float32)
        labels, count = rng.integers(0, classes, 6), int(rng.integers(0, 5))
        noisy = boxes + rng.integers(-4, 5, boxes.shape)
        scores = rng.permutation(1000)[:6] / 1000  # no two alike
        wrong = np.where(rng.random(6) < 0.2, rng.integers(0, classes, 6), labels)
        crowd = slice(5, 6 if rng.random() < 0.4 else 5)
        pairs.append((answer(noisy, wrong, scores), truth(boxes[:count], labels[:count], boxes[crowd], labels[crowd])))
    return pairs


def test_the_figures_are_those_of_the_definition() -> None:
    pairs = some_pairs(0)
    pairs[3] = (answer(), pairs[3][1])  # nothing found
    # Scores of different images alike would make the order a matter of taste
    for index, (found, _) in enumerate(pairs):
        found["scores"] = (found["scores"].astype(np.float64) + index * 1e-5).astype(np.float32)
    report = counted(pairs, 4)
    slow = np.array([[slow_precision(pairs, label, at) for label in range(4)] for at in THRESHOLDS])
    np.testing.assert_allclose(report.curves.mean(1), slow, atol=1e-9)
    np.testing.assert_allclose(report.of_class, slow.mean(0), atol=1e-9)
    assert report.ap == pytest.approx(np.nanmean(slow))
    assert report.ap50 == pytest.approx(np.nanmean(slow[0]))
    assert report.ap75 == pytest.approx(np.nanmean(slow[5]))
    assert 0.1 < report.ap < 0.9
    assert np.isnan(report.of_class[3])


def test_the_order_of_the_images_does_not_matter() -> None:
    pairs = some_pairs(1)
    for found, _ in pairs:
        found["scores"] = found["scores"].round(1)  # many ties
    forwards, backwards = Detections(3), Detections(3)
    for index in range(len(pairs)):
        forwards.add(index, *pairs[index])
        backwards.add(len(pairs) - 1 - index, *pairs[len(pairs) - 1 - index])
    one, other = average_precision(forwards), average_precision(backwards)
    assert one.as_json("abc") == other.as_json("abc")
    np.testing.assert_array_equal(one.curves, other.curves)


def test_nothing_found_is_zero_and_nothing_there_is_null() -> None:
    nothing = counted([(answer(), truth([A], [0]))])
    assert (nothing.ap, nothing.ap50, nothing.ar100, nothing.of_class[0]) == (0, 0, 0, 0)
    assert math.isnan(nothing.ap_small)
    for empty in (counted([]), counted([(answer([A], [0], [0.5]), truth())]), counted([(answer(), truth())])):
        told = json.loads(json.dumps(empty.as_json(["a", "b", "c"]), allow_nan=False))
        assert (told["AP"], told["AP50"], told["AR_large"]) == (None, None, None)
        assert told["classes"][2] == {"name": "c", "AP": None, "AP50": None}
    told = counted([(answer([A], [0], [0.5]), truth([A], [0]))]).as_json(["a", "b", "c"])
    assert list(told)[:6] == ["AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"]
    assert (told["AP"], told["AP_small"], told["objects"], told["found"]) == (1, None, 1, 1)


def test_what_cannot_be_counted_is_refused() -> None:
    detections = Detections(3)
    for broken in (answer([[0, 0, math.nan, 1]], [0], [0.5]), answer([A], [0], [math.inf])):
        with pytest.raises(EvaluationError, match="a box found in image 7 is not finite"):
            detections.add(7, broken, truth())
    for label in (3, -1):
        with pytest.raises(EvaluationError, match="image 7 has a label that is none of 3 classes"):
            detections.add(7, answer([A], [label], [0.5]), truth())
    detections.add(7, answer(), truth())
    with pytest.raises(ValueError, match="index: image 7 was added before"):
        detections.add(7, answer(), truth())


def test_batches_are_counted_in_pixels_of_the_files() -> None:
    evaluation = BoxTransform.for_evaluation([0.5] * 3, [0.5] * 3, short_side=64)
    rng = np.random.default_rng(0)
    true = truth([[10, 20, 60, 90]], [2]) | {"image_id": 5}
    x, y = evaluation.collate([evaluation((Image.new("RGB", (160, 128)), true), rng)], 1)
    batch = Batch(x, y, torch.tensor([9]))
    found = {"boxes": y.targets[0]["boxes"].bfloat16(), "labels": torch.tensor([2]), "scores": torch.tensor([0.5])}
    detections = Detections(3)
    detections.add_batch(batch, [found])
    assert list(detections.images) == [9]
    assert average_precision(detections).ap == 1
    training = BoxTransform([0.5] * 3, [0.5] * 3, crop=0, short_sides=(64,))
    batch.y = training.collate([training((Image.new("RGB", (160, 128)), true), rng)], 1)[1]
    with pytest.raises(ValueError, match=r"batch: has no truths; BoxTransform\.for_evaluation keeps them"):
        Detections(3).add_batch(batch, [found])


PROCESS = """
import sys
import torch.distributed as dist
from test_precision import Detections, average_precision, some_pairs
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
detections = Detections(3)
for index, pair in enumerate(some_pairs(2)):
    if (index < 5) == (rank == 0):
        detections.add(index, *pair)
print(average_precision(detections.gathered()).as_json("abc"))
dist.destroy_process_group()
"""


def test_two_processes_count_what_one_does(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROCESS]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "x")], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent
        )
        for rank in (0, 1)
    ]
    told = [process.communicate(timeout=120)[0].strip() for process in started]
    assert told == [str(counted(some_pairs(2)).as_json("abc"))] * 2


# Pictures


def test_curves_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    names = [f"class {number} $x$ {'long ' * 9}" for number in range(20)]
    report = counted(some_pairs(3, 20, 20), 20)
    missing = counted([], 2)
    for number, (one, classes) in enumerate(((report, names), (missing, ["a", "b"]))):
        file = tmp_path / f"{number}.png"
        draw_precision_recall(one.recalls, one.curves, THRESHOLDS, classes, file, title="AP $x")
        with Image.open(file) as image:
            assert image.width > 1000
            assert len(image.convert("RGB").getcolors(2**20) or []) > 20


def test_boxes_are_drawn_where_they_are(tmp_path: Path) -> None:
    image = Image.new("RGB", (100, 50), (128, 128, 128))
    found = answer([[10, 20, 40, 45], [60, -5, 130, 30]], [0, 1], [0.9, 0.3])
    there = truth([[50, 25, 95, 48]], [1])
    picture = draw_boxes(image, ["ant", "bee"], found, there, least_side=500)
    assert picture.size == (500, 250)
    pixels = np.asarray(picture).astype(int)
    for x, y in ((50, 150), (200, 150), (120, 224), (300, 100)):  # edges of both found boxes
        assert np.ptp(pixels[y, x]) > 50  # a colour
    assert np.ptp(pixels[170, 120]) == np.ptp(pixels[75, 450]) == 0  # inside
    dashed = pixels[237:241, 260:460].reshape(-1, 3)
    assert {(0, 0, 0), (255, 255, 255)} <= set(map(tuple, dashed.tolist()))
    assert (np.asarray(image) == 128).all()  # a copy is drawn on
    alone = draw_boxes(image, ["ant", "bee"], None, {name: torch.from_numpy(there[name]) for name in there})
    assert (np.asarray(alone)[100:140, 200:300] != 128).any()
    nothing = draw_boxes(image, [], answer(), truth(), least_side=1)
    assert (np.asarray(nothing) == 128).all()
    draw_box_sheet([picture] * 5, ["one", "two", "three", "four", "five"], "five", tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as sheet:
        assert sheet.size == (16 + 4 * 400, 84 + 2 * (192 + 38))
