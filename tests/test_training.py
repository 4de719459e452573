"""A run inside this process: what it writes, what it refuses, what it draws from the seed."""

from __future__ import annotations

import ctypes
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_support import tiny_variants
from training_support import Blobs, smaller, tiny

from mobileformer import Model, load_model, read_metadata, save_weights
from mobileformer.data.image import ImageError
from mobileformer.data.loading import Batch
from mobileformer.tasks.classification import Classification, mixup_loss
from mobileformer.training import Options, Recipe, TrainingError, World, join, train
from mobileformer.training.average import Average, estimate_statistics
from mobileformer.training.log import read_log
from mobileformer.training.memory import give_back_free_memory
from mobileformer.training.state import Progress, load_state, save_state
from mobileformer.training.step import Update
from mobileformer.visualize.curves import draw_curves


@pytest.fixture(scope="module", autouse=True)
def variants() -> Iterator[None]:
    """All but one run train a small network."""
    with tiny_variants():
        yield


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(folder: Path, recipe: Recipe | None = None, source: Any = None, **options: Any) -> dict[str, Any]:
    with join("cpu") as world:
        return train(
            source or Blobs(), Blobs(12, seed=1), recipe or smaller(), Options(output=folder, **options), world
        )


def test_a_run_learns_and_writes_everything(tmp_path: Path) -> None:
    recipe = tiny(epochs=10, learning_rate=2e-3, mixup=0.0, erase=0.0, flip=0.0)
    result = run(tmp_path / "run", recipe, Blobs(48), log_updates=1)
    assert (result["epochs"], result["updates"], result["variant"]) == (10, 60, "26m")
    written = {each.name for each in (tmp_path / "run").iterdir()}
    assert written >= {"best.safetensors", "last.safetensors", "checkpoint.pt", "recipe.toml", "log.jsonl",
                       "curves.png", "result.json"}  # fmt: skip
    assert not [name for name in written if name.endswith(".tmp")]
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == json.loads(json.dumps(result))
    metadata = read_metadata(tmp_path / "run" / "last.safetensors")
    assert (metadata.labels, metadata.mean, metadata.std) == (Blobs.classes, (0.3,), (0.3,))
    assert (metadata.input_size, metadata.crop_fraction) == (32, 1.0)
    log = read_log(tmp_path / "run" / "log.jsonl")
    losses = [event["loss"] for event in log if event["kind"] == "train"]
    assert len(losses) == 60
    assert np.mean(losses[-6:]) < 0.7 * np.mean(losses[:6])
    # of 12 images in 3 classes: hardly one wrong in some epoch, few in the last, whatever the processor rounds
    top1 = [event["top1"] for event in log if event["kind"] == "validation"]
    assert max(top1) > 90.0
    assert result["top1"] == top1[-1] >= 75.0


@pytest.mark.parametrize("fused", [True, False])
def test_the_log_says_which_kernels_served(tmp_path: Path, fused: bool) -> None:
    run(tmp_path, smaller(epochs=1), use_fused=fused)
    served = next(event["served"] for event in read_log(tmp_path / "log.jsonl") if event["kind"] == "kernels")
    operators = ("mobile_to_former", "former_to_mobile", "dynamic_relu", "depthwise_conv2d", "batch_norm_activation")
    assert {name.split(":")[0] for name in served if ":native:" in name} == (
        {f"{name}_{way}" for name in operators for way in ("fwd", "bwd")} if fused else set()
    )


def test_a_run_needs_neither_matplotlib_nor_tensorboard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in [*sys.modules, "matplotlib", "tensorboard"]:
        if module.split(".")[0] in ("matplotlib", "tensorboard") or module.startswith("torch.utils.tensorboard"):
            monkeypatch.setitem(sys.modules, module, None)
    result = run(tmp_path / "run", smaller(epochs=1))
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == json.loads(json.dumps(result))
    assert not (tmp_path / "run" / "curves.png").exists()
    told = capsys.readouterr().err
    assert "tensorboard is not installed" in told
    assert "matplotlib is not installed" in told


def test_a_run_goes_on_only_with_its_own_recipe(tmp_path: Path) -> None:
    run(tmp_path, smaller(epochs=1))
    with pytest.raises(TrainingError, match=r"belongs to a run of another recipe \(epochs 1 -> 2, learning_rate"):
        run(tmp_path, smaller(epochs=2, learning_rate=5e-4))
    again = run(tmp_path, smaller(epochs=1))
    assert again["updates"] == 4
    assert run(tmp_path, smaller(epochs=2), fresh=True)["updates"] == 8
    kinds = [event["kind"] for event in read_log(tmp_path / "log.jsonl")]
    assert kinds.count("start") == 1


def test_damaged_checkpoints_are_told(tmp_path: Path) -> None:
    run(tmp_path, smaller(epochs=1))
    path = tmp_path / "checkpoint.pt"
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"not a checkpoint"):
        path.write_bytes(damaged)
        with pytest.raises(TrainingError, match=r"checkpoint\.pt: a checkpoint that cannot be read"):
            run(tmp_path, smaller(epochs=1))
    save_state(path, smaller(epochs=1), Progress(), model={}, optimizer={}, average=None)
    content = torch.load(path)
    torch.save({**content, "format": 99}, path)
    with pytest.raises(TrainingError, match="format 99"):
        load_state(path, smaller(epochs=1))


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    run(tmp_path, smaller(epochs=1))
    good = load_state(tmp_path / "checkpoint.pt", smaller(epochs=1))

    recipe = smaller(micro_batch=4, global_batch=8)
    task = Classification(Blobs(), recipe, None)
    network = task.model
    before = {name: value.clone() for name, value in network.named_parameters()}
    update = Update(task, torch.optim.AdamW(network.parameters()), recipe, World(0, 1, torch.device("cpu")))
    x = torch.randn(4, 1, 32, 32)
    poisoned = x.clone()
    poisoned[2, 0, 3, 3] = math.nan
    y = torch.tensor([0, 1, 2, 0])
    batches = [Batch(x, y, torch.arange(4)), Batch(poisoned, y, torch.tensor([7, 1, 5, 2]))]
    with pytest.raises(TrainingError, match=r"update 9: the loss is nan, in the batch of images \[7, 1, 5, 2\]"):
        update(batches, 1e-3, 9, stop=False)
    assert all(torch.equal(before[name], value) for name, value in network.named_parameters())

    exploding = smaller(epochs=1, learning_rate=1e30, clip_norm=0.0)
    (tmp_path / "second").mkdir()
    save_state(
        tmp_path / "second" / "checkpoint.pt", exploding, Progress(), model=good["model"], optimizer=good["optimizer"],
        average=None,
    )  # fmt: skip
    kept = (tmp_path / "second" / "checkpoint.pt").read_bytes()
    with pytest.raises(TrainingError, match=r"update \d: the .* is (nan|inf).*last good checkpoint is .*second"):
        run(tmp_path / "second", exploding)
    assert (tmp_path / "second" / "checkpoint.pt").read_bytes() == kept


def test_broken_images_are_named_counted_and_limited(tmp_path: Path) -> None:
    class Torn(Blobs):
        def __getitem__(self, index: int) -> tuple[Any, int]:
            if index in (3, 4):
                raise ImageError(f"image-{index}.png: cut off")
            return super().__getitem__(index)

    result = run(tmp_path / "a", smaller(epochs=2), Torn())
    assert result["broken_images"] == 4
    named = [event["image"] for event in read_log(tmp_path / "a" / "log.jsonl") if event["kind"] == "broken"]
    assert sorted(named) == ["image-3.png: cut off"] * 2 + ["image-4.png: cut off"] * 2
    with pytest.raises(TrainingError, match="max_broken: 2 images could not be read, more than 1"):
        run(tmp_path / "b", smaller(epochs=1), Torn(), max_broken=1)


def test_frozen_features_stay(tmp_path: Path) -> None:
    save_weights(Model("tiny", num_classes=5, in_chans=1), tmp_path / "start.safetensors", mean=[0.5], std=[0.25])
    recipe = smaller(variant="", freeze="features", mean=[], std=[])
    run(tmp_path, recipe, weights=tmp_path / "start.safetensors")
    before = load_model(tmp_path / "start.safetensors").state_dict()
    after = load_model(tmp_path / "last.safetensors")
    assert (after.num_classes, after.variant) == (3, "tiny")
    assert read_metadata(tmp_path / "last.safetensors").mean == (0.5,)
    changed = {
        name
        for name, value in after.state_dict().items()
        if value.shape != before[name].shape or not torch.equal(value, before[name])
    }
    assert changed
    assert all(name.startswith("head.") for name in changed)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    save_weights(Model("tiny", num_classes=5, in_chans=1), tmp_path / "grey.safetensors")
    with pytest.raises(
        TrainingError, match=r"variant: the recipe says tiny_ungrouped, .*grey\.safetensors holds tiny\b"
    ):
        run(tmp_path / "run", smaller(variant="tiny_ungrouped"), weights=tmp_path / "grey.safetensors")
    with pytest.raises(TrainingError, match="variant: the recipe leaves it to the initial weights"):
        run(tmp_path / "run", smaller(variant=""))


def test_an_uneven_share_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="2 micro-batches of 4, which 3 processes cannot share evenly"):
        train(Blobs(), Blobs(), smaller(), Options(output=tmp_path), World(0, 3, torch.device("cpu")))


@pytest.mark.parametrize("values", [{"precision": "bfloat16"}, {"average_decay": 0.9, "average_images": 16}])
def test_other_kinds_of_run(tmp_path: Path, values: dict[str, Any]) -> None:
    result = run(tmp_path, smaller(epochs=1, **values))
    assert math.isfinite(result["loss"])


def test_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured whole and run by the eager backend: what a compiler would be given."""
    compiled = []
    real = torch.compile

    def capture(model: Any) -> Any:
        compiled.append(model)
        return real(model, backend="eager", fullgraph=True)

    monkeypatch.setattr(torch, "compile", capture)
    plain = run(tmp_path / "plain", smaller(epochs=1))
    whole = run(tmp_path / "compiled", smaller(epochs=1, compile=True))
    assert len(compiled) == 1
    assert whole["loss"] == pytest.approx(plain["loss"], rel=1e-4)


def test_freed_memory_goes_back() -> None:
    library = ctypes.CDLL(None)
    if not hasattr(library, "malloc_trim") or not Path("/proc/self/statm").exists():
        pytest.skip("needs glibc's malloc_trim and /proc")
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.restype, library.free.argtypes = None, [ctypes.c_void_p]

    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

    blocks = [library.malloc(100_000) for _ in range(2000)]  # too small to be mapped one by one
    for block in blocks:
        ctypes.memset(block, 1, 100_000)
    for block in blocks[:-1]:  # the last one keeps the heap from shrinking
        library.free(block)
    before = resident()
    give_back_free_memory()
    assert before - resident() > 150
    library.free(blocks[-1])


def test_a_run_gives_freed_memory_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[None] = []
    monkeypatch.setattr("mobileformer.training.run.give_back_free_memory", lambda: calls.append(None))
    run(tmp_path / "run", smaller(epochs=3, micro_batch=2, global_batch=2), Blobs(68))  # 102 updates
    assert len(calls) == 1


def test_mixup_is_the_loss_of_mixed_targets() -> None:
    logits, y = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1])
    hot = F.one_hot(y, 4).double()
    for share, smoothing in ((1.0, 0.1), (0.7, 0.0), (0.3, 0.1)):
        target = share * hot + (1 - share) * hot.flip(0)
        target = (1 - smoothing) * target + smoothing / 4
        expected = F.cross_entropy(logits, target)
        torch.testing.assert_close(mixup_loss(logits, y, share, smoothing), expected, rtol=0, atol=1e-12)


def test_average_follows_the_parameters() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    average = Average(model, 0.5)
    expected = model[0].weight.detach().clone()
    for update in (1, 2, 30):
        with torch.no_grad():
            model[0].weight += 1.0
        average.update(model, update)
        keep = min(0.5, (1 + update) / (10 + update))
        expected = keep * expected + (1 - keep) * model[0].weight.detach()
        torch.testing.assert_close(average.model[0].weight, expected)


def test_statistics_are_estimated_on_the_batches() -> None:
    norm = torch.nn.BatchNorm1d(3, momentum=0.1)
    norm(torch.randn(50, 3) + 100)
    batches = [torch.randn(8, 3) * 2 + shift for shift in (0.0, 1.0)]
    estimate_statistics(norm, batches, World(0, 1, torch.device("cpu")))
    torch.testing.assert_close(norm.running_mean, torch.stack([batch.mean(0) for batch in batches]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([batch.var(0) for batch in batches]).mean(0))
    assert norm.momentum == 0.1
    assert not norm.training


def test_curves_of_a_log_that_ends_early(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text(
        '{"kind": "start", "update": 0}\n'
        '{"kind": "train", "update": 1, "epochs": 0.5, "loss": 1.0, "learning_rate": 0.1, "images_per_second": 9}\n'
        '{"kind": "tra'
    )
    rows = read_log(tmp_path / "log.jsonl")
    draw_curves(rows, tmp_path / "curves.png", loss_unit="nats", score="top1", score_title="Top-1", score_unit="%")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
