"""Batches for training and evaluation, the same whoever loads them: any number of workers, processes and restarts.

One permutation of the whole set belongs to (seed, epoch). A step, which is one update of the weights, takes
`slots * batch_size` samples of it: slot s of step t is

    permutation[(t * slots + s) * batch_size : (t * slots + s + 1) * batch_size].

What is left for an incomplete step is not used in that epoch. A process takes the slots rank, rank + world, ... of
every step, so that two processes see the micro-batches that one with two slots sees. Each random decision about a
sample comes from `numpy.random.default_rng((seed, epoch, index))`.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mobileformer.data.base import DataError, Source
from mobileformer.data.image import ImageError
from mobileformer.data.transforms import Transform

__all__ = ["Batch", "evaluation_batches", "steps_per_epoch", "training_batches"]

Indices = npt.NDArray[np.int64]


@dataclass
class Batch:
    """Some samples, and what could not be one. B is the batch size less what is broken, and may be 0.

    | name | shape | dtype, unit |
    |---|---|---|
    | x | (B, C, H, W) | float32, normalised |
    | y | (B) | int64, classes |
    | index | (B) | int64, positions in the source |
    | broken | | messages, each of which names its image |
    """

    x: Tensor
    y: Tensor
    index: Tensor
    broken: tuple[str, ...] = ()


def steps_per_epoch(source: Source, *, batch_size: int, slots: int) -> int:
    """Updates of the weights in one epoch: floor(samples / (slots * batch_size)).

    Raises DataError where the set has not enough samples for one.
    """
    samples = len(source)
    steps = samples // (slots * batch_size)
    if not steps:
        raise DataError(f"{samples} samples are too few: one step takes {slots} x {batch_size}")
    return steps


def training_batches(
    source: Source,
    transform: Transform,
    *,
    batch_size: int,
    slots: int,
    epoch: int,
    seed: int,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
) -> Iterator[Batch]:
    """The batches of one epoch for one process; the module's text says which samples are in which.

    Args:
        source: the training images.
        transform: usually a `TrainTransform`.
        batch_size: samples of one batch.
        slots: batches of one step over all processes, a multiple of `world`.
        epoch, seed: 0 or more. They and the sample's index decide everything that is random.
        start: steps of this epoch already done. Nothing is read for them.
        rank, world: which process of how many this is.
        workers: processes that load; 0 loads in this one, when the next batch is asked for. Others are started by
            "forkserver": source and transform are pickled, and a script needs `if __name__ == "__main__"`.

    Raises:
        ValueError: a number is out of range, by name.
        DataError: fewer samples than one step takes.
        Whatever but `ImageError` the source raises.
    """
    _check(batch_size=batch_size, rank=rank, world=world, workers=workers)
    if slots < 1 or slots % world:
        raise ValueError(f"slots: expected a multiple of the {world} processes, got {slots}")
    if epoch < 0 or seed < 0:
        raise ValueError(f"epoch and seed: expected 0 or more, got {epoch} and {seed}")
    steps = steps_per_epoch(source, batch_size=batch_size, slots=slots)
    if not 0 <= start <= steps:
        raise ValueError(f"start: expected 0 to {steps} steps, got {start}")
    # The fourth number keeps this generator apart from every sample's.
    order = np.random.default_rng((seed, epoch, 0, 1)).permutation(len(source))
    micro_batches = order[: steps * slots * batch_size].reshape(steps, slots, batch_size)
    mine = micro_batches[start:, rank::world].reshape(-1, batch_size)
    return _load(_Loader(source, transform, (seed, epoch)), list(mine), workers)


def evaluation_batches(
    source: Source, transform: Transform, *, batch_size: int, rank: int = 0, world: int = 1, workers: int = 0
) -> Iterator[Batch]:
    """Every sample once, in order. Each of several processes gets its part, in all of which lie no two the same.

    The last batch may be smaller. Parts differ in length by one sample at most, so processes may differ in their
    number of batches.

    Raises:
        ValueError: a number is out of range, by name.
        Whatever but `ImageError` the source raises.
    """
    _check(batch_size=batch_size, rank=rank, world=world, workers=workers)
    samples = len(source)
    mine = np.arange(samples * rank // world, samples * (rank + 1) // world)
    parts = [mine[begin : begin + batch_size] for begin in range(0, len(mine), batch_size)]
    return _load(_Loader(source, transform, (0, 0)), parts, workers)


class _Loader(Dataset[Batch]):
    """Indices of one batch -> the batch. What a worker process holds."""

    def __init__(self, source: Source, transform: Transform, key: tuple[int, int]) -> None:
        self.source, self.transform, self.key = source, transform, key

    def __getitem__(self, indices: Indices) -> Batch:
        x = np.empty((len(indices), *self.transform.shape), np.float32)
        labels: list[int] = []
        good: list[int] = []
        broken: list[str] = []
        for index in indices.tolist():
            try:
                image, label = self.source[index]
            except ImageError as error:
                broken.append(str(error))
                continue
            x[len(good)] = self.transform(image, np.random.default_rng((*self.key, index)))
            labels.append(label)
            good.append(index)
        return Batch(
            torch.from_numpy(x[: len(good)]),
            torch.tensor(labels, dtype=torch.int64),
            torch.tensor(good, dtype=torch.int64),
            tuple(broken),
        )


def _load(loader: _Loader, parts: Sequence[Indices], workers: int) -> Iterator[Batch]:
    if not workers:
        return map(loader.__getitem__, parts)
    return iter(DataLoader(loader, sampler=parts, batch_size=None, **worker_options(workers)))  # type: ignore[arg-type]


def worker_options(workers: int) -> dict[str, object]:
    """What torch's DataLoader is told about processes: how they start, and that the trainer's signals are not theirs.

    A server that has loaded torch and nothing else forks them. Forking the training process itself would copy its
    locks while its threads hold them; starting anew would load torch for every worker and epoch.
    """
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload(["__main__", __name__])
    return {
        "num_workers": workers,
        "collate_fn": _as_it_is,
        "worker_init_fn": _ignore_interrupts,
        "multiprocessing_context": context,
    }


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _ignore_interrupts(_: int) -> None:
    # Ctrl-C reaches every process of the terminal. The trainer decides what it means; workers end with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _check(*, batch_size: int, rank: int, world: int, workers: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    if not 0 <= rank < world:
        raise ValueError(f"rank: expected 0 to {world - 1} of {world} processes, got {rank}")
    if workers < 0:
        raise ValueError(f"workers: expected 0 or more, got {workers}")
