"""Batches are the same for any number of workers and processes and after any restart; what is broken is named."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_support import Numbers
from PIL import Image

from mobileformer.data import (
    ArraySource,
    Batch,
    DataError,
    EvaluationTransform,
    TrainTransform,
    evaluation_batches,
    steps_per_epoch,
    training_batches,
)
from mobileformer.data.sources import some_images

TRAINING = TrainTransform(6, [0.0], [1.0], crop="shift", shift=1, erase=0.5)
WHOLE = EvaluationTransform(4, [0.0], [1.0], crop_fraction=1.0)


def equal(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a.x, b.x) and torch.equal(a.y, b.y) and torch.equal(a.index, b.index) and a.broken == b.broken
        for a, b in zip(one, other, strict=True)
    )


def epoch(source: object, **options: object) -> list[Batch]:
    given = {"batch_size": 4, "slots": 2, "epoch": 0, "seed": 5, **options}
    return list(training_batches(source, TRAINING, **given))  # type: ignore[arg-type]


def test_batches_follow_the_permutation() -> None:
    batches = epoch(Numbers(50))
    assert steps_per_epoch(Numbers(50), batch_size=4, slots=2) == 6
    assert len(batches) == 12
    order = np.random.default_rng((5, 0, 0, 1)).permutation(50)
    assert torch.cat([batch.index for batch in batches]).tolist() == order[:48].tolist()
    for batch in batches:
        assert (batch.x.shape, batch.x.dtype) == ((4, 1, 6, 6), torch.float32)
        assert (batch.y.dtype, batch.index.dtype, batch.broken) == (torch.int64, torch.int64, ())
        assert torch.equal(batch.y, batch.index % 10)


def test_a_sample_depends_on_seed_epoch_and_index_alone() -> None:
    source = Numbers(50)
    few, many = epoch(source), epoch(source, batch_size=3, slots=1)

    def pictures(batches: list[Batch]) -> dict[int, bytes]:
        return {
            int(index): x.numpy().tobytes() for batch in batches for x, index in zip(batch.x, batch.index, strict=True)
        }

    one, other = pictures(few), pictures(many)
    shared = one.keys() & other.keys()
    assert len(shared) >= 45
    assert all(one[index] == other[index] for index in shared)
    for index in sorted(shared)[:5]:
        rng = np.random.default_rng((5, 0, index))
        assert TRAINING(source[index][0], rng).tobytes() == one[index]


def test_epochs_and_seeds_differ() -> None:
    orders = [
        torch.cat([batch.index for batch in epoch(Numbers(50), epoch=number, seed=seed)]).tolist()
        for number, seed in ((0, 5), (1, 5), (0, 6))
    ]
    assert len(set(map(tuple, orders))) == 3


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_the_slots_of_one(world: int) -> None:
    alone = epoch(Numbers(70), slots=4)
    ranks = [epoch(Numbers(70), slots=4, rank=rank, world=world) for rank in range(world)]
    share = 4 // world
    together = [
        ranks[slot % world][step * share + slot // world] for step in range(len(alone) // 4) for slot in range(4)
    ]
    assert equal(alone, together)


@pytest.mark.parametrize("start", [0, 1, 5, 6])
def test_a_restart_goes_on(start: int) -> None:
    assert equal(epoch(Numbers(50), start=start), epoch(Numbers(50))[2 * start :])


def test_broken_images_are_left_out_and_named() -> None:
    whole = epoch(Numbers(50))
    first = whole[0].index.tolist()
    batches = epoch(Numbers(50, broken=frozenset([first[1], first[2]])))
    assert batches[0].broken == tuple(f"image {index}: broken" for index in first[1:3])
    assert batches[0].index.tolist() == [first[0], first[3]]
    assert torch.equal(batches[0].x, whole[0].x[[0, 3]])
    assert batches[0].y.tolist() == [first[0] % 10, first[3] % 10]
    assert equal(batches[1:], whole[1:])


def test_a_batch_of_broken_images_is_empty() -> None:
    batches = epoch(Numbers(8, broken=frozenset(range(8))))
    assert [batch.x.shape for batch in batches] == [(0, 1, 6, 6)] * 2
    assert [len(batch.broken) for batch in batches] == [4, 4]
    assert (batches[0].y.dtype, batches[0].y.shape) == (torch.int64, (0,))


class Spread:
    """A transform of whole samples: a target is a list as long as the class says, and random like the image."""

    channels = 1

    def __call__(self, sample: tuple[Image.Image, int], rng: np.random.Generator) -> tuple[float, list[float]]:
        image, label = sample
        noise = rng.random()
        return float(np.asarray(image)[0, 0]) + noise, [noise] * label

    def collate(self, samples: Iterable[tuple[float, list[float]]], most: int) -> tuple[torch.Tensor, Any]:
        given = list(samples)
        return torch.tensor([value for value, _ in given]), {"lists": [target for _, target in given], "most": most}


def test_sample_and_target_travel_together() -> None:
    source = Numbers(50, broken=frozenset([7, 20]))
    options = {"batch_size": 4, "slots": 2, "epoch": 0, "seed": 5}
    batches = list(training_batches(source, Spread(), **options))
    labelled = epoch(source)
    assert [batch.index.tolist() for batch in batches] == [batch.index.tolist() for batch in labelled]
    assert [batch.broken for batch in batches] == [batch.broken for batch in labelled]
    assert any(batch.broken for batch in batches)
    for batch in batches:
        assert batch.y["most"] == 4
        for value, target, index in zip(batch.x.tolist(), batch.y["lists"], batch.index.tolist(), strict=True):
            noise = np.random.default_rng((5, 0, index)).random()
            assert target == [noise] * (index % 10)
            assert value == pytest.approx(index + noise, abs=1e-5)
    again = list(training_batches(source, Spread(), **options, workers=1))
    assert all(torch.equal(a.x, b.x) and a.y == b.y for a, b in zip(batches, again, strict=True))
    whole = list(evaluation_batches(source, Spread(), batch_size=20))
    assert [len(batch.y["lists"]) for batch in whole] == [19, 19, 10]
    with pytest.raises(ValueError, match="transform: its result has 1 channels, the images have 3"):
        evaluation_batches(ArraySource(np.zeros((4, 4, 4, 3), np.uint8), [0] * 4, ("a",)), Spread(), batch_size=2)


def test_other_errors_are_not_swallowed() -> None:
    class Faulty(Numbers):
        def __getitem__(self, index: int) -> tuple[object, int]:
            raise DataError(f"image {index}: another shape")

    with pytest.raises(DataError, match="another shape"):
        next(iter(training_batches(Faulty(8), TRAINING, batch_size=4, slots=1, epoch=0, seed=0)))


def test_workers_change_nothing() -> None:
    source = Numbers(50, broken=frozenset([7]))
    assert equal(epoch(source, workers=2, start=1), epoch(source, start=1))
    options = {"batch_size": 8, "rank": 1, "world": 2}
    here = list(evaluation_batches(source, WHOLE, **options))
    assert equal(list(evaluation_batches(source, WHOLE, workers=1, **options)), here)


class Asking(Numbers):
    """The label tells whether the process that loads ignores Ctrl-C."""

    def __getitem__(self, index: int) -> tuple[object, int]:
        return super().__getitem__(index)[0], int(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)


def test_workers_ignore_the_terminal() -> None:
    (batch,) = evaluation_batches(Asking(3), WHOLE, batch_size=3, workers=1)
    assert batch.y.tolist() == [1, 1, 1]


KILLED = """
import multiprocessing, os, signal
from data_support import Numbers
from mobileformer.data import EvaluationTransform, evaluation_batches

if __name__ == "__main__":
    whole = EvaluationTransform(4, [0.0], [1.0], crop_fraction=1.0)
    batches = evaluation_batches(Numbers(10000), whole, batch_size=3, workers=2)
    next(batches)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_a_process_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    with (tmp_path / "out").open("w+") as out:  # no pipe: the workers would hold it open
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run([sys.executable, script], stdout=out, stderr=subprocess.DEVNULL, env=environment)
        out.seek(0)
        workers = [int(number) for number in out.read().split()]
    assert done.returncode == -signal.SIGKILL
    assert len(workers) == 2
    deadline = time.monotonic() + 60
    while any(map(running, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(running, workers))


def running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"  # ended, and not yet waited for


def test_evaluation_reads_everything_once_in_order() -> None:
    source = Numbers(53, broken=frozenset([20]))
    for batch_size in (1, 7, 100):
        batches = list(evaluation_batches(source, WHOLE, batch_size=batch_size))
        assert torch.cat([batch.index for batch in batches]).tolist() == [k for k in range(53) if k != 20]
        pixels = torch.cat([batch.x for batch in batches])[:, 0, 0, 0]
        assert torch.equal((pixels * 255).round().long(), torch.cat([batch.index for batch in batches]))
        assert [message for batch in batches for message in batch.broken] == ["image 20: broken"]


@pytest.mark.parametrize(("length", "world"), [(53, 4), (3, 5), (0, 2)])
def test_evaluation_is_shared_without_overlap(length: int, world: int) -> None:
    parts = [
        [index for batch in evaluation_batches(Numbers(length), WHOLE, batch_size=7, rank=rank, world=world)
         for index in batch.index.tolist()]
        for rank in range(world)
    ]  # fmt: skip
    assert sorted(chain(*parts)) == list(range(length))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_some_images_are_spread_over_the_set() -> None:
    images = some_images(Numbers(101, broken=frozenset([50])), 5)
    assert [image.getpixel((0, 0)) for image in images] == [0, 25, 75, 100]
    assert len(list(some_images(Numbers(3), 5))) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"slots": 3, "world": 2}, "slots: expected a multiple of the 2 processes, got 3"),
        ({"slots": 0}, "slots: expected a multiple"),
        ({"rank": 2, "world": 2}, "rank: expected 0 to 1 of 2 processes, got 2"),
        ({"workers": -1}, "workers: expected 0 or more"),
        ({"epoch": -1}, "epoch and seed: expected 0 to 2.32 - 1, got -1 and 5"),
        ({"seed": 2**32}, "epoch and seed: expected"),
        ({"start": 7}, "start: expected 0 to 6 steps, got 7"),
        ({"batch_size": 26}, "50 samples are too few: one step takes 2 x 26"),
    ],
)
def test_training_batches_refuses(options: dict[str, int], message: str) -> None:
    given = {"batch_size": 4, "slots": 2, "epoch": 0, "seed": 5, **options}
    with pytest.raises(ValueError, match=message):
        training_batches(Numbers(50), TRAINING, **given)  # before the first batch is asked for


def test_channels_of_images_and_transform_have_to_agree() -> None:
    colour = ArraySource(np.zeros((4, 4, 4, 3), np.uint8), [0] * 4, ("a",))
    for batches in (training_batches, evaluation_batches):
        options = {"slots": 1, "epoch": 0, "seed": 0} if batches is training_batches else {}
        with pytest.raises(ValueError, match="transform: its result has 1 channels, the images have 3"):
            batches(colour, WHOLE, batch_size=2, **options)
