"""What a run keeps safe: the checkpoint before, its data, its folder, its weights; and what it refuses beforehand."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_support import run as command
from cli_support import run_json
from data_support import picture
from tiny_support import tiny_variants
from training_support import Blobs, smaller

from mobileformer import Model, WeightsError, load_model, read_metadata
from mobileformer.evaluation.accuracy import ranks_of
from mobileformer.training import Options, Recipe, RecipeError, TrainingError, join, read_recipe, train
from mobileformer.training.lock import lock_folder
from mobileformer.training.state import load_state, previous_of


@pytest.fixture(scope="module", autouse=True)
def variants() -> Iterator[None]:
    """Every run trains a small network."""
    with tiny_variants():
        yield


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(folder: Path, recipe: Recipe | None = None, source: Any = None, val: Any = None, **options: Any) -> Any:
    with join("cpu") as world:
        given = source or Blobs(16), val or Blobs(6, seed=1)
        return train(*given, recipe or smaller(epochs=2), Options(output=folder, **options), world)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs of two updates."""
    folder = tmp_path_factory.mktemp("kept") / "run"
    run(folder)
    return folder


def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def damages(whole: bytes) -> dict[str, bytes]:
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    return {"empty": b"", "half": whole[: len(whole) // 2], "flipped": bytes(flipped), "text": b"not a checkpoint",
            "zeros": bytes(1000)}  # fmt: skip


@pytest.mark.parametrize("how", ["empty", "half", "flipped", "text", "zeros", "missing"])
def test_the_checkpoint_before_stands_in_for_a_damaged_one(finished: Path, how: str) -> None:
    path, recipe = finished / "checkpoint.pt", smaller(epochs=2)
    whole = path.read_bytes()
    try:
        path.unlink()
        if how != "missing":
            path.write_bytes(damages(whole)[how])
        content = load_state(path, recipe)
        assert (content["progress"].epoch, content["progress"].updates) == (1, 2)
        assert "checkpoint.pt: " in content["damaged"]
        assert "weights_only" not in content["damaged"]
        assert "\n" not in content["damaged"]
    finally:
        path.write_bytes(whole)
    assert load_state(path, recipe)["damaged"] is None


def test_a_run_goes_on_from_the_checkpoint_before_and_ends_the_same(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(finished, tmp_path)
    (folder / "checkpoint.pt").write_bytes(b"\x80")
    before = previous_of(folder / "checkpoint.pt").read_bytes()
    assert run(folder)["updates"] == 4
    assert "going on from the one before, after 2 updates" in capsys.readouterr().err
    assert previous_of(folder / "checkpoint.pt").read_bytes() == before  # the damaged one never takes its place
    for name in ("last.safetensors", "best.safetensors"):
        state, wanted = load_model(folder / name).state_dict(), load_model(finished / name).state_dict()
        assert all(torch.equal(state[key], value) for key, value in wanted.items())


@pytest.mark.parametrize("content", [torch.ones(3), [1, 2], {"format": 1}, {"state_dict": {}}, 7, "recipe"])
def test_what_is_no_checkpoint_is_told_in_one_line(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "checkpoint.pt")
    with pytest.raises(TrainingError, match=r"checkpoint\.pt: a checkpoint that cannot be read: .*--fresh") as told:
        run(tmp_path)
    assert len(str(told.value).splitlines()) == 1
    for read in (load_model, read_metadata):
        with pytest.raises(WeightsError, match=r"checkpoint\.pt: ") as told:
            read(tmp_path / "checkpoint.pt")
        assert len(str(told.value).splitlines()) == 1


def test_what_would_run_code_is_not_advised(tmp_path: Path) -> None:
    torch.save({"format": Blobs}, tmp_path / "checkpoint.pt")
    with pytest.raises(TrainingError, match="holds more than weights and plain values; nothing in it was run") as told:
        run(tmp_path)
    assert "weights_only" not in str(told.value)
    (tmp_path / "checkpoint.pt").unlink()
    os.mkfifo(tmp_path / "checkpoint.pt")
    with pytest.raises(TrainingError, match="expected a regular file, got a FIFO"):
        run(tmp_path)


def test_a_fresh_run_keeps_no_checkpoint_of_another(finished: Path, tmp_path: Path) -> None:
    folder = copied(finished, tmp_path)
    run(folder, smaller(epochs=1), fresh=True)
    assert not previous_of(folder / "checkpoint.pt").exists()


# Data


class Others(Blobs):
    classes = ("left", "middle", "zebra")


class Turned(Blobs):
    classes = ("right", "left", "middle")


class Named(Blobs):
    def __init__(self, images: int, digest: str) -> None:
        super().__init__(images)
        self.told = digest

    def digest(self) -> str:
        return self.told


def test_a_run_goes_on_only_with_its_own_data(finished: Path, tmp_path: Path) -> None:
    for source, val, message in (
        (Others(16), Others(6), "training had the class 'right'"),
        (Turned(16), Turned(6), "the order of the classes in training"),
        (Blobs(17), Blobs(6), "training images 16 -> 17"),
        (Blobs(16), Blobs(7), "validation images 6 -> 7"),
    ):
        source.__class__.__name__ = "Blobs"
        with pytest.raises(TrainingError, match=f"belongs to a run on other data: {message}; .*--fresh"):
            run(finished, source=source, val=val)
    named = tmp_path / "named"
    run(named, smaller(epochs=1), Named(16, "a"))
    with pytest.raises(TrainingError, match="names or order of the images in training"):
        run(named, smaller(epochs=1), Named(16, "b"))


def test_a_checkpoint_that_does_not_know_its_data_still_serves(finished: Path, tmp_path: Path) -> None:
    folder = copied(finished, tmp_path)
    content = torch.load(folder / "checkpoint.pt", weights_only=True)
    for key in ("data", "description"):
        del content[key]
    assert content["recipe"].pop("task") == "classification"
    torch.save(content, folder / "checkpoint.pt")
    assert run(folder)["updates"] == 4
    torch.save(content, folder / "old.pt")
    metadata = read_metadata(folder / "old.pt")
    assert (metadata.variant, metadata.num_classes, metadata.in_chans, metadata.mean) == ("tiny", 3, 1, (0.3,))
    assert metadata.task == "classification"


def test_a_finished_run_is_extended(finished: Path, tmp_path: Path) -> None:
    folder = copied(finished, tmp_path)
    with pytest.raises(TrainingError, match=r"\(epochs 2 -> 3\); --extend goes on with it"):
        run(folder, smaller(epochs=3))
    assert run(folder, smaller(epochs=3), extend=True)["updates"] == 6
    with pytest.raises(TrainingError, match=r"3 epochs are done, more than epochs \+ cooldown_epochs = 1"):
        run(folder, smaller(epochs=1), extend=True)
    with pytest.raises(TrainingError, match="learning_rate"):
        run(folder, smaller(epochs=4, learning_rate=1.0), extend=True)


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    with lock_folder(tmp_path), pytest.raises(TrainingError, match="another training writes into this folder"):
        run(tmp_path)
    assert not (tmp_path / "checkpoint.pt").exists()
    lock_folder(tmp_path).close()


def test_names_and_counts_are_checked_before_the_work(tmp_path: Path) -> None:
    class Odd(Blobs):
        classes = ("left", os.fsdecode(b"caf\xe9"), "right")

    with pytest.raises(TrainingError, match=r"classes: 'caf\\udce9' is not UTF-8"):
        run(tmp_path / "a", source=Odd(16), val=Odd(6))
    with pytest.raises(TrainingError, match="classes: training and validation differ in 'right'"):
        run(tmp_path / "a", val=Others(6))
    with pytest.raises(TrainingError, match=r"global_batch: 7 training images are fewer than the 8 of one update"):
        run(tmp_path / "a", source=Blobs(7))
    assert not (tmp_path / "a" / "log.jsonl").exists()


# Weights


def test_weights_come_out_of_a_checkpoint(finished: Path) -> None:
    state, saved = (load_model(finished / name).state_dict() for name in ("checkpoint.pt", "last.safetensors"))
    assert all(torch.equal(state[key], value) for key, value in saved.items())
    assert read_metadata(finished / "checkpoint.pt") == read_metadata(finished / "last.safetensors")
    assert read_metadata(finished / "checkpoint.pt").labels == Blobs.classes
    with pytest.raises(WeightsError, match="holds no average weights"):
        load_model(finished / "checkpoint.pt", average=True)


def test_weights_come_out_before_the_first_evaluation(tmp_path: Path) -> None:
    class Stops(Blobs):
        def __getitem__(self, index: int) -> Any:
            if (tmp_path / "checkpoint.pt").exists():
                raise KeyboardInterrupt
            return super().__getitem__(index)

    recipe = smaller(epochs=2, average_decay=0.9)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, recipe, Stops(16), save_minutes=0)
    assert not (tmp_path / "last.safetensors").exists()
    with pytest.warns(UserWarning, match="the raw ones are taken, since the average has no BatchNorm statistics"):
        model = load_model(tmp_path / "checkpoint.pt")
    assert (model.num_classes, read_metadata(tmp_path / "checkpoint.pt").labels) == (3, Blobs.classes)
    with pytest.raises(WeightsError, match="has no BatchNorm statistics of its own yet"):
        load_model(tmp_path / "checkpoint.pt", average=True)


# Accuracy


def test_ties_and_nan_are_ranked_one_way() -> None:
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor([
        [1.0, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0], [nan, 1, 2, 3], [nan, 1, 2, 3], [inf, inf, -inf, 0], [nan] * 4,
    ])  # fmt: skip
    y = torch.tensor([0, 2, 3, 0, 3, 1, 0])
    assert ranks_of(logits, y).tolist() == [0, 2, 3, 3, 1, 1, 3]


def test_the_run_and_the_command_count_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that never answers the same twice would hide it: all logits are equal, so that only ties decide."""
    for split, count in (("train", 4), ("val", 3)):
        for name in ("a", "b", "c"):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for number in range(count if name != "a" else count + 2):
                picture(number).save(folder / f"{number}.png")
    original = Model.forward_head
    monkeypatch.setattr(Model, "forward_head", lambda self, *a, **k: original(self, *a, **k) * 0)
    sizes = ["--set", "global_batch=4", "--set", "micro_batch=4", "--set", "epochs=1", "--set", "sizes=[[0, 32]]"]
    more = ["--set", "variant=tiny", "--set", "warmup_epochs=0", "--set", "cooldown_epochs=0", "--threads", 1]
    arguments = ["train", tmp_path / "data", "--recipe", "294m", "--output", tmp_path / "run", *sizes, *more]
    trained = run_json(*arguments, "--set", "randaugment=")
    weights = tmp_path / "run" / "last.safetensors"
    report = run_json("evaluate", tmp_path / "data", "--weights", weights, "--path", "fused")
    assert trained["top1"] == report["results"][0]["top1_percent"] == pytest.approx(100 * 5 / 11)
    assert trained["validation"] == str(tmp_path / "data" / "val")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["validation"] == trained["validation"]


# Recipes


@pytest.mark.parametrize("value", ["9" * 5000, "0x" + "f" * 5000, "1" + "0" * 400, "1e400", "-1", "[" * 2000, "nan"])
@pytest.mark.parametrize("key", ["epochs", "micro_batch", "learning_rate", "seed", "sizes", "mean", "shift", "mixup"])
def test_numbers_out_of_range_are_told_in_one_line(tmp_path: Path, key: str, value: str) -> None:
    with pytest.raises(RecipeError, match=f"^{key}: ") as told:
        read_recipe("294m", [f"{key}={value}"])
    assert len(str(told.value)) < 300
    assert "\n" not in str(told.value)
    (tmp_path / "recipe.toml").write_text(f"{key} = {value}\n")
    with pytest.raises(RecipeError) as told:
        read_recipe(tmp_path / "recipe.toml")
    assert len(str(told.value)) < 600


def test_every_number_of_a_recipe_has_a_range() -> None:
    for key, value in dataclasses.asdict(Recipe()).items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            for wrong in (-1e30, 10**400, -(10**400)):
                with pytest.raises(RecipeError, match=key):
                    read_recipe("294m", {key: wrong if isinstance(value, float) else int(wrong)})


def test_a_recipe_is_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "r.toml")
    with pytest.raises(RecipeError, match="expected a regular file, got a FIFO"):
        read_recipe(tmp_path / "r.toml")


def test_twenty_images_name_the_key(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(10):
            picture(number).save(tmp_path / "data" / name / f"{number}.png")
    told = command("train", tmp_path / "data", "--recipe", "52m", "--output", tmp_path / "run", code=1).stderr
    assert "global_batch: 16 training images are fewer than the 1024 of one update" in told
    assert "--set global_batch=8 --set micro_batch=8" in told
