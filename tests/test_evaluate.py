"""Evaluation: counts of images, the same for every batch size and path, matched with the data's classes by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_support import NAMES, refusal, run, run_json
from PIL import Image
from tiny_support import tiny_variants
from torch import Tensor

import mobileformer
from mobileformer.data import ArraySource, Batch, EvaluationTransform, evaluation_batches
from mobileformer.evaluation.accuracy import Score, Tally, evaluate
from mobileformer.evaluation.classes import EvaluationError, order_of_classes
from mobileformer.inference import library
from mobileformer.measure.difference import lively_weights_
from mobileformer.prediction import Predictor

CLASSES = sorted(name.replace("[old]", "old") for name in NAMES)
IMAGES_OF_CLASS = 4


def batch(logits: Any, y: Any, broken: tuple[str, ...] = ()) -> Batch:
    """A batch whose x are the logits that a network without anything to it gives."""
    x = torch.as_tensor(logits, dtype=torch.float32)
    return Batch(x, torch.as_tensor(y), torch.arange(len(x)), broken)


def score_of(logits: Any, y: Any, **arguments: Any) -> Score:
    report = evaluate({"net": lambda x: x}, [batch(logits, y)], num_classes=len(logits[0]), **arguments)
    return report.scores["net"]


# Counting


def test_counts_are_those_of_a_loop() -> None:
    generator = np.random.default_rng(0)
    logits = generator.integers(0, 6, (400, 9)).astype(np.float32)  # many equal ones
    y = generator.integers(0, 9, 400)
    score = score_of(logits, y)
    confusion, top5 = np.zeros((9, 9), int), np.zeros(9, int)
    for row, label in zip(logits, y, strict=True):
        order = sorted(range(9), key=lambda index: (-row[index], index))
        confusion[label, order[0]] += 1
        top5[label] += label in order[:5]
    np.testing.assert_array_equal(score.confusion, confusion)
    np.testing.assert_array_equal(score.top5, top5)
    assert (score.images, score.top1_correct, score.top5_correct) == (400, np.trace(confusion), top5.sum())
    assert (np.trace(score.confusion), score.top5.sum()) == (score.top1_correct, score.top5_correct)
    assert score.mistakes()[0][2] == (confusion - np.diag(confusion.diagonal())).max()
    assert sum(count for *_, count in score.mistakes()) == 400 - score.top1_correct


def test_a_tally_is_the_same_in_parts_and_summed_over_processes() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 6, (60, 9), generator=generator).double()  # many equal ones
    y = torch.randint(0, 9, (60,), generator=generator)
    whole, parts = Tally(), [Tally(), Tally()]
    ranks = whole.add(logits, y)
    for begin in range(0, 60, 20):
        parts[begin // 20 % 2].add(logits[begin : begin + 20], y[begin : begin + 20])
    summed = Tally(*map(sum, zip(*(part.sums for part in parts), strict=True)))
    assert (summed.top1_correct, summed.top5_correct, summed.images) == (
        int((ranks == 0).sum()),
        whole.top5_correct,
        60,
    )
    assert (summed.top1_percent, summed.top5_percent) == (whole.top1_percent, whole.top5_percent)
    assert summed.mean_loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, y)), rel=1e-12)
    assert 0 < summed.top1_percent < summed.top5_percent < 100
    with pytest.raises(ZeroDivisionError):
        Tally().top1_percent  # noqa: B018


def test_recall_and_precision() -> None:
    score = score_of([[9, 0, 0], [0, 9, 0], [9, 0, 0], [9, 0, 0]], [0, 0, 0, 1])
    np.testing.assert_array_equal(score.recall, [2 / 3, 0, np.nan])
    np.testing.assert_array_equal(score.precision, [2 / 3, 0, np.nan])
    assert score.images_of_class.tolist() == [3, 1, 0]
    assert score.mistakes() == [(0, 1, 1), (1, 0, 1)]


def test_fewer_than_five_classes() -> None:
    score = score_of([[1.0, 2.0], [3.0, 4.0]], [0, 0])
    assert (score.top1_correct, score.top5_correct) == (0, 2)


def test_the_order_of_the_data_is_mapped() -> None:
    logits = [[0, 0, 9.0], [9.0, 0, 0]]
    assert score_of(logits, [0, 1], order=[2, 0, 1]).top1_correct == 2
    assert score_of(logits, [0, 1]).top1_correct == 0


def test_networks_beside_the_first() -> None:
    logits = torch.tensor([[1.0, 2.0], [3.0, -4.0], [1.0, 1.5]])
    networks = {"first": lambda x: x, "same": lambda x: x + 0, "other": lambda x: x + torch.tensor([0.75, 0])}
    report = evaluate(networks, [batch(logits[:2], [1, 0]), batch(logits[2:], [1])], num_classes=2)
    assert list(report.agreements) == ["same", "other"]
    assert report.agreements["same"].relative == 0
    other = report.agreements["other"]
    assert (other.differently, other.difference, other.largest, other.relative) == (1, 0.75, 4.0, 0.1875)
    assert [score.top1_correct for score in report.scores.values()] == [3, 3, 2]
    assert all(score.seconds > 0 for score in report.scores.values())


def test_broken_images_are_named_up_to_a_limit() -> None:
    batches = [batch([[1.0, 0]], [0], ("a.png: empty",)), batch(np.zeros((0, 2)), [], ("b.png: cut off",))]
    batches[1].y = batches[1].y.long()
    report = evaluate({"net": lambda x: x}, batches, num_classes=2, max_broken=2)
    assert (report.broken, report.scores["net"].images) == (("a.png: empty", "b.png: cut off"), 1)
    with pytest.raises(
        EvaluationError, match=r"max_broken: 2 images could not be read, more than 1\n  a.png.*\n  b.png"
    ):
        evaluate({"net": lambda x: x}, batches, num_classes=2, max_broken=1)
    with pytest.raises(EvaluationError, match="all 1 are broken"):
        evaluate({"net": lambda x: x}, batches[1:], num_classes=2, max_broken=9)
    many = tuple(f"{index}.png: empty" for index in range(12))
    with pytest.raises(EvaluationError, match="and 2 more"):
        evaluate({"net": lambda x: x}, [batch([[1.0, 0]], [0], many)], num_classes=2)


def test_what_cannot_be_counted_is_refused() -> None:
    with pytest.raises(EvaluationError, match="net: the network's answer to image 1 is not finite"):
        score_of([[0, 1.0], [float("nan"), 1.0]], [0, 0])
    with pytest.raises(ValueError, match=r"net: expected logits \(1, 2\), got \(1, 3\)"):
        evaluate({"net": lambda x: x}, [batch([[1.0, 0, 0]], [0])], num_classes=2)
    with pytest.raises(ValueError, match="networks: expected at least one"):
        evaluate({}, [], num_classes=2)
    with pytest.raises(EvaluationError, match="no image to evaluate on"):
        evaluate({"net": lambda x: x}, [], num_classes=2)


def test_no_gradient_is_kept() -> None:
    seen = []

    def net(x: Tensor) -> Tensor:
        seen.append(torch.is_grad_enabled())
        return x

    evaluate({"net": net}, [batch([[1.0, 0]], [0])], num_classes=2)
    assert seen == [False, False]  # once before its time counts


# Classes


def test_classes_are_matched_by_name() -> None:
    assert order_of_classes(["a", "b", "c"], ["c", "a", "b"], 3) == [1, 2, 0]
    assert order_of_classes(["a", "b"], ["a", "b"], 2) == [0, 1]
    assert order_of_classes(["a", "b"], None, 2) == [0, 1]
    assert order_of_classes(["crane", "crane"], ["crane", "crane"], 2) == [0, 1]


@pytest.mark.parametrize(
    ("classes", "labels", "message"),
    [
        (["a", "dog", "b"], ["a", "b", "c"], "'dog' is a class of the data and none of the weights"),
        (["a"], ["a", "b"], "'b' is a class of the weights and none of the data"),
        (["a", "b", "a"], ["b", "a", "a"], "the class 'a' is in the weights twice"),
        (["a", "b", "a"], ["b", "a"], "the class 'a' is in the data twice"),
        (["a"], None, "the data has 1 classes, the weights 3 without names"),
    ],
)
def test_classes_that_do_not_match(classes: list[str], labels: list[str] | None, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        order_of_classes(classes, labels, 3)


# The real networks


def pictures() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(5)
    count = len(CLASSES) * IMAGES_OF_CLASS
    low = generator.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return low.repeat(10, axis=1).repeat(10, axis=2), np.repeat(np.arange(len(CLASSES)), IMAGES_OF_CLASS)


@pytest.fixture(scope="module", autouse=True)
def variants() -> Iterator[None]:
    """The networks are small."""
    with tiny_variants():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder and weights that get some of it right: the last layer is fitted to half of the images."""
    folder = tmp_path_factory.mktemp("evaluate")
    images, labels = pictures()
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        for split in ("train", "val"):
            place = folder / "data" / split / CLASSES[label]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(place / f"{index}.png")
    model = mobileformer.Model("tiny", num_classes=len(CLASSES)).eval()
    lively_weights_(model, seed=3)
    x = torch.from_numpy(np.stack([EvaluationTransform(32, [0.5] * 3, [0.25] * 3)(Image.fromarray(i)) for i in images]))
    with torch.no_grad():
        hidden = model.forward_head(*model.forward_features(x), pre_logits=True)
        wanted = torch.eye(len(CLASSES))[torch.from_numpy(labels)]
        fitted = torch.linalg.lstsq(torch.cat([hidden, torch.ones(len(x), 1)], 1)[::2], wanted[::2]).solution
        model.head.classifier.weight.copy_(fitted[:-1].T)
        model.head.classifier.bias.copy_(fitted[-1])
    told: dict[str, Any] = {"mean": [0.5] * 3, "std": [0.25] * 3, "input_size": 32}
    mobileformer.save_weights(model, folder / "ours.safetensors", labels=CLASSES, **told)
    turned = mobileformer.load_model(folder / "ours.safetensors")
    with torch.no_grad():
        for value in (turned.head.classifier.weight, turned.head.classifier.bias):
            value.copy_(value.flip(0))
    mobileformer.save_weights(turned, folder / "turned.safetensors", labels=CLASSES[::-1], **told)
    mobileformer.save_weights(model, folder / "nameless.safetensors", **told)
    run("convert", folder / "ours.safetensors", folder / "folded.safetensors", "--fold")
    return folder


def evaluated(folder: Path, weights: str = "ours.safetensors", *options: object, code: int = 0) -> Any:
    return run_json("evaluate", folder / "data", "--weights", folder / weights, "--threads", 1, *options, code=code)


def expected(folder: Path) -> np.ndarray:
    """The confusion matrix, in float64 on the plain path, image by image."""
    return expected_with_loss(folder)[0]


def expected_with_loss(folder: Path) -> tuple[np.ndarray, float]:
    """The same, and the mean cross entropy."""
    model = mobileformer.load_model(folder / "ours.safetensors", use_fused=False).double()
    images, labels = pictures()
    transform = EvaluationTransform(32, [0.5] * 3, [0.25] * 3)
    matrix, loss = np.zeros((len(CLASSES), len(CLASSES)), int), 0.0
    for image, label in zip(images, labels, strict=True):
        with torch.no_grad():
            logits = model(torch.from_numpy(transform(Image.fromarray(image)))[None].double())
        matrix[label, logits.argmax()] += 1
        loss -= logits[0].log_softmax(0)[label].item()
    return matrix, loss / len(images)


def matrix_of(report: Any) -> np.ndarray:
    matrix = np.diag([row["found"] for row in report["classes"]])
    for row in report["mistakes"]:
        matrix[row["class"], row["taken_for"]] = row["images"]
    return matrix


def test_the_command_counts_right(folder: Path) -> None:
    report, (matrix, loss) = evaluated(folder), expected_with_loss(folder)
    assert report["results"][0]["loss"] == pytest.approx(loss, rel=1e-4)
    assert 0 < np.trace(matrix) < matrix.sum()
    np.testing.assert_array_equal(matrix_of(report), matrix)
    (result,) = report["results"]
    usual = "engine" if library.why_not() is None else "fused"
    assert (result["path"], report["size"], report["images"]) == (usual, 32, matrix.sum())
    assert result["top1_correct"] == np.trace(matrix)
    assert result["top1_percent"] == 100 * np.trace(matrix) / matrix.sum()
    for index, row in enumerate(report["classes"]):
        taken = matrix[:, index].sum()
        assert (row["label"], row["images"]) == (CLASSES[index], IMAGES_OF_CLASS)
        assert row["recall_percent"] == 100 * matrix[index, index] / IMAGES_OF_CLASS
        precision = pytest.approx(100 * matrix[index, index] / taken) if taken else None
        assert row["precision_percent"] == precision


@pytest.mark.parametrize("path", ["fused", "plain", "engine"])
def test_neither_batch_size_nor_path_changes_the_count(folder: Path, path: str) -> None:
    matrix = expected(folder)
    for size in (1, 5, 64):
        report = evaluated(folder, "ours.safetensors", "--batch", size, "--path", path)
        np.testing.assert_array_equal(matrix_of(report), matrix)
        assert report["results"][0]["path"] == path


@pytest.mark.parametrize("weights", ["ours.safetensors", "folded.safetensors"])
def test_bfloat16_is_close(folder: Path, weights: str) -> None:
    """By the path's name as by --precision; and it is another arithmetic than float32."""
    (result,) = evaluated(folder, weights, "--path", "engine-bf16")["results"]
    assert abs(result["top1_correct"] - np.trace(expected(folder))) <= 2
    for options in (("--precision", "bfloat16"), ("--precision", "bfloat16", "--path", "engine")):
        (other,) = evaluated(folder, weights, *options)["results"]
        assert (other["path"], other["top1_correct"]) == ("engine-bf16", result["top1_correct"])
    arguments = ("evaluate", folder / "data", "--weights", folder / weights, "--precision", "bfloat16")
    assert "in float32" in refusal(*arguments, "--compare")
    if weights.startswith("ours"):
        for path in ("plain", "fused"):
            assert "is for the inference engine, or fused on a GPU" in refusal(*arguments, "--path", path)


@pytest.mark.parametrize("path", ["engine", "fused"])
def test_the_engine_gets_bytes_and_pytorch_normalised_numbers(
    folder: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, logits = [], Predictor.logits
    monkeypatch.setattr(
        Predictor, "logits", lambda self, x: seen.append((x.dtype, x.shape.index(3))) or logits(self, x)
    )
    evaluated(folder, "ours.safetensors", "--batch", 16, "--path", path)
    assert set(seen) == {{"engine": (np.dtype(np.uint8), 3), "fused": (np.dtype(np.float32), 1)}[path]}


def test_compare_says_whether_the_paths_agree(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = evaluated(folder, "ours.safetensors", "--compare")
    assert [row["path"] for row in report["results"]] == ["plain", "fused", "engine"]
    assert len({row["top1_correct"] for row in report["results"]}) == 1
    assert [row["path"] for row in report["agreement"]] == ["fused", "engine"]
    for row in report["agreement"]:
        assert (row["with"], row["classified_differently"]) == ("plain", 0)
        assert row["relative_difference"] < 3e-5
    original = mobileformer.Model.forward_head

    def off(self: mobileformer.Model, *arguments: Any, **more: Any) -> Tensor:
        return original(self, *arguments, **more) * (1.01 if self.use_fused else 1)

    monkeypatch.setattr(mobileformer.Model, "forward_head", off)
    result = run("evaluate", folder / "data", "--weights", folder / "ours.safetensors", "--compare", code=1)
    assert "fused: logits are off by 1.0e-02 of the largest one" in result.stderr
    assert "Beside plain" in result.stdout


def test_weights_that_name_classes_otherwise(folder: Path, tmp_path: Path) -> None:
    right = evaluated(folder)["results"][0]["top1_correct"]
    turned = evaluated(folder, "turned.safetensors")
    assert turned["results"][0]["top1_correct"] == right
    assert [row["label"] for row in turned["classes"]] == CLASSES[::-1]
    nameless = evaluated(folder, "nameless.safetensors")
    assert (nameless["results"][0]["top1_correct"], nameless["classes_named_by"]) == (right, "data, in its order")
    (tmp_path / "names.txt").write_text("\n".join([*CLASSES[:-1], "zebra"]), encoding="utf-8")
    wrong = evaluated(folder, "ours.safetensors", "--labels", tmp_path / "names.txt", code=1)["error"]
    assert f"{CLASSES[-1]!r} is a class of the data and none of the weights" in wrong
    (tmp_path / "names.txt").write_text("\n".join(CLASSES), encoding="utf-8")
    assert (
        evaluated(folder, "turned.safetensors", "--labels", tmp_path / "names.txt")["results"][0]["top1_correct"]
        < right
    )


def test_a_folded_file_runs_on_the_engine(folder: Path) -> None:
    report = evaluated(folder, "folded.safetensors")
    assert report["results"][0]["path"] == "engine"
    np.testing.assert_array_equal(matrix_of(report), expected(folder))
    assert "only the engine" in evaluated(folder, "folded.safetensors", "--path", "plain", code=1)["error"]
    assert "only the engine" in evaluated(folder, "folded.safetensors", "--compare", code=1)["error"]


def test_a_broken_image_is_left_out_and_named(folder: Path) -> None:
    bad = folder / "data" / "train" / CLASSES[2] / "bad.png"
    bad.write_bytes(b"not a picture")
    report = evaluated(folder, "ours.safetensors", "--split", "train")
    assert len(report["broken"]) == 1
    assert str(bad) in report["broken"][0]
    np.testing.assert_array_equal(matrix_of(report), expected(folder))
    assert str(bad) in evaluated(folder, "ours.safetensors", "--split", "train", "--max-broken", 0, code=1)["error"]
    said = run("evaluate", folder / "data", "--weights", folder / "ours.safetensors", "--split", "train").stderr
    assert "1 images could not be read and count for nothing" in said


def test_for_people_and_as_a_picture(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "confusion.png"
    arguments = ("evaluate", folder / "data", "--weights", folder / "ours.safetensors")
    result = run(*arguments, "--confusion", picture)
    for told in ("top-1", "dog, large", "Most frequent mistakes", "img/s with loading"):
        assert told in result.stdout
    with Image.open(picture) as image:
        assert image.format == "PNG"
    assert "expected the ending .png" in refusal(*arguments, "--confusion", tmp_path / "x.jpg")


def test_what_the_command_cannot_do(folder: Path, tmp_path: Path) -> None:
    assert "trained on Fashion-MNIST" in run("evaluate", folder / "data", code=1).stderr
    weights = folder / "ours.safetensors"
    nowhere = run_json("evaluate", tmp_path / "nowhere", "--weights", weights, code=1)
    assert "nowhere: no such file or folder" in nowhere["error"]
    assert (
        "runs all of them"
        in run("evaluate", folder / "data", "--weights", weights, "--compare", "--path", "plain", code=2).stderr
    )
    lost = run_json("evaluate", folder / "data", "--weights", tmp_path / "lost.safetensors", code=1)
    assert "lost.safetensors" in lost["error"]


def test_without_the_engine_its_path_says_why(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise RuntimeError("the compiled engine is missing: no compiler")

    monkeypatch.setattr("mobileformer.inference.engine.library", missing)
    why = "engine: the compiled engine is missing"
    assert why in evaluated(folder, "ours.safetensors", "--path", "engine", code=1)["error"]
    assert why in evaluated(folder, "ours.safetensors", "--precision", "bfloat16", code=1)["error"]
    result = run("evaluate", folder / "data", "--weights", folder / "ours.safetensors", "--json")
    assert json.loads(result.stdout)["results"][0]["path"] == "fused"
    assert f"fused PyTorch computes in place of the engine: {why}" in result.stderr


def test_the_parts_of_two_processes_add_up(folder: Path) -> None:
    images, labels = pictures()
    source = ArraySource(images, labels, CLASSES)
    transform = EvaluationTransform(32, [0.5] * 3, [0.25] * 3)
    model = mobileformer.load_model(folder / "ours.safetensors")

    def halves() -> Iterator[Batch]:
        for rank in range(2):
            yield from evaluation_batches(source, transform, batch_size=3, rank=rank, world=2)

    score = evaluate({"fused": model}, halves(), num_classes=len(CLASSES)).scores["fused"]
    np.testing.assert_array_equal(score.confusion, expected(folder))


# Part of the classes, and classes without names


@pytest.mark.parametrize(
    ("classes", "num_classes", "present", "order"),
    [
        (sorted(map(str, range(12))), 12, None, [0, 1, 10, 11, *range(2, 10)]),
        (["00", "01", "02"], 3, None, [0, 1, 2]),
        (["10", "3"], 12, {"10", "3"}, [10, 3]),
        (["b", "a"], 2, None, [0, 1]),
        ([f"n{number:08}" for number in range(3)], 3, None, [0, 1, 2]),
    ],
)
def test_classes_of_weights_without_names(
    classes: list[str], num_classes: int, present: set[str] | None, order: list[int]
) -> None:
    assert order_of_classes(classes, None, num_classes, present=present) == order


@pytest.mark.parametrize(
    ("classes", "present", "message"),
    [
        (sorted(map(str, range(1, 13))), None, "in the order of text.*which is the first class"),
        (["a", "b"], {"a", "b"}, "the data has 2 classes, the weights 12 without names: --labels"),
        (["12", "3"], {"3"}, "the data has 2 classes, the weights 12 without names"),
        (["n00000001"], {"n00000001"}, "the data has 1 classes"),
    ],
)
def test_classes_that_nobody_can_know(classes: list[str], present: set[str] | None, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        order_of_classes(classes, None, 12, present=present)


def test_a_part_of_the_classes_is_found_by_name() -> None:
    assert order_of_classes(["c", "a"], ["a", "b", "c"], 3, present={"c", "a"}) == [2, 0]
    assert order_of_classes(["c", "new"], ["a", "b", "c"], 3, present={"c"}) == [2, 0]
    with pytest.raises(EvaluationError, match="'new' is a class of the data and none of the weights"):
        order_of_classes(["c", "new"], ["a", "b", "c"], 3, present={"c", "new"})


def test_folders_that_are_numbers(tmp_path: Path) -> None:
    """A network that knows twelve grey tones by their number."""
    model = mobileformer.Model("tiny", num_classes=12).eval()
    mobileformer.save_weights(model, tmp_path / "w.safetensors", mean=[0.5] * 3, std=[0.25] * 3, input_size=32)
    for number in range(12):
        folder = tmp_path / "data" / "val" / str(number)
        folder.mkdir(parents=True)
        Image.new("RGB", (32, 32), (20 * number,) * 3).save(folder / "0.png")
    report = run_json("evaluate", tmp_path / "data", "--weights", tmp_path / "w.safetensors", "--threads", 1)
    assert report["classes_named_by"] == "data, whose names are the classes' numbers"
    assert [row["label"] for row in report["classes"]] == list(map(str, range(12)))
    transform = EvaluationTransform(32, [0.5] * 3, [0.25] * 3)
    x = torch.from_numpy(np.stack([transform(Image.new("RGB", (32, 32), (20 * n,) * 3)) for n in range(12)]))
    with torch.no_grad():
        right = model(x).argmax(1) == torch.arange(12)
    assert report["results"][0]["top1_correct"] == int(right.sum())


def test_part_of_the_classes_and_test_beside_val(folder: Path, tmp_path: Path) -> None:
    matrix = expected(folder)
    for split in ("val", "test"):
        for name in CLASSES[:2] if split == "test" else CLASSES:
            target = tmp_path / "data" / split / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(folder / "data" / "val" / name)
    (tmp_path / "data" / "test" / CLASSES[3]).mkdir()
    arguments = ("--weights", folder / "ours.safetensors", "--threads", 1)
    report = run_json("evaluate", tmp_path / "data", *arguments, "--split", "test")
    assert report["images"] == 2 * IMAGES_OF_CLASS
    assert report["images_from"] == str(tmp_path / "data" / "test")
    assert report["results"][0]["top1_correct"] == matrix[0, 0] + matrix[1, 1]
    whole = run_json("evaluate", tmp_path / "data", *arguments)
    assert (whole["images"], whole["images_from"]) == (matrix.sum(), str(tmp_path / "data" / "val"))
    alone = run_json("evaluate", tmp_path / "data" / "test", *arguments, "--split", "all")
    assert alone["results"][0]["top1_correct"] == report["results"][0]["top1_correct"]
    said = run("evaluate", tmp_path / "data", *arguments, "--split", "test").stderr
    assert f"no images of {len(CLASSES) - 2} classes, which count for nothing" in said
