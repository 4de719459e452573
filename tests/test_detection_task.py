"""Detection as a task of training: a run, its weights, what it starts from, and that nothing but the recipe counts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import mobileformer
from mobileformer import Model, WeightsError, save_weights
from mobileformer.data import open_source
from mobileformer.data.loading import training_batches
from mobileformer.detection import EndToEnd, RetinaNet
from mobileformer.files.metadata import encode
from mobileformer.measure.difference import lively_weights_
from mobileformer.tasks.detection import Detection, DetectionRecipe
from mobileformer.training import Options, Recipe, TrainingError, join, read_recipe, train
from mobileformer.training.log import read_log
from mobileformer.training.recipe import recipe_names
from mobileformer.training.run import _Run
from mobileformer.training.schedule import learning_rate, make_optimizer
from mobileformer.training.state import load_state
from mobileformer.weights.detectors import load_detector, read_detector_metadata, save_detector, warm_start

# Without the compiled library the model runs on the reference and says so; the numbers are the same.
pytestmark = pytest.mark.filterwarnings("ignore::mf_kernels.KernelFallbackWarning")

TINY: dict[str, Any] = {
    "task": "detection", "detector": "retinanet", "variant": "26m", "width": 32, "head_depth": 1, "levels": 3,
    "norm": "group", "anchor_scale": 2.0, "queries": 8, "query_width": 32, "feature_width": 32, "depth": [1, 1, 1],
    "preset": "focal", "dropout": 0.1, "epochs": 2, "warmup_epochs": 0, "cooldown_epochs": 0, "schedule": "step",
    "global_batch": 4, "micro_batch": 2, "learning_rate": 1e-3, "weight_decay": 0.05, "clip_norm": 1.0,
    "sizes": [[0, 64]], "short_sides": [], "crop": 0.0, "seed": 3,
}  # fmt: skip


def tiny(**values: Any) -> Recipe:
    return Recipe(**{**TINY, **values})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bright squares on dark images of two shapes, one class for each brightness; one image has none."""
    root = tmp_path_factory.mktemp("boxes")
    for split, count in (("train", 8), ("val", 4)):
        rng = np.random.default_rng(count)
        (root / split).mkdir()
        images, annotations = [], []
        for number in range(count):
            width, height = (64, 48) if number % 2 else (48, 64)
            pixels = rng.integers(0, 60, (height, width, 3), dtype=np.uint8)
            images.append({"id": number + 1, "file_name": f"{number}.png", "width": width, "height": height})
            for label in range(2 if number else 0):
                left, top = rng.integers(0, width - 20), rng.integers(0, height - 20)
                pixels[top : top + 20, left : left + 20] = 250 if label else 140
                annotations.append({
                    "id": len(annotations) + 1, "image_id": number + 1, "category_id": 3 + label, "area": 400,
                    "bbox": [int(left), int(top), 20, 20], "iscrowd": 0,
                })  # fmt: skip
            Image.fromarray(pixels).save(root / split / f"{number}.png")
        categories = [{"id": 3, "name": "grey"}, {"id": 4, "name": "white"}]
        document = {"images": images, "annotations": annotations, "categories": categories}
        (root / f"{split}.json").write_text(json.dumps(document))
    return root


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(data: Path, output: Path, recipe: Recipe, **options: Any) -> dict[str, Any]:
    with join("cpu") as world:
        sources = (open_source(data, split) for split in ("train", "val"))
        return train(*sources, recipe, Options(output=output, **options), world)


@pytest.mark.parametrize("detector", ["retinanet", "end-to-end"])
def test_a_run_writes_weights_that_describe_a_detector(data: Path, tmp_path: Path, detector: str) -> None:
    result = run(data, tmp_path / "run", tiny(detector=detector, average_decay=0.9, average_images=4), log_updates=1)
    assert (result["epochs"], result["updates"]) == (2, 4)
    assert all(0 <= result[key] <= 1 for key in ("AP", "AP50", "AP75", "best_AP"))
    assert (tmp_path / "run" / "curves.png").is_file()
    log = read_log(tmp_path / "run" / "log.jsonl")
    parts = {"retinanet": ("classification", "boxes"), "end-to-end": ("class", "box", "giou")}[detector]
    steps = [event for event in log if event["kind"] == "train"]
    assert len(steps) == 4
    for event in steps:
        assert event["loss"] == pytest.approx(sum(event[f"{part}_loss"] for part in parts), rel=1e-5)
    path = tmp_path / "run" / "last.safetensors"
    metadata = read_detector_metadata(path)
    assert (metadata.task, metadata.labels, metadata.input_size) == ("detection", ("grey", "white"), 64)
    assert metadata.arguments["detector"] == detector
    model = load_detector(path)
    assert type(model) is {"retinanet": RetinaNet, "end-to-end": EndToEnd}[detector]
    answers = model([torch.zeros(3, 48, 64), torch.zeros(3, 64, 64)])
    assert [set(answer) for answer in answers] == 2 * [{"boxes", "labels", "scores"}]
    with pytest.raises(WeightsError, match="holds weights for the task 'detection', expected 'classification'"):
        mobileformer.load_model(path)


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("detector", ["retinanet", "end-to-end"])
def test_a_run_goes_on_to_the_bit(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, detector: str) -> None:
    """Stopped after an epoch, and with other workers from there; dropout and flips are on."""
    recipe = tiny(detector=detector)
    run(data, tmp_path / "whole", recipe)
    real = _Run._epoch

    def one_epoch(self: _Run) -> None:
        if self.progress.epoch:
            raise StoppedError
        real(self)

    monkeypatch.setattr(_Run, "_epoch", one_epoch)
    with pytest.raises(StoppedError):
        run(data, tmp_path / "parts", recipe)
    monkeypatch.setattr(_Run, "_epoch", real)
    assert load_state(tmp_path / "parts" / "checkpoint.pt", recipe)["progress"].updates == 2
    run(data, tmp_path / "parts", recipe, workers=1)
    whole, parts = (load_file(tmp_path / name / "last.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(value, parts[key]) for key, value in whole.items())


def test_an_update_is_the_same_whoever_shares_it(data: Path, tmp_path: Path) -> None:
    """Two micro-batches of 2 are one update; the mean of their losses is what two processes average."""
    source = open_source(data, "train")
    task = Detection(source, tiny(), None)
    batches = list(training_batches(
        source, task.training_transform(64), batch_size=2, slots=2, epoch=0, seed=3
    ))  # fmt: skip
    shares = [
        list(training_batches(
            source, task.training_transform(64), batch_size=2, slots=2, epoch=0, seed=3, rank=rank, world=2
        ))
        for rank in range(2)
    ]  # fmt: skip
    for number, batch in enumerate(batches):
        other = shares[number % 2][number // 2]
        assert torch.equal(batch.x, other.x)
        assert all(torch.equal(a["boxes"], b["boxes"]) for a, b in zip(batch.y.targets, other.y.targets, strict=True))
    shapes = {tuple(size) for batch in batches for size in batch.y.sizes.tolist()}
    assert shapes == {(48, 64), (64, 48)}
    assert all(len({tuple(size) for size in batch.y.sizes.tolist()}) == 1 for batch in batches)  # of like shape


def test_the_backbone_has_its_own_rate_and_its_norms_stay(data: Path) -> None:
    task = Detection(open_source(data, "train"), tiny(backbone_rate=0.1, freeze_norms=True), None)
    optimizer = make_optimizer(task.model, task.recipe, task.rate_share)
    shares = {id(p): group.get("share", 1.0) for group in optimizer.param_groups for p in group["params"]}
    assert len(shares) == len(list(task.model.parameters()))
    for name, parameter in task.model.named_parameters():
        assert shares[id(parameter)] == (0.1 if name.startswith("backbone.") else 1.0), name
    task.train_mode()
    before = {key: value.clone() for key, value in task.model.backbone.state_dict().items() if "running" in key}
    x = torch.rand(2, 3, 64, 64)
    task.model(x, [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}] * 2)
    after = task.model.backbone.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_the_rate_drops_where_the_recipe_says() -> None:
    recipe = read_recipe("retinanet-coco", {"variant": "26m"})
    assert [round(learning_rate(recipe, epoch) / recipe.learning_rate, 9) for epoch in (0, 7.9, 8, 10.9, 11)] == [
        1, 1, 0.1, 0.1, 0.01,
    ]  # fmt: skip


def test_the_shipped_recipes_make_the_networks_that_they_are_for(data: Path) -> None:
    names = [name for name in recipe_names() if isinstance(read_recipe(name), DetectionRecipe)]
    assert sorted(names) == ["end-to-end-coco", "end-to-end-tiny", "retinanet-coco", "retinanet-tiny"]
    source = open_source(data, "train")
    counts = {}
    for name in names:
        with torch.device("meta"):
            task = Detection(source, read_recipe(name, {"variant": "26m"}), None)
        counts[name] = sum(p.numel() for p in task.model.parameters())
    assert 3.3e6 < counts["end-to-end-tiny"] < 3.7e6
    assert counts["retinanet-tiny"] < 3.5e6
    assert counts["end-to-end-coco"] > counts["retinanet-coco"] > 9e6


def test_a_backbone_is_taken_from_whatever_has_one(data: Path, tmp_path: Path) -> None:
    classifier = Model("26m", num_classes=5, in_chans=1)
    lively_weights_(classifier, seed=1)
    save_weights(classifier, tmp_path / "classifier.safetensors", mean=[0.5], std=[0.5])
    source = open_source(data, "train")
    first = Detection(source, tiny(variant=""), tmp_path / "classifier.safetensors").model
    own = first.backbone.state_dict()
    assert torch.equal(own["blocks.3.project.conv.weight"], classifier.state_dict()["blocks.3.project.conv.weight"])
    torch.testing.assert_close(own["stem.conv.weight"].sum(1), classifier.stem.conv.weight.sum(1))  # for 3 channels
    save_detector(first, tmp_path / "first.safetensors", labels=["grey", "white"])
    second = Detection(source, tiny(detector="end-to-end", variant=""), tmp_path / "first.safetensors").model
    assert all(torch.equal(value, own[key]) for key, value in second.backbone.state_dict().items())
    other = RetinaNet("26m", 7, width=32, head_depth=1, levels=3, norm="group")
    with pytest.warns(UserWarning, match=r"first\.safetensors: 2 of \d+ tensors are not in it and start anew"):
        warm_start(other, tmp_path / "first.safetensors")
    assert torch.equal(other.pyramid.state_dict()["lateral.0.weight"], first.pyramid.state_dict()["lateral.0.weight"])
    with pytest.raises(TrainingError, match=r"variant: the recipe says 52m, .* holds 26m"):
        Detection(source, tiny(variant="52m"), tmp_path / "first.safetensors")


def test_half_the_bytes_are_read_back(tmp_path: Path) -> None:
    model = RetinaNet("26m", 3, width=32, head_depth=1, levels=3)
    for dtype in (None, torch.float16):
        save_detector(model, tmp_path / f"{dtype}.safetensors", dtype=dtype)
    whole, half = ((tmp_path / f"{dtype}.safetensors").stat().st_size for dtype in (None, torch.float16))
    assert half < 0.53 * whole
    loaded = load_detector(tmp_path / "torch.float16.safetensors")
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value.half().float() if value.is_floating_point() else value)


def bad(tmp_path: Path, change: Any) -> Path:
    model = RetinaNet("26m", 3, width=32, head_depth=1, levels=3)
    path = tmp_path / "bad.safetensors"
    metadata = mobileformer.weights.detectors.describe_detector(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    state, metadata = change(state, metadata)
    save_file(state, path, metadata=encode(metadata, form="mobileformer", version=1))
    return path


def arguments(**values: Any) -> Any:
    def change(state: Any, metadata: Any) -> Any:
        return state, dataclasses.replace(metadata, arguments={**metadata.arguments, **values})

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (arguments(detector="yolo"), "detector: expected one of retinanet, end-to-end, got 'yolo'"),
        (arguments(width=-1), "cannot be built .width"),
        (arguments(width=10**12), "cannot be built|does not fit"),
        (arguments(colour="red"), "cannot be built .*colour"),
        (arguments(levels=5), "missing: pyramid"),
        (lambda s, m: ({k: v for k, v in s.items() if k != "backbone.tokens"}, m), "missing: backbone.tokens"),
        (lambda s, m: (s | {"more": torch.zeros(1)}, m), "unexpected: more"),
        (lambda s, m: (s | {"backbone.tokens": torch.full((3, 128), torch.nan)}, m), "not finite: backbone.tokens"),
        (lambda s, m: (s | {"backbone.tokens": torch.zeros(2, 2)}, m), "wrong shape: backbone.tokens"),
        (lambda s, m: (s, dataclasses.replace(m, num_classes=2**24)), "does not fit|cannot be built"),
    ],
)
def test_files_that_are_no_detector_are_refused(tmp_path: Path, change: Any, words: str) -> None:
    path = bad(tmp_path, change)
    with pytest.raises(WeightsError, match=words) as told:
        load_detector(path)
    assert str(told.value).startswith(str(tmp_path))


def test_a_classifiers_file_is_no_detectors(tmp_path: Path) -> None:
    save_weights(Model("26m", num_classes=2), tmp_path / "c.safetensors")
    with pytest.raises(WeightsError, match="holds weights for the task 'classification', expected 'detection'"):
        load_detector(tmp_path / "c.safetensors")
