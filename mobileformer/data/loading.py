"""Batches for training and evaluation, the same whoever loads them: any number of workers, processes and restarts.

One permutation of the whole set belongs to (seed, epoch). A step, which is one update of the weights, takes
`slots * batch_size` samples of it: slot s of step t is

    permutation[(t * slots + s) * batch_size : (t * slots + s + 1) * batch_size].

Of a source that knows the `aspects` of its images, upright images (width / height below 1) and broad ones fill batches
of their own, in the order of the permutation: a batch takes its place when its last image does. What is left of both in
the end, less than a batch of each, is put together, so that there are as many batches as without.

What is left for an incomplete step is not used in that epoch. A process takes the slots rank, rank + world, ... of
every step, so that two processes see the micro-batches that one with two slots sees. Each random decision about a
sample comes from `numpy.random.default_rng((seed, epoch, index))`.

Shards have no positions that could be permuted: streaming.py says what holds for them.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from mobileformer.data.base import DataError, Source
from mobileformer.data.batch import Batch, Transform, assemble, in_processes, over_samples
from mobileformer.data.shards import ShardSource
from mobileformer.data.streaming import EvaluationStream, TrainingStream
from mobileformer.data.transforms import ImageTransform

__all__ = ["Batch", "evaluation_batches", "steps_per_epoch", "training_batches"]


def steps_per_epoch(source: Source | ShardSource, *, batch_size: int, slots: int) -> int:
    """Updates of the weights in one epoch: floor(samples / (slots * batch_size)).

    Raises DataError where the set has not enough samples for one.
    """
    samples = len(source)
    steps = samples // (slots * batch_size)
    if not steps:
        raise DataError(f"{samples} samples are too few: one step takes {slots} x {batch_size}")
    return steps


def training_batches(
    source: Source | ShardSource,
    transform: ImageTransform | Transform,
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
        transform: usually a `TrainTransform`; for targets that are no classes, a `Transform` of whole samples
            (mobileformer.data.batch).
        batch_size: samples of one batch.
        slots: batches of one step over all processes, a multiple of `world`.
        epoch, seed: 0 to 2^32 - 1. They and the sample's index decide everything that is random.
        start: steps of this epoch already done. Nothing is read for them (of shards: read, but not decoded).
        rank, world: which process of how many this is.
        workers: processes that load; 0 loads in this one, when the next batch is asked for. Others are started by
            "forkserver": source and transform are pickled, and a script needs `if __name__ == "__main__"`.

    Raises:
        ValueError: a number is out of range, by name, or the transform is for another number of channels.
        DataError: fewer samples than one step takes.
        Whatever but `ImageError` the source raises.
    """
    transform = over_samples(transform)
    _check(source, transform, batch_size=batch_size, rank=rank, world=world, workers=workers)
    if slots < 1 or slots % world:
        raise ValueError(f"slots: expected a multiple of the {world} processes, got {slots}")
    if not (0 <= epoch < 2**32 and 0 <= seed < 2**32):
        raise ValueError(f"epoch and seed: expected 0 to 2^32 - 1, got {epoch} and {seed}")
    steps = steps_per_epoch(source, batch_size=batch_size, slots=slots)
    if not 0 <= start <= steps:
        raise ValueError(f"start: expected 0 to {steps} steps, got {start}")
    if isinstance(source, ShardSource):
        stream = TrainingStream(
            source, transform, batch_size=batch_size, slots=slots, steps=steps, start=start, key=(seed, epoch),
            rank=rank, world=world,
        )  # fmt: skip
        return in_processes(stream, None, workers) if workers else iter(stream)
    # The fourth number keeps this generator apart from every sample's.
    order = np.random.default_rng((seed, epoch, 0, 1)).permutation(len(source))
    aspects = getattr(source, "aspects", None)
    if aspects is not None:
        order = _alike(order, np.asarray(aspects) < 1, batch_size)
    micro_batches = order[: steps * slots * batch_size].reshape(steps, slots, batch_size)
    mine = micro_batches[start:, rank::world].reshape(-1, batch_size)
    return _indexed(_Indexed(source, transform, (seed, epoch)), list(mine), workers)


def evaluation_batches(
    source: Source | ShardSource,
    transform: ImageTransform | Transform,
    *,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
) -> Iterator[Batch]:
    """Every sample once over all processes. Without shards: in order, each process a part of the set.

    Batches may be smaller than `batch_size`, and processes may get different numbers of them.

    Raises:
        ValueError: a number is out of range, by name, or the transform is for another number of channels.
        Whatever but `ImageError` the source raises.
    """
    transform = over_samples(transform)
    _check(source, transform, batch_size=batch_size, rank=rank, world=world, workers=workers)
    if isinstance(source, ShardSource):
        stream = EvaluationStream(source, transform, batch_size=batch_size, rank=rank, world=world)
        return in_processes(stream, None, workers) if workers else iter(stream)
    samples = len(source)
    mine = np.arange(samples * rank // world, samples * (rank + 1) // world)
    parts = [mine[begin : begin + batch_size] for begin in range(0, len(mine), batch_size)]
    return _indexed(_Indexed(source, transform, (0, 0)), parts, workers)


def _alike(order: npt.NDArray[np.int64], upright: npt.NDArray[np.bool_], batch_size: int) -> npt.NDArray[np.int64]:
    """The permutation again, moved so that each `batch_size` of it are alike, but for one batch at the end."""
    groups = [np.flatnonzero(upright[order] == which) for which in (False, True)]  # places in the permutation
    whole = [len(group) // batch_size * batch_size for group in groups]
    batches = np.concatenate([group[:end].reshape(-1, batch_size) for group, end in zip(groups, whole, strict=True)])
    left = np.sort(np.concatenate([group[end:] for group, end in zip(groups, whole, strict=True)]))
    batches = batches[batches[:, -1].argsort()] if len(batches) else batches
    return order[np.concatenate([batches.ravel(), left])]


class _Indexed(Dataset[Batch]):
    """The indices of a batch -> the batch. What a worker process holds."""

    def __init__(self, source: Source, transform: Transform, key: tuple[int, int]) -> None:
        self.source, self.transform, self.key = source, transform, key

    def __getitem__(self, indices: npt.NDArray[np.int64]) -> Batch:
        return assemble(indices.tolist(), self.source.__getitem__, self.transform, self.key)


def _indexed(dataset: _Indexed, parts: list[npt.NDArray[np.int64]], workers: int) -> Iterator[Batch]:
    return in_processes(dataset, parts, workers) if workers else map(dataset.__getitem__, parts)


def _check(
    source: Source | ShardSource, transform: Transform, *, batch_size: int, rank: int, world: int, workers: int
) -> None:
    if transform.channels != source.channels:
        raise ValueError(f"transform: its result has {transform.channels} channels, the images have {source.channels}")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    if not 0 <= rank < world:
        raise ValueError(f"rank: expected 0 to {world - 1} of {world} processes, got {rank}")
    if workers < 0:
        raise ValueError(f"workers: expected 0 or more, got {workers}")
