"""The commands with a detector: detect, evaluate, visualize, info and the demo's sheet."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_support import refusal, run, run_json
from detector_files import NAMES, save_boxed, save_end_to_end, save_images, save_retinanet, small_variant
from PIL import Image

from mobileformer import pretrained, read_metadata
from mobileformer.cli import answers, demo
from mobileformer.prediction import DetectionPredictor

# Without the compiled library the commands run on the reference and say so; the rest is the same.
pytestmark = pytest.mark.filterwarnings("ignore::mf_kernels.KernelFallbackWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("detect")
    with small_variant():
        save_retinanet(folder / "retinanet.safetensors")
        save_end_to_end(folder / "queries.safetensors")
        save_images(folder / "images")
        (folder / "images" / "bad.png").write_bytes(b"no image")
        yield folder


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def options(folder: Path) -> tuple[object, ...]:
    return folder / "images", "--weights", folder / "retinanet.safetensors", "--threads", 1


# detect


def test_every_form_gives_the_same_answers(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = run_json("detect", *options(folder), "--threshold", 0.4, code=1)
    expected = list(DetectionPredictor(folder / "retinanet.safetensors", threshold=0.4).files([folder / "images"]))
    assert document["results"] == [
        {**found.row(), "picture": None} if found.error is None else found.row() for found in expected
    ]
    told = {key: document[key] for key in ("detector", "variant", "device", "size", "threshold", "failed")}
    assert told == {
        "detector": "retinanet", "variant": "small", "device": "cpu", "size": 64, "threshold": 0.4, "failed": 1,
    }  # fmt: skip
    streamed = run("detect", *options(folder), "--threshold", 0.4, "--jsonl", code=1)
    assert [json.loads(line) for line in streamed.stdout.splitlines()] == document["results"]
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(answers, "_TABLE", 2)
    table = run("detect", *options(folder), "--threshold", 0.4, code=1)
    assert table.stdout.count("left top right bottom") == 2
    assert all(name in table.stdout for name in ("a.png", "b.jpg", "c.png"))
    assert "bad.png: not an image in a known format" in table.stderr
    assert "detections: 3 pictures written" in table.stderr
    assert "1 of 4 failed" in table.stderr
    assert sorted(path.name for path in (tmp_path / "detections").iterdir()) == [
        "a-boxes.png",
        "b-boxes.png",
        "c-boxes.png",
    ]


def test_pictures_show_the_boxes_and_nothing_is_overwritten(folder: Path, tmp_path: Path) -> None:
    image, out = folder / "images" / "a.png", tmp_path / "out"
    more = ("--weights", folder / "retinanet.safetensors", "--out", out)
    (row,) = run_json("detect", image, *more)["results"]
    assert row["picture"] == str(out / "a-boxes.png")
    with Image.open(image) as photo, Image.open(row["picture"]) as picture:
        assert picture.size == (512, round(300 * 512 / 451))
        enlarged = photo.convert("RGB").resize(picture.size, Image.Resampling.BICUBIC)
        apart = np.abs(np.asarray(picture).astype(int) - np.asarray(enlarged)).max(2)
    assert 0.01 < (apart > 30).mean() < 0.9
    first = Path(row["picture"]).read_bytes()
    again = run_json("detect", image, image, *more, "--threshold", 1)["results"]
    assert [row["picture"] for row in again] == [str(out / f"a-boxes-{number}.png") for number in (2, 3)]
    assert [row["boxes"] for row in again] == [[], []]
    assert Path(row["picture"]).read_bytes() == first
    assert "nothing" in run("detect", image, *more, "--threshold", 1).stdout
    (out / "file").touch()
    for target, words in ((out / "file", "expected a folder"), (out / "no" / "where", "does not exist")):
        assert words in run_json("detect", image, *more[:2], "--out", target, code=1)["error"]


def test_a_stop_leaves_a_whole_document(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = DetectionPredictor._load

    def stop(self: DetectionPredictor, picture: Any) -> Any:
        if picture.name.endswith("c.png"):
            raise KeyboardInterrupt
        return load(self, picture)

    monkeypatch.setattr(DetectionPredictor, "_load", stop)
    document = run_json("detect", *options(folder), "--batch", 1, code=130)
    assert [Path(row["path"]).name for row in document["results"]] == ["a.png", "b.jpg", "bad.png"]
    assert (document["failed"], document["error"]) == (1, "interrupted")


def test_names_can_be_given(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("one\ntwo\nthree\n")
    more = ("--weights", folder / "retinanet.safetensors", "--labels", tmp_path / "names.txt")
    (row,) = run_json("detect", folder / "images" / "a.png", *more)["results"]
    assert row["boxes"]
    assert all(box["label"] == ("one", "two", "three")[box["class"]] for box in row["boxes"])


def test_without_weights_those_of_the_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = folder / "images" / "a.png"
    monkeypatch.setitem(pretrained._WEIGHTS, "detection", "not-there.safetensors")
    for command in (("detect", image), ("evaluate", folder, "--task", "detection")):
        told = run(*command, code=1).stderr.splitlines()
        assert told == ["error: --weights: expected a file for the task detection: not-there.safetensors: not in this "
                        "package"]  # fmt: skip
    monkeypatch.setitem(pretrained._WEIGHTS, "detection", str(folder / "retinanet.safetensors"))
    result = run("detect", image, "--json")
    assert "without --weights: the RetinaNet-26m in the package" in result.stderr
    assert json.loads(result.stdout)["weights"] == str(folder / "retinanet.safetensors")


# evaluate


@pytest.fixture
def perfect(monkeypatch: pytest.MonkeyPatch) -> None:
    """The detector finds what `save_boxed` puts there, in the order of `NAMES`, and misses the last box of all."""
    numbers = itertools.count()

    def find(self: DetectionPredictor, x: torch.Tensor, sizes: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        found = []
        for (height, width), number in zip(sizes.tolist(), numbers, strict=False):
            assert min(height, width) == 64
            boxes = torch.tensor([[5.0, 10, 20, 40], [25, 10, 40, 40]]) + torch.tensor([0, 7, 0, 7]) * number
            count = 1 if number == 2 else 2
            found.append({"boxes": boxes[:count], "labels": torch.arange(2)[:count], "scores": torch.ones(count)})
        return found

    monkeypatch.setattr(DetectionPredictor, "find", find)


def evaluated(folder: Path, data: Path, *more: object, **options: Any) -> Any:
    return run_json("evaluate", data, "--weights", folder / "retinanet.safetensors", *more, **options)


@pytest.mark.usefixtures("perfect")
@pytest.mark.parametrize("order", [tuple(NAMES), (NAMES[0], NAMES[1], "unknown, and nowhere"), ("x",)])
def test_the_figures_of_a_split(folder: Path, tmp_path: Path, order: tuple[str, ...]) -> None:
    if order == ("x",):
        data = save_boxed(tmp_path / "data", ("zebra", "x"))
        assert "'zebra' is a class of the data and none of the weights" in evaluated(folder, data, code=1)["error"]
        return
    data = save_boxed(tmp_path / "data", order)
    report = evaluated(folder, data, "--batch", 2, "--curves", tmp_path / "curves.png")
    # The second class: two of three found, so precision is 1 up to recall 0.66, at 67 of 101 recalls.
    second = 67 / 101
    assert [report[key] for key in ("AP", "AP50", "AP75")] == 3 * [pytest.approx((1 + second) / 2)]
    assert report["classes"] == [
        {"name": NAMES[0], "AP": 1.0, "AP50": 1.0},
        {"name": NAMES[1], "AP": pytest.approx(second), "AP50": pytest.approx(second)},
        {"name": NAMES[2], "AP": None, "AP50": None},
    ]
    assert (report["images"], report["objects"], report["found"], report["broken"]) == (3, 6, 5, [])
    assert (report["task"], report["detector"], report["size"]) == ("detection", "retinanet", 64)
    model = DetectionPredictor(folder / "retinanet.safetensors").model
    assert report["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert report["seconds"] > 0
    assert all(len(report[key]) == 64 for key in ("weights_sha256", "data_sha256"))
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.format == "PNG"


@pytest.mark.usefixtures("perfect")
def test_the_table_and_what_is_broken(folder: Path, tmp_path: Path) -> None:
    data = save_boxed(tmp_path / "data", tuple(NAMES))
    document = json.loads((data / "val.json").read_text())
    document["annotations"].append({"id": 99, "image_id": 1, "category_id": 77, "bbox": [1, 1, 5, 5]})
    (data / "val.json").write_text(json.dumps(document))
    (data / "val" / "2.png").write_bytes(b"")
    arguments = ("evaluate", data, "--weights", folder / "retinanet.safetensors", "--task", "detection")
    result = run(*arguments)
    for words in ("AP50", "bee [old]", "1.000", "2 images", "Names: weights"):
        assert words in result.stdout
    for words in ("annotation 99: unknown category 77", "2.png: the file is empty", "no objects of 1 classes"):
        assert words in result.stderr
    assert "UserWarning" not in result.stderr
    assert "max_broken" in run_json(*arguments, "--max-broken", 0, code=1)["error"]


def test_tasks_are_told_apart(folder: Path, tmp_path: Path) -> None:
    weights, data = folder / "retinanet.safetensors", save_boxed(tmp_path / "data", tuple(NAMES))
    (tmp_path / "classes" / "val" / "cat").mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(tmp_path / "classes" / "val" / "cat" / "0.png")
    told = evaluated(folder, tmp_path / "classes", code=1)["error"]
    assert told == f"{tmp_path / 'classes'}: has no boxes, expected annotations in COCO's format"
    wrong = evaluated(folder, data, "--task", "classification", code=1)["error"]
    assert "holds weights for the task 'detection', expected 'classification'" in wrong
    # The classifier in the package, on boxes of its own ten classes
    labels = read_metadata(pretrained.shipped_weights()).labels or ()
    data = save_boxed(tmp_path / "clothes", labels)
    assert "are no classes but have boxes" in run_json("evaluate", data, "--size", 32, code=1)["error"]
    for option in (("--curves", "x.png"), ("--confusion", "x.png"), ("--compare",), ("--path", "plain")):
        of = () if option[0] == "--curves" else ("--weights", weights)
        assert f"is for {'detection' if option[0] == '--curves' else 'classification'}" in refusal(
            "evaluate", data, *of, *option
        )
    assert ".png" in refusal("evaluate", data, "--weights", weights, "--curves", "x.jpg")
    assert "does not exist" in evaluated(folder, data, "--curves", tmp_path / "no" / "x.png", code=1)["error"]


# visualize, info, demo


def test_where_the_queries_look(folder: Path, tmp_path: Path) -> None:
    image = folder / "images" / "a.png"
    more = ("--weights", folder / "queries.safetensors", "--out", tmp_path / "seen.png")
    report = run_json("visualize", image, *more)
    predictor = DetectionPredictor(folder / "queries.safetensors")
    _, sample = predictor.prepare(image)
    x, y = predictor.transform.collate([sample], 1)
    (seen,) = predictor.model.attention_points(x, y.sizes)  # type: ignore[operator]
    order = seen["scores"].argsort(descending=True).tolist()
    assert [row["query"] for row in report["queries"]] == order
    scale = np.array([451 / 96, 300 / 64])
    for row, index in zip(report["queries"], order, strict=True):
        assert row["score"] == pytest.approx(float(seen["scores"][index]), rel=1e-5)
        np.testing.assert_allclose(row["point"], seen["points"][index].numpy() * scale, rtol=1e-5)
        np.testing.assert_allclose(row["box"], seen["boxes"][index].numpy() * [*scale, *scale], rtol=1e-4, atol=1e-3)
        assert 0 < row["spread"] <= 1
        assert row["label"] == NAMES[row["class"]]
    with Image.open(tmp_path / "seen.png") as picture:
        tile = round(384 * 300 / 451)
        assert picture.size == (16 + 4 * 400, 84 + 2 * (tile + 38))
        pixels = np.asarray(picture).astype(int)
    for place, row in enumerate(report["queries"], 1):
        left, top = 16 + place % 4 * 400, 84 + place // 4 * (tile + 38)
        x, y = (round(value * 384 / 451) for value in row["point"])
        assert (pixels[top + y, left + x] == 255).all(), "a cross is at the point"
    table = run("visualize", image, *more)
    assert all(words in table.stdout for words in ("looks from", "end-to-end, small"))
    assert "is for the attention of a classifier" in refusal("visualize", image, *more[:2], "--html", "x.html")


def test_retinanet_has_its_boxes_drawn(folder: Path, tmp_path: Path) -> None:
    image, weights = folder / "images" / "a.png", folder / "retinanet.safetensors"
    report = run_json("visualize", image, "--weights", weights)
    assert report["boxes"] == next(DetectionPredictor(weights)(image)).row()["boxes"]
    with Image.open(tmp_path / "a-attention.png") as picture:
        assert picture.size == (512, 341)
    assert "a-attention.png: written" in run("visualize", image, "--weights", weights).stderr
    assert "bad.png" in run_json("visualize", folder / "images" / "bad.png", "--weights", weights, code=1)["error"]


def test_info_tells_of_a_detector(folder: Path) -> None:
    report = run_json("info", folder / "queries.safetensors")
    model = DetectionPredictor(folder / "queries.safetensors").model
    assert report["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert (report["task"], report["labels"], report["num_classes"]) == ("detection", NAMES, 3)
    assert report["arguments"]["detector"] == "end-to-end"
    told = run("info", folder / "queries.safetensors").stdout
    assert all(words in told for words in ("detector", "end-to-end", "1, 1, 1", "bee [old]", "parameters"))


def test_the_demo_draws_a_sheet_where_there_is_a_detector(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(pretrained._WEIGHTS, "detection", "not-there.safetensors")
    assert demo._detect(tmp_path / "x.png") is None
    scenes = pretrained.sample_scenes()
    names = sorted({name for _, objects in scenes for name, _ in objects} | {"one more"})
    save_retinanet(tmp_path / "clothes.safetensors", names=names, classes=len(names))
    monkeypatch.setitem(pretrained._WEIGHTS, "detection", str(tmp_path / "clothes.safetensors"))
    detected = demo._detect(tmp_path / "x.png")
    assert detected is not None
    assert [len(row["truth"]) for row in detected] == [len(objects) for _, objects in scenes]
    with Image.open(tmp_path / "x.png") as sheet:
        assert sheet.size == (16 + 4 * 400, 84 + 3 * 422)


def test_the_scenes_in_the_package_are_the_composed_test_set() -> None:
    scenes = pretrained.sample_scenes()
    assert len(scenes) == 12
    for picture, objects in scenes:
        assert (picture.size, picture.mode) == ((128, 128), "RGB")
        assert objects
        for name, (x1, y1, x2, y2) in objects:
            assert name in {label for _, label in pretrained.sample_images()} | {"T-shirt/top", "Dress", "Bag"}
            assert 0 <= x1 < x2 <= 128
            assert 0 <= y1 < y2 <= 128
