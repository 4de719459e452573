"""`DetectionPredictor`: what it finds is what the detector says of the image, in pixels of the file, in order."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detector_files import NAMES, SIZE, save_end_to_end, save_images, save_retinanet, small_variant
from PIL import Image

from mobileformer import WeightsError
from mobileformer.config import IMAGENET_MEAN, IMAGENET_STD
from mobileformer.data import sample_photo
from mobileformer.prediction import DetectionPredictor, Found
from mobileformer.prediction.found import found_in
from mobileformer.weights.detectors import load_detector

# Small models in a shared machine: waiting for a second thread costs more than it gives.
torch.set_num_threads(1)

# Without the compiled library the network runs on the reference and says so; the numbers are the same.
pytestmark = pytest.mark.filterwarnings("ignore::mf_kernels.KernelFallbackWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("detectors")
    with small_variant():
        save_retinanet(folder / "retinanet.safetensors")
        save_end_to_end(folder / "end-to-end.safetensors")
        save_images(folder / "images")
        yield folder


@pytest.fixture(scope="module")
def predictor(folder: Path) -> DetectionPredictor:
    return DetectionPredictor(folder / "retinanet.safetensors", threads=1)


def same(one: Found, other: Found) -> None:
    """But for rounding, after which boxes of nearly the same score may have changed places."""
    assert (one.name, one.width, one.height, one.error) == (other.name, other.width, other.height, other.error)
    assert len(one.boxes) == len(other.boxes)
    rows, others = (sorted((found.index, *found.box, found.score) for found in each.boxes) for each in (one, other))
    np.testing.assert_allclose(np.array(rows), np.array(others), atol=2e-3)


@pytest.mark.parametrize("kind", ["retinanet", "end-to-end"])
def test_boxes_are_those_of_the_plain_detector_in_pixels_of_the_file(folder: Path, kind: str) -> None:
    weights = folder / f"{kind}.safetensors"
    predictor = DetectionPredictor(weights, threshold=0.3, threads=1)
    (found,) = predictor(sample_photo())
    assert (found.name, found.width, found.height, found.image) == (str(sample_photo()), 451, 300, None)
    # By hand: short side 64, long side 451 * 64 / 300 rounded down; plain layers in float64
    small = Image.open(sample_photo()).convert("RGB").resize((96, SIZE), Image.Resampling.BILINEAR)
    x = (np.asarray(small) / 255 - IMAGENET_MEAN) / IMAGENET_STD
    model = load_detector(weights, use_fused=False).double()
    with torch.no_grad():
        (answer,) = model([torch.from_numpy(x).permute(2, 0, 1).double()])
    chosen = answer["scores"] >= 0.3
    assert 0 < chosen.sum() == len(found.boxes)
    boxes = answer["boxes"][chosen] * torch.tensor([451 / 96, 300 / 64] * 2)
    truth = {"boxes": boxes, "scores": answer["scores"][chosen], "labels": answer["labels"][chosen]}
    same(found, found_in(found.name, None, (451, 300), truth))
    assert {box.label for box in found.boxes} <= set(NAMES)
    assert all(box.label == NAMES[box.index] for box in found.boxes)
    scores = [box.score for box in found.boxes]
    assert scores == sorted(scores, reverse=True)
    assert list(found.row()) == ["path", "width", "height", "boxes"]
    assert list(found.row()["boxes"][0]) == ["label", "class", "score", "box"]


def test_neither_workers_nor_batches_change_an_answer(folder: Path, predictor: DetectionPredictor) -> None:
    images = [folder / "images" / "a.png", "missing.png", folder / "images" / "c.png", folder / "images" / "a.png"]
    images += [folder / "images" / "b.jpg", sample_photo()]
    expected = [next(predictor(image)) for image in images]
    assert [found.error is None for found in expected] == [True, False, True, True, True, True]
    assert expected[1].row() == {"path": "missing.png", "error": "missing.png: no such file"}
    other = DetectionPredictor(folder / "retinanet.safetensors", batch=3, workers=2)
    for one, two in zip(other(images), expected, strict=True):
        same(one, two)
    listed = list(predictor.files([folder / "images", "*.none"]))
    assert [Path(found.name).name for found in listed] == ["a.png", "b.jpg", "c.png", "*.none"]
    assert "no file matches" in str(listed[-1].error)


def test_images_are_seen_upright_and_on_white(tmp_path: Path, folder: Path, predictor: DetectionPredictor) -> None:
    upright = Image.open(folder / "images" / "c.png").convert("RGB").crop((0, 0, 90, 70))
    exif = Image.Exif()
    exif[0x0112] = 6  # a viewer turns it by 90 degrees
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    clear = upright.convert("RGBA")
    clear.paste((0, 0, 0, 0), (0, 0, 45, 70))
    white = upright.copy()
    white.paste((255, 255, 255), (0, 0, 45, 70))
    for given, meant in ((tmp_path / "turned.png", upright), (clear, white), (upright.convert("L"), None)):
        (one,) = predictor(given)
        (other,) = predictor(upright.convert("L").convert("RGB") if meant is None else meant)
        assert one.boxes == other.boxes
        assert (one.width, one.height) == (90, 70)
    save_retinanet(tmp_path / "grey.safetensors", in_chans=1)
    grey = DetectionPredictor(tmp_path / "grey.safetensors", threads=1, keep_images=True)
    (one,), (other,) = grey(upright), grey(upright.convert("L"))
    assert one.boxes == other.boxes != ()
    assert one.image is not None
    assert (one.image.mode, one.image.size) == ("L", (90, 70))


def test_an_image_that_nothing_is_told_of_does_not_stop_the_others(
    predictor: DetectionPredictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo = Image.open(sample_photo())
    images = [photo, Image.new("RGB", (2000, 20)), Image.new("RGB", (64, 64), "red"), photo]
    real = predictor.find

    def find(x: torch.Tensor, sizes: torch.Tensor) -> Any:
        if [SIZE, SIZE] in sizes.tolist():
            raise ValueError("scores are not finite")
        return real(x, sizes)

    monkeypatch.setattr(predictor, "find", find)
    first, narrow, broken, last = predictor(images)
    assert narrow.error == "image 1: 2000 x 20 pixels become 1300 x 13 for the network, which takes no side below 32"
    assert broken.error == "image 2: scores are not finite"
    assert first.boxes
    assert last.boxes
    nan = {"boxes": np.zeros((1, 4)), "labels": np.zeros(1, int), "scores": np.array([np.nan])}
    assert found_in("x", None, (9, 9), nan).error == "x: the network's answer is not finite, so there is no box to tell"


def test_it_reads_no_further_ahead_than_it_says(folder: Path) -> None:
    predictor = DetectionPredictor(folder / "retinanet.safetensors", threads=1, workers=2, batch=2)
    given = 0

    def endless() -> Iterator[Image.Image]:
        nonlocal given
        while True:
            given += 1
            yield Image.new("RGB", (64, 64))

    answers = predictor(endless())
    for count, _ in enumerate(itertools.islice(answers, 5), 1):
        assert given <= count + 2 * 2 + 2 * 2
    answers.close()  # type: ignore[attr-defined]


def test_sizes(folder: Path) -> None:
    """The long side is bounded as in COCO's evaluation, and for a larger short side in proportion."""
    weights = folder / "retinanet.safetensors"
    image = Image.new("RGB", (900, 450))
    for size, expected in ((None, (64, 128)), (96, (96, 192)), (800, (666, 1332)), (1600, (1333, 2666))):
        _, sample = DetectionPredictor(weights, size=size).prepare(image)
        assert sample.pixels.shape[1:] == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"threshold": 1.5}, r"threshold: expected a number in \[0, 1\], got 1.5"),
        ({"threshold": float("nan")}, "threshold"),
        ({"batch": 0}, "batch: expected at least 1, got 0"),
        ({"workers": -1}, "workers: expected at least 0, got -1"),
        ({"size": 16}, "size: expected at least 32, got 16"),
        ({"threads": 0}, "threads"),
        ({"labels": ["a"]}, "labels: expected 3 names, one for each class, got 1"),
    ],
)
def test_arguments_out_of_range(folder: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DetectionPredictor(folder / "retinanet.safetensors", **options)


def test_weights_that_are_no_detector(tmp_path: Path) -> None:
    from mobileformer.pretrained import shipped_weights

    with pytest.raises(WeightsError, match="task 'classification', expected 'detection'"):
        DetectionPredictor(shipped_weights())
    save_retinanet(tmp_path / "nameless.safetensors", names=None)
    predictor = DetectionPredictor(tmp_path / "nameless.safetensors", threads=1)
    assert predictor.names == ["class 0", "class 1", "class 2"]
    (found,) = predictor(sample_photo())
    assert {box.label for box in found.boxes} == {None}
