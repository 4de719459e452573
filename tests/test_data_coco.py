"""Images with boxes in COCO's format: what is read, what is left out and named, what is refused; batches by shape."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import re
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_support import Numbers, annotation, coco_document, coco_image, picture, write_coco, write_folder

from mobileformer.data import CocoSource, DataError, FolderSource, ImageError, TrainTransform, open_source
from mobileformer.data.annotations import KEPT, MAX_BYTES, SHOWN, read_annotations
from mobileformer.data.coco import find_coco
from mobileformer.data.loading import _alike, evaluation_batches, training_batches

IMAGES = [coco_image(50), coco_image(9, 20, 40), coco_image(70)]
GOOD = [
    annotation(1, 9, 3, [1, 2, 3, 4.5], area=6),
    annotation(2, 50, 7, [0, 0, 40, 30]),
    annotation(3, 9, 7, [5, 5, 10, 10], iscrowd=1),
    annotation(4, 9, 7, [-3, 35, 10, 10]),  # over two edges
]


def opened(root: Path, split: str = "train") -> CocoSource:
    source = open_source(root, split)  # type: ignore[arg-type]
    assert isinstance(source, CocoSource)
    return source


def test_targets_are_in_pixels_and_labels_in_the_order_of_the_ids(tmp_path: Path) -> None:
    source = opened(write_coco(tmp_path, coco_document(IMAGES, GOOD)))
    assert (len(source), source.channels, source.classes) == (3, 3, ("cat", "dog"))
    assert source.category_ids.tolist() == [3, 7]
    assert source.aspects.tolist() == [40 / 30, 0.5, 40 / 30]
    image, target = source[1]
    assert image.getpixel((0, 0)) == picture(9).getpixel((0, 0))
    assert target["image_id"] == 9
    assert target["boxes"].tolist() == [[1, 2, 4, 6.5], [0, 35, 7, 40]]
    assert (target["labels"].tolist(), target["areas"].tolist()) == ([0, 1], [6, 100])
    assert (target["crowd"].tolist(), target["crowd_labels"].tolist()) == ([[5, 5, 15, 15]], [1])
    assert [target[key].dtype for key in ("boxes", "labels", "crowd")] == [np.float32, np.int64, np.float32]
    empty = source[2][1]  # an image without a box stays
    assert (empty["boxes"].shape, empty["labels"].shape, empty["crowd"].shape) == ((0, 4), (0,), (0, 4))
    assert source[0][1]["boxes"].tolist() == [[0, 0, 40, 30]]
    again = pickle.loads(pickle.dumps(source))
    assert again.target(1)["boxes"].tolist() == target["boxes"].tolist()


@pytest.mark.parametrize(
    ("file", "folder"),
    [
        ("val.json", "val"),
        ("annotations/instances_val2017.json", "val2017"),
        ("annotations/instances_val2017.json", "images/val2017"),
        ("annotations/instances_val.json", "val"),
    ],
)
def test_layouts(tmp_path: Path, file: str, folder: str) -> None:
    write_coco(tmp_path, coco_document(IMAGES, GOOD), file=file, folder=folder)
    assert opened(tmp_path, "val")[0][1]["image_id"] == 50
    with pytest.raises(DataError, match=r"no annotations for test, expected test\.json beside test/, or COCO's"):
        open_source(tmp_path, "test")
    write_coco(tmp_path, coco_document(IMAGES, GOOD), file="annotations/instances_val2014.json")
    with pytest.raises(DataError, match="several annotations for val, keep one"):
        open_source(tmp_path, "val")


def test_images_by_class_stay_what_they_are(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "train.json").write_text(json.dumps(coco_document(IMAGES, GOOD)))
    assert find_coco(tmp_path) is None
    assert isinstance(open_source(tmp_path, "train"), FolderSource)


def test_classification_says_that_boxes_are_no_classes(tmp_path: Path) -> None:
    source = opened(write_coco(tmp_path, coco_document(IMAGES, GOOD)))
    with pytest.raises(DataError, match="the targets of these images are no classes but have boxes, labels"):
        next(evaluation_batches(source, TrainTransform(8, [0.5] * 3, [0.5] * 3), batch_size=2))


def test_the_digest_is_of_names_and_boxes(tmp_path: Path) -> None:
    digests = set()
    for number, (images, boxes) in enumerate([(IMAGES, GOOD), (IMAGES, GOOD[:-1]), (IMAGES[:-1], GOOD)]):
        digests.add(opened(write_coco(tmp_path / str(number), coco_document(images, boxes))).digest())
    assert len(digests) == 3


# What is left out, and named


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (annotation(5, 9, 3, [20, 3, 5, 5]), "annotation 5: bbox: expected a box that is at least partly inside, got "),
        (annotation(5, 9, 3, [-9, 3, 9, 5]), "partly inside, got [-9, 3, 9, 5] in an image of 20 x 40"),
        (annotation(5, 9, 3, [1, 3, -5, 5]), "annotation 5: bbox: expected a width and a height above 0"),
        (annotation(5, 9, 3, [1, 3, 5, 0]), "annotation 5: bbox: expected a width and a height above 0"),
        (annotation(5, 9, 3, [1, float("nan"), 5, 5]), "annotation 5: bbox: expected four finite numbers, got [1, nan"),
        (annotation(5, 9, 3, [1, 3, float("inf"), 5]), "annotation 5: bbox: expected four finite numbers"),
        (annotation(5, 9, 3, [1, 3, 10**400, 5]), "annotation 5: bbox: expected four finite numbers"),
        (annotation(5, 9, 3, [1, 3, "5", 5]), "annotation 5: bbox: expected four finite numbers"),
        (annotation(5, 9, 3, [1, 3, True, 5]), "annotation 5: bbox: expected four finite numbers"),
        (annotation(5, 9, 3, [1, 3, 5]), "annotation 5: bbox: expected four finite numbers"),
        (annotation(5, 9, 3, None), "annotation 5: bbox: expected four finite numbers, got None"),
        (annotation(5, 9, 3, [1, 3, 1e-9, 5]), "annotation 5: bbox: expected a box that is at least partly inside"),
        (annotation(5, 9, 4, [1, 3, 5, 5]), "annotation 5: unknown category 4"),
        (annotation(5, 9, [], [1, 3, 5, 5]), "annotation 5: unknown category []"),
        (annotation(5, 10, 3, [1, 3, 5, 5]), "annotation 5: unknown image 10"),
        (annotation(5, {}, 3, [1, 3, 5, 5]), "annotation 5: unknown image an object"),  # type: ignore[arg-type]
        (annotation(5, 9, 3, [1, 3, 5, 5], iscrowd="no"), "annotation 5: iscrowd: expected 0 or 1, got 'no'"),
        (annotation("x" * 999, 9, 4, [1, 3, 5, 5]), "annotation 4 of the list: unknown category 4"),  # type: ignore[arg-type]
        ([1, 2], "annotation 4 of the list: expected an object, got list [1, 2]"),
        (None, "annotation 4 of the list: expected an object, got none"),
    ],
)
def test_a_broken_annotation_is_named_and_left_out(tmp_path: Path, entry: Any, message: str) -> None:
    write_coco(tmp_path, coco_document(IMAGES, [*GOOD, entry]))
    with pytest.warns(UserWarning, match=re.escape(message)):
        source = opened(tmp_path)
    assert source.problems.count == 1
    assert str(source.problems).startswith(f"{tmp_path / 'train.json'}: 1 broken entries are left out: ")
    assert sum(len(source.target(index)["boxes"]) for index in range(3)) == 3


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (coco_image(4, file_name="../4.png"), "image 4: expected the name of a file inside the folder, got '../4.png'"),
        (coco_image(4, file_name="/etc/passwd"), "image 4: expected the name of a file inside the folder"),
        (coco_image(4, file_name="a\0b"), "image 4: expected the name of a file inside the folder"),
        (coco_image(4, file_name="\ud800.png"), "image 4: expected the name of a file inside the folder"),
        (coco_image(4, file_name="x" * 2000), "image 4: expected the name of a file inside the folder"),
        (coco_image(4, file_name=None), "image 4: expected the name of a file inside the folder, got None"),
        (coco_image(4, 0), "image 4: expected a width and a height of 1 to 1048576 pixels, got 0 x 30"),
        (coco_image(4, 10**9), "image 4: expected a width and a height of 1 to 1048576 pixels"),
        (coco_image(4, height=None), "image 4: expected a width and a height"),  # type: ignore[arg-type]
        (coco_image(4, 2.5), "image 4: expected a width and a height"),  # type: ignore[arg-type]
        (coco_image("4"), "image 3 of the list: expected an object with an integer as id"),  # type: ignore[arg-type]
        ("4.png", "image 3 of the list: expected an object with an integer as id"),
    ],
)
def test_a_broken_image_is_named_and_left_out_with_its_boxes(tmp_path: Path, image: Any, message: str) -> None:
    write_coco(tmp_path, coco_document(IMAGES, []))
    (tmp_path / "train.json").write_text(
        json.dumps(coco_document([*IMAGES, image], [*GOOD, annotation(5, 4, 3, [1, 1, 2, 2])]))
    )
    with pytest.warns(UserWarning, match=re.escape(message)) as told:
        source = opened(tmp_path)
    assert (len(source), source.problems.count) == (3, 2)
    assert re.search("annotation 5: (unusable|unknown) image 4", str(told[0].message))


def test_of_many_broken_entries_a_few_are_told(tmp_path: Path) -> None:
    broken = [annotation(number, 9, 4, [1, 1, 2, 2]) for number in range(10, 310)]
    write_coco(tmp_path, coco_document(IMAGES, [*GOOD, *broken]))
    with pytest.warns(UserWarning, match=r": 300 broken entries are left out: .*; and 295 more$") as told:
        source = opened(tmp_path)
    assert str(told[0].message).count("unknown category") == SHOWN
    assert len(source.problems.messages) == KEPT


# What is refused


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"not a JSON object, which begins with \{"),
        ("[1]", r"not a JSON object, which begins with \{"),
        ('{"images": [', "not JSON: Expecting value"),
        ('{"images": ' + "[" * 200_000, "nested too deeply"),
        ('{"images": ' + '{"a":' * 200_000, "nested too deeply"),
        ('{"images": ' + "9" * 5000 + "}", "not JSON: Exceeds the limit"),
        ("{}", "expected an object with images, annotations and categories, got an object"),
        ('{"images": [], "annotations": []}', "expected a list 'categories', as COCO's files have it, got none"),
        (coco_document(IMAGES, GOOD) | {"annotations": {"a": 1}}, "expected a list 'annotations'.*, got an object"),
        (
            coco_document([*IMAGES, coco_image(9, file_name="b.png")], GOOD),
            r"two images of the id 9: 9\.png and 'b\.png'",
        ),
        (coco_document([], GOOD), "no image in it$"),
        (coco_document([coco_image(4, 0)], []), "no image in it that can be used: image 4: expected a width"),
        (
            coco_document(IMAGES, [annotation(5, 1, 1, [])]),
            "not one of 1 annotations can be used: annotation 5: unknown",
        ),
        (coco_document(IMAGES, GOOD, categories=[]), "no category in it"),
        (coco_document(IMAGES, GOOD, categories=[{"id": 1}]), "category 0 of the list: expected an object with an int"),
        (
            coco_document(IMAGES, GOOD, categories=[{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]),
            "category 1 of the list: the id 1 has another one already, 'a'",
        ),
        (
            coco_document(IMAGES, GOOD, categories=[{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]),
            "category 1 of the list: a second one of the name 'a'",
        ),
    ],
    ids=itertools.count(),  # a text of 200 000 letters is no name of a test
)
def test_a_file_that_cannot_be_meant_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    write_coco(tmp_path, coco_document(IMAGES, GOOD))
    (tmp_path / "train.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(DataError, match=re.escape(str(tmp_path / "train.json")) + ": .*" + message):
        opened(tmp_path)


def test_no_file_is_read_that_is_too_large_or_none(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    with pytest.raises(DataError, match=r"x\.json: no such file"):
        read_annotations(file)
    for size, message in ((MAX_BYTES + 1, f"{MAX_BYTES + 1} bytes, more than"), (MAX_BYTES, "not a JSON object")):
        with file.open("wb") as sparse:
            sparse.truncate(size)
        tracemalloc.start()
        with pytest.raises(DataError, match=message):
            read_annotations(file)
        assert tracemalloc.get_traced_memory()[1] < 2**20
        tracemalloc.stop()
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(DataError, match="expected a regular file, got a FIFO"):
        read_annotations(file)


def test_outlines_are_dropped_while_they_are_read(tmp_path: Path) -> None:
    outline = np.random.default_rng(0).random(2000).round(2).tolist()
    boxes = [annotation(number, 9, 3, [1, 1, 2, 2], segmentation=[outline]) for number in range(1, 500)]
    write_coco(tmp_path, coco_document(IMAGES, boxes))
    size = (tmp_path / "train.json").stat().st_size
    tracemalloc.start()
    found = read_annotations(tmp_path / "train.json")
    left, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found.boxes) == 499
    assert most < 3 * size  # bytes and text; all numbers at once would be five times as much again
    assert left < 60 * 499 + 20_000


# Images that are not what they should be


def test_images_are_looked_for(tmp_path: Path) -> None:
    write_coco(tmp_path, coco_document(IMAGES, GOOD))
    (tmp_path / "train" / "9.png").unlink()
    picture(1, size=(30, 40)).save(tmp_path / "train" / "70.png")
    source = opened(tmp_path)
    assert source[0][0].size == (40, 30)
    with pytest.raises(ImageError, match=r"9\.png: no such file"):
        source[1]
    with pytest.raises(ImageError, match=r"70\.png: 30 x 40 pixels, the annotations say 40 x 30, and they are of the"):
        source[2]
    for name in ("50.png", "70.png"):
        (tmp_path / "train" / name).unlink()
    with pytest.raises(DataError, match=r"50\.png: no such file, nor others of .*train\.json"):
        opened(tmp_path)
    (tmp_path / "train").rmdir()
    with pytest.raises(DataError, match="train: no such folder, expected the images of"):
        opened(tmp_path)


def test_a_good_file_warns_of_nothing(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not opened(write_coco(tmp_path, coco_document(IMAGES, GOOD))).problems.count


# Batches of images of like shape


class Shaped(Numbers):
    def __init__(self, aspects: np.ndarray) -> None:
        super().__init__(len(aspects))
        self.aspects = aspects


def indices(source: Any, *, seed: int = 0, epoch: int = 0, slots: int = 2, **more: Any) -> list[list[int]]:
    transform = TrainTransform(4, [0.5], [0.5])
    batches = training_batches(source, transform, batch_size=4, slots=slots, epoch=epoch, seed=seed, **more)
    return [batch.index.tolist() for batch in batches]


def test_images_of_like_shape_fill_a_batch() -> None:
    aspects = np.random.default_rng(1).choice([0.5, 0.99, 1.0, 2.0], 203)
    source = Shaped(aspects)
    batches = indices(source)
    assert [len(batch) for batch in batches] == [4] * 50  # as many as without
    mixed = [number for number, batch in enumerate(batches) if len(set(aspects[batch] < 1)) > 1]
    assert mixed in ([], [49])
    everything = [index for batch in batches for index in batch]
    assert len(set(everything)) == 200
    first = [bool(aspects[batch[0]] < 1) for batch in batches]
    assert 0 < sum(first[:25]) < 25  # both kinds come all along
    assert indices(source) == batches
    assert batches != indices(source, seed=1)
    assert batches != indices(source, epoch=1)
    # Any share of processes, and a restart, give the same
    shares = [indices(source, rank=rank, world=2) for rank in (0, 1)]
    assert [batch for pair in zip(*shares, strict=True) for batch in pair] == batches
    assert indices(source, start=7) == batches[14:]


def test_images_of_one_shape_come_as_without() -> None:
    for aspect in (0.5, 2.0):
        assert indices(Shaped(np.full(30, aspect))) == indices(Numbers(30))


def test_a_rare_shape_shares_the_last_batch() -> None:
    aspects = np.full(16, 2.0)
    aspects[[3, 5]] = 0.5
    batches = indices(Shaped(aspects), slots=1)
    assert len(batches) == 4
    assert {3, 5} <= set(batches[-1])


def test_what_is_left_of_both_shapes_stays_in_order() -> None:
    upright = np.isin(np.arange(7), (0, 3))
    order = np.array([4, 0, 2, 1, 3, 5, 6])
    assert _alike(order, upright, 3).tolist() == [4, 2, 1, 0, 3, 5, 6]
    assert _alike(order, upright, 2).tolist() == [4, 2, 0, 3, 1, 5, 6]
