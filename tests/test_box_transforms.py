"""Augmentation of images with boxes: the boxes stay around what they are of; padded batches; any number of workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_support import annotation, coco_document, coco_image, write_coco
from PIL import Image

from mobileformer.data import open_source
from mobileformer.data.box_transforms import BoxedImages, BoxTransform, fitted_size
from mobileformer.data.loading import evaluation_batches, training_batches

MEAN, STD = (0.5, 0.25, 0.5), (0.25, 0.5, 1.0)
OBJECTS = ((0, (40, 60, 160, 200)), (1, (300, 20, 420, 90)), (2, (250, 180, 330, 290)))  # channel and box


def scene() -> tuple[Image.Image, dict[str, Any]]:
    """Each object is a rectangle in a channel of its own, so that the pixels say where it went."""
    pixels = np.zeros((320, 480, 3), np.uint8)
    for channel, (x1, y1, x2, y2) in OBJECTS:
        pixels[y1:y2, x1:x2, channel] = 255
    boxes = np.array([box for _, box in OBJECTS], np.float32)
    target = {"boxes": boxes, "labels": np.arange(3), "image_id": 11}
    return Image.fromarray(pixels), target


def grey(pixels: np.ndarray) -> np.ndarray:
    """Back from normalised (3, H, W) to 0 .. 1."""
    return pixels * np.array(STD)[:, None, None] + np.array(MEAN)[:, None, None]


def seen(channel: np.ndarray) -> list[int]:
    """Corners of what is bright."""
    rows, columns = (np.flatnonzero((channel > 0.5).any(axis)) for axis in (1, 0))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


@pytest.mark.parametrize(
    "settings",
    [
        {"flip": 1.0, "crop": 0.0, "short_sides": ()},
        {"flip": 0.0, "crop": 0.0, "short_sides": (200, 333), "longest": 400},
        {"flip": 0.0, "crop": 1.0, "short_sides": (), "crop_short_sides": (), "crop_sides": (90, 300)},
        {"crop": 0.7, "short_sides": (160, 256), "longest": 400, "crop_short_sides": (256,), "crop_sides": (64, 300)},
    ],
)
def test_boxes_stay_around_their_objects(settings: dict[str, Any]) -> None:
    transform = BoxTransform(MEAN, STD, **settings)
    lost, kept = 0, 0
    for seed in range(25):
        one = transform(scene(), np.random.default_rng(seed))
        assert one.pixels.dtype == one.boxes.dtype == np.float32
        bright = grey(one.pixels)
        labels = one.labels.tolist()
        for label in range(3):
            if label not in labels:
                lost += 1
                assert bright[label].max() < 0.6  # a sliver at the edge at most
                continue
            kept += 1
            box = one.boxes[labels.index(label)]
            if (box[2:] - box[:2] > 3).all():
                np.testing.assert_allclose(box, seen(bright[label]), atol=1.01)
        height, width = one.pixels.shape[1:]
        assert (one.boxes >= 0).all()
        assert (one.boxes <= [width, height, width, height]).all()
    assert kept
    assert bool(lost) == (settings["crop"] > 0)


def test_the_defaults_are_those_of_the_paper() -> None:
    transform = BoxTransform(MEAN, STD)
    sizes = [transform(scene(), np.random.default_rng(seed)).pixels.shape[1:] for seed in range(30)]
    assert {min(size) for size in sizes} <= set(range(480, 801, 32))
    assert len({min(size) for size in sizes}) > 6
    assert max(map(max, sizes)) <= 1333
    whole = [size for size in sizes if abs(size[1] / size[0] - 1.5) < 0.01]
    assert 5 < len(whole) < 25  # the others are cropped


@pytest.mark.parametrize(
    ("width", "height", "short", "longest", "expected"),
    [
        (640, 480, 800, 1333, (1066, 800)),
        (480, 640, 800, 1333, (800, 1066)),
        (1000, 300, 800, 1333, (1333, 400)),
        (500, 500, 800, 1333, (800, 800)),
        (1, 100_000, 800, 1333, (1, 1333)),
    ],
)
def test_sizes(width: int, height: int, short: int, longest: int, expected: tuple[int, int]) -> None:
    assert fitted_size(width, height, short, longest) == expected


def test_a_strip_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.new("RGB", (2, 30_000))
    target = {"boxes": np.zeros((0, 4), np.float32), "labels": np.zeros(0, np.int64), "image_id": 1}
    transform = BoxTransform(MEAN, STD, crop=1.0)
    sides: list[int] = []
    resize = Image.Image.resize

    def watched(self: Image.Image, size: tuple[int, int], *rest: Any) -> Image.Image:
        sides.extend(size)
        return resize(self, size, *rest)

    monkeypatch.setattr(Image.Image, "resize", watched)
    assert max(transform((image, target), np.random.default_rng(0)).pixels.shape) <= 1333
    assert max(sides) == 8192


def test_all_that_is_random_comes_from_the_generator() -> None:
    transform = BoxTransform(
        MEAN, STD, flip=1.0, short_sides=(100, 120, 140), crop_sides=(50, 90), crop_short_sides=(100,)
    )
    one, same, other = (transform(scene(), np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.pixels, same.pixels)
    np.testing.assert_array_equal(one.boxes, same.boxes)
    assert one.pixels.shape != other.pixels.shape or (one.pixels != other.pixels).any()
    sample = scene()
    transform(sample, np.random.default_rng(1))
    assert sample[1]["boxes"].tolist() == [list(box) for _, box in OBJECTS]  # the source's own are left alone


class NoGenerator:
    def __getattr__(self, name: str) -> Any:
        raise AssertionError("an evaluation draws nothing")


def test_an_evaluation_draws_nothing_and_finds_its_way_back() -> None:
    transform = BoxTransform.for_evaluation(MEAN, STD, short_side=128, longest=160)
    one = transform(scene(), NoGenerator())  # type: ignore[arg-type]
    assert one.pixels.shape == (3, 107, 160)
    own = BoxTransform.for_evaluation(MEAN, STD, short_side=None)(scene(), NoGenerator())  # type: ignore[arg-type]
    assert own.pixels.shape == (3, 320, 480)
    x, y = transform.collate([own, one], 2)
    assert y.truths[1]["boxes"].tolist() == [list(box) for _, box in OBJECTS]
    for index in (0, 1):
        back = y.in_original(y.targets[index]["boxes"], index)
        torch.testing.assert_close(back, torch.tensor(y.truths[index]["boxes"]))
    assert x.shape == (2, 3, 320, 480)


def test_batches_are_padded_with_zeros_at_the_right_and_the_bottom() -> None:
    transform = BoxTransform(MEAN, STD, flip=0, crop=0, short_sides=())
    samples = []
    for width, height in ((33, 20), (10, 65)):
        target = {"boxes": np.array([[1, 2, 3, 4]], np.float32), "labels": np.array([5]), "image_id": width}
        image = Image.new("RGB", (width, height), (255, 0, 255))
        samples.append(transform((image, target), np.random.default_rng(0)))
    x, y = transform.collate(iter(samples), 4)
    assert isinstance(y, BoxedImages)
    assert (x.shape, x.dtype, len(y)) == ((2, 3, 96, 64), torch.float32, 2)
    assert y.sizes.tolist() == y.original_sizes.tolist() == [[20, 33], [65, 10]]
    assert (y.image_ids.tolist(), y.truths) == ([33, 10], [])
    for image, (height, width) in zip(x, y.sizes.tolist(), strict=True):
        assert image[:, :height, :width].flatten(1).unique(dim=1).flatten().tolist() == [2.0, -0.5, 0.5]
        assert image[:, height:].count_nonzero() == image[:, :, width:].count_nonzero() == 0
    target = y.to("cpu").targets[1]
    assert (target["boxes"].dtype, target["labels"].dtype) == (torch.float32, torch.int64)
    assert target["labels"].tolist() == [5]
    x, y = transform.collate(iter([]), 4)
    assert (x.shape, y.sizes.shape, len(y), y.image_ids.shape) == ((0, 3, 32, 32), (0, 2), 0, (0,))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"flip": 1.5}, "flip: expected a probability, got 1.5"),
        ({"crop": -1}, "crop: expected a probability, got -1"),
        ({"short_sides": (0,)}, r"short_sides: expected 1 to 8192 pixels, got \(0,\)"),
        ({"crop_short_sides": (9000,)}, "crop_short_sides: expected 1 to 8192 pixels"),
        ({"longest": 0}, "longest: expected 1 to 8192 pixels, got 0"),
        ({"crop_sides": (5, 4)}, r"crop_sides: expected 1 <= least <= most, got \(5, 4\)"),
        ({"std": (1, 0, 1)}, "mean and std: expected finite numbers, std above 0"),
        ({"mean": (1,)}, "mean and std: expected 1 or 3 numbers each, got 1 and 3"),
    ],
)
def test_values_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BoxTransform(**({"mean": MEAN, "std": STD} | settings))


def test_the_mode_has_to_fit() -> None:
    _, target = scene()
    with pytest.raises(ValueError, match="image: mode 'L' does not fit 3 means, expected 'RGB'"):
        BoxTransform(MEAN, STD)((Image.new("L", (9, 9)), target), np.random.default_rng(0))


def test_any_number_of_workers_gives_the_same(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    images = [coco_image(number, *rng.integers(20, 60, 2).tolist()) for number in range(1, 15)]
    boxes = [annotation(number, int(rng.integers(1, 15)), 3, [2, 3, 12.5, 9]) for number in range(1, 40)]
    source = open_source(write_coco(tmp_path, coco_document(images, boxes)), "train")
    transform = BoxTransform(MEAN, STD, short_sides=(24, 32), crop_short_sides=(32,), crop_sides=(16, 28))
    evaluation = BoxTransform.for_evaluation(MEAN, STD, short_side=32)

    def batches(workers: int) -> list[tuple[Any, ...]]:
        found = [
            *training_batches(source, transform, batch_size=3, slots=2, epoch=1, seed=4, workers=workers),
            *evaluation_batches(source, evaluation, batch_size=4, workers=workers),
        ]
        told = []
        for batch in found:
            y = batch.y
            targets = [(one["boxes"].tolist(), one["labels"].tolist()) for one in y.targets]
            truths = [one["boxes"].tolist() for one in y.truths]
            told.append((batch.index.tolist(), batch.x.numpy().tobytes(), y.sizes.tolist(), targets, truths))
        return told

    alone = batches(0)
    assert len(alone) == 4 + 4
    aspects = source.aspects  # type: ignore[union-attr]
    assert sum(len(set(aspects[index] < 1)) > 1 for index, *_ in alone[:4]) <= 1
    assert batches(1) == alone
    assert batches(2) == alone
