"""Training and another task than classification: one that the package has never heard of."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from task_support import FindSquares, Squares, SquaresRecipe
from training_support import tiny

from mobileformer import Model, WeightsError, load_model, load_weights, read_metadata, tasks
from mobileformer.data import training_batches
from mobileformer.files.metadata import Metadata, decode, encode
from mobileformer.tasks.classification import Classification, ClassificationRecipe
from mobileformer.training import Figure, Options, TrainingError, World, join, train
from mobileformer.training.log import read_log
from mobileformer.training.step import Update


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def recipe(**values: Any) -> SquaresRecipe:
    given = {"epochs": 6, "warmup_epochs": 0, "cooldown_epochs": 0, "global_batch": 8, "micro_batch": 4,
             "learning_rate": 0.03, "mean": [0.0], "std": [1.0], "seed": 1, **values}  # fmt: skip
    return SquaresRecipe(**given)


def run(folder: Path, given: SquaresRecipe, **options: Any) -> dict[str, Any]:
    with join("cpu") as world:
        return train(
            Squares(32), Squares(12, seed=1), given, Options(output=folder, log_updates=1, **options), world,
            FindSquares,
        )  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks") / "run"
    run(folder, recipe(average_decay=0.5, average_images=16))
    return folder


def test_a_run_of_another_task_writes_everything(finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    events = read_log(finished / "log.jsonl")
    errors = [event["error"] for event in events if event["kind"] == "validation"]
    assert len(errors) == 6
    assert result["error"] == errors[-1]
    assert result["best_error"] == min(errors) == errors[result["best_epoch"] - 1] < errors[0]
    steps = [event for event in events if event["kind"] == "train"]
    assert len(steps) == 24
    for event in steps:
        assert event["left_loss"] + event["top_loss"] == pytest.approx(event["loss"], rel=1e-6)
    assert steps[-1]["mean_loss"] < steps[3]["mean_loss"]
    assert {"best.safetensors", "last.safetensors", "curves.png"} <= {each.name for each in finished.iterdir()}
    assert "turned = 0.5" in (finished / "recipe.toml").read_text()
    assert "mixup" not in (finished / "recipe.toml").read_text()


def test_neither_workers_nor_a_restart_change_another_task(finished: Path, tmp_path: Path) -> None:
    given = {"average_decay": 0.5, "average_images": 16}
    run(tmp_path, recipe(**given, epochs=3), workers=1)
    whole = tmp_path / "whole"
    run(whole, recipe(**given, epochs=3))
    states = [load_file(folder / "last.safetensors") for folder in (tmp_path, whole)]
    assert all(torch.equal(states[0][key], value) for key, value in states[1].items())
    assert run(finished, recipe(**given))["updates"] == 24


def test_training_imports_no_task(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; import test_tasks\n"
        "for name in [name for name in sys.modules if name.startswith('mobileformer.tasks')]: del sys.modules[name]\n"
        f"test_tasks.run(Path({str(tmp_path)!r}), test_tasks.recipe(epochs=1))\n"
        "print([name for name in sys.modules if name.startswith('mobileformer.tasks')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    )
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def test_weights_of_another_task_are_refused_in_one_line(finished: Path) -> None:
    model = Model("294m", num_classes=1, in_chans=1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for name in ("last.safetensors", "checkpoint.pt"):
        for read in (load_model, read_metadata, lambda path: load_weights(model, path)):
            with pytest.raises(WeightsError, match=rf"{name}: holds weights for the task 'squares', expected 'classif"):
                read(finished / name)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_folder_of_another_task_is_refused(finished: Path) -> None:
    with join("cpu") as world, pytest.raises(TrainingError, match=r"another recipe .*task 'squares' -> 'classificat"):
        train(Squares(32), Squares(12, seed=1), tiny(), Options(output=finished), world)


def test_metadata_says_the_task() -> None:
    plain = Metadata("26m", 2, 3)
    assert "task" not in encode(plain, form="f", version=1)
    header = encode(Metadata("26m", 2, 3, task="squares"), form="f", version=1)
    found = decode(header, "file", form="f", version=1, task="squares")
    assert found is not None
    assert found.task == "squares"
    with pytest.raises(WeightsError, match=r"^file: holds weights for the task 'squares', expected 'classification'$"):
        decode(header, "file", form="f", version=1)
    with pytest.raises(WeightsError, match="expected 'squares'"):
        decode(encode(plain, form="f", version=1), "file", form="f", version=1, task="squares")


def test_tasks_are_found_by_name() -> None:
    assert tasks.of("classification") is Classification
    assert tasks.NAMES == ("classification", "detection")
    assert issubclass(Classification.recipe_type, ClassificationRecipe)
    with pytest.raises(ValueError, match=r"^task: expected one of 'classification', 'detection', got 'squares'$"):
        tasks.of("squares")


def test_better_goes_the_figures_way_and_nan_is_never_better() -> None:
    for higher in (True, False):
        figure = Figure(key="k", title="t", unit="u", higher_is_better=higher)
        assert figure.is_better(2.0, 1.0) is higher
        assert figure.is_better(1.0, 2.0) is not higher
        assert not figure.is_better(1.0, 1.0)
        assert figure.is_better(-1e9, math.nan)
        assert not figure.is_better(math.nan, 1.0)
        assert not figure.is_better(math.nan, math.nan)


def test_parts_of_a_loss_are_means_over_all_images() -> None:
    """Of both micro-batches of an update, and of two processes that are not there: their sums come back doubled."""

    class Two(World):
        def sum(self, *values: float) -> list[float]:
            return [2 * value for value in values]

    task = FindSquares(Squares(8), recipe(), None)
    batches = list(training_batches(Squares(8), task.training_transform(16), batch_size=4, slots=2, epoch=0, seed=0))
    assert [len(batch.y) for batch in batches] == [4, 4]
    world = Two(0, 1, torch.device("cpu"))
    rows = [task.loss(task.model, batch, None, world.device) for batch in batches]  # type: ignore[arg-type]
    update = Update(task, torch.optim.SGD(task.model.parameters(), lr=0.0), recipe(), world)
    outcome = update(batches, 0.0, 0, stop=False)
    for name in ("left", "top"):
        assert outcome.parts[name] == pytest.approx(sum(float(row[name].detach()) for row in rows) / 2, rel=1e-6)
    assert outcome.loss == pytest.approx(sum(outcome.parts.values()), rel=1e-6)
