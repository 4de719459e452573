"""Real processes: killed, stopped, and several at once. The numbers must not tell."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from process_support import Command, Server
from safetensors.torch import load_file
from training_support import TINY, tiny, write_idx

from mobileformer.training import TrainingError, write_recipe
from mobileformer.training.log import read_log
from mobileformer.training.state import load_state

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error::RuntimeWarning"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_idx(tmp_path_factory.mktemp("idx"), images=48)
    write_recipe(tiny(), folder / "tiny.toml")
    return folder


def arguments(data: Path, output: Path, *more: str) -> list[str]:
    return ["train", str(data), "--recipe", str(data / "tiny.toml"), "--output", str(output), "--threads", "1", *more]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(ENVIRONMENT) as server:
        yield server


@pytest.fixture
def start(data: Path, server: Server) -> Callable[..., Command]:
    """A run of its own process, by its folder and further arguments."""
    return lambda output, *more: server.start(*arguments(data, output, *more))


def fresh(*command: str) -> subprocess.Popen[str]:
    """With a Python of its own, as people start it."""
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-m", *command], env=ENVIRONMENT, stdout=pipe, stderr=pipe, text=True)


def finish(process: Command | subprocess.Popen[str]) -> str:
    out, error = process.communicate(timeout=240)
    assert process.returncode == 0, error
    return out


def updates_in(checkpoint: Path, recipe: Any) -> int:
    try:
        return load_state(checkpoint, recipe)["progress"].updates
    except TrainingError:  # not there yet
        return 0


def wait_for(checkpoint: Path, updates: int, process: Command) -> None:
    deadline = time.monotonic() + 120
    recipe = tiny(epochs=2)
    while updates_in(checkpoint, recipe) < updates:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def losses(folder: Path) -> list[tuple[Any, ...]]:
    return [
        (event["update"], event.get("loss"), event.get("gradient_norm"), event.get("top1"))
        for event in read_log(folder / "log.jsonl")
        if event["kind"] in ("train", "validation")
    ]


def test_a_killed_run_ends_as_if_it_had_not_been(data: Path, start: Callable[..., Command], tmp_path: Path) -> None:
    """Bit for bit, on one thread: SIGKILL at two moments, then to the end; beside one in one go, in another Python."""
    whole = fresh("mobileformer", *arguments(data, tmp_path / "whole"))
    recipe = tiny(epochs=2)
    for updates in (2, 8):  # of 12; the sixth ends an epoch
        process = start(tmp_path / "killed", "--save-minutes", "0")
        wait_for(tmp_path / "killed" / "checkpoint.pt", updates, process)
        process.kill()
        process.communicate()
    finish(start(tmp_path / "killed"))
    finish(whole)
    for name in ("last.safetensors", "best.safetensors"):
        whole_weights, killed_weights = (load_file(tmp_path / run / name) for run in ("whole", "killed"))
        assert all(torch.equal(value, killed_weights[key]) for key, value in whole_weights.items())
    left, right = (load_state(tmp_path / name / "checkpoint.pt", recipe) for name in ("whole", "killed"))
    assert dataclasses.replace(left["progress"], seconds=0) == dataclasses.replace(right["progress"], seconds=0)
    assert str(left["optimizer"]["state"]) == str(right["optimizer"]["state"])
    # A line of the log tells the loss of an update; a killed run may have written it sooner or later, not other ones.
    assert losses(tmp_path / "killed")[-1] == losses(tmp_path / "whole")[-1]
    assert set(losses(tmp_path / "whole")) <= set(losses(tmp_path / "killed"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_stop_saves_first(
    start: Callable[..., Command], tmp_path: Path, number: signal.Signals
) -> None:
    process = start(tmp_path, "--save-minutes", "0", "--set", "epochs=2000")
    recipe = tiny(epochs=2000)
    while updates_in(tmp_path / "checkpoint.pt", recipe) < 2:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert f"stopped by {number.name}; {tmp_path / 'checkpoint.pt'} is where the same command goes on" in error
    assert updates_in(tmp_path / "checkpoint.pt", recipe) >= 2
    assert not list(tmp_path.glob(".*"))


def test_two_processes_are_as_one(data: Path, start: Callable[..., Command], tmp_path: Path) -> None:
    """The loss of every update at equal global batch, to 1e-6; dropout, mixup and erasing are on."""
    assert TINY["global_batch"] == 2 * TINY["micro_batch"]
    more = ("--set", "epochs=1", "--set", "learning_rate=1e-4")
    one = start(tmp_path / "one", *more)
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mobileformer")
    two = fresh(*launcher, *arguments(data, tmp_path / "two", *more))
    finish(one)
    finish(two)
    left, right = (
        [event for event in read_log(tmp_path / name / "log.jsonl") if event["kind"] == "train"]
        for name in ("one", "two")
    )
    assert [event["update"] for event in left] == [event["update"] for event in right] == [6]
    assert left[0]["mean_loss"] == pytest.approx(right[0]["mean_loss"], abs=1e-6)
    assert left[0]["loss"] == pytest.approx(right[0]["loss"], abs=1e-6)


def test_wrong_use_is_one_line(start: Callable[..., Command], tmp_path: Path) -> None:
    for more, message in (
        (("--set", "epoch=3"), "epoch: no such key in a recipe"),
        (("--weights", str(tmp_path / "none.safetensors")), "none.safetensors"),
        (("--set", "global_batch=4000"), "global_batch: 48 training images are fewer than the 4000 of one update"),
    ):
        process = start(tmp_path / "run", *more)
        _, error = process.communicate(timeout=60)
        assert process.returncode == 1
        assert error.startswith("error: ")
        assert message in error
        assert "Traceback" not in error
