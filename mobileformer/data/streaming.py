"""Batches from shards, which are read from the front.

Training: each process has as many streams as workers, and each stream is decided by (seed, epoch, rank, worker). So
the samples of an epoch are the same every time for the same numbers of processes and workers, and others for others;
some come several times in an epoch, and some not at all. A step and its slots are as in loading.py. A sample's index
is its position in the epoch's steps, ((t * slots + s) * batch_size + i).

To go on at step `start`, each stream reads over the samples that it gave before, without decoding them: about as long
as the disk needs for that part of the epoch, a tenth of what training on it took or less.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from torch.utils.data import IterableDataset, get_worker_info

from mobileformer.data.batch import Batch, Transform, assemble
from mobileformer.data.shards import Encoded, ShardSource

__all__ = ["EvaluationStream", "TrainingStream"]


class TrainingStream(IterableDataset[Batch]):
    """One process's batches of an epoch; in a worker of torch's DataLoader, every so many of them."""

    def __init__(
        self, source: ShardSource, transform: Transform, *, batch_size: int, slots: int, steps: int, start: int,
        key: tuple[int, int], rank: int, world: int,
    ) -> None:  # fmt: skip
        self.source, self.transform, self.key = source, transform, key
        self.batch_size, self.slots, self.rank, self.world = batch_size, slots, rank, world
        share = slots // world
        self.batches = range(start * share, steps * share)

    def __iter__(self) -> Iterator[Batch]:
        worker, workers = _worker()
        mine = self.batches[worker::workers]
        if not mine:
            return
        # Batch b is from stream b % workers, whichever worker asks: the first to be asked is number 0, at any start.
        stream = mine[0] % workers
        samples = self.source.stream((*self.key, self.rank, stream))
        given = len(range(stream, mine[0], workers)) * self.batch_size
        next(islice(samples, given, given), None)
        for batch in mine:
            step, slot = divmod(batch, self.slots // self.world)
            first = (step * self.slots + self.rank + slot * self.world) * self.batch_size
            yield _assemble(self.source, list(islice(samples, self.batch_size)), first, self.transform, self.key)


class EvaluationStream(IterableDataset[Batch]):
    """Every sample of one process's shards once. Index: position in the split, shard after shard."""

    def __init__(self, source: ShardSource, transform: Transform, *, batch_size: int, rank: int, world: int) -> None:
        self.source, self.transform, self.batch_size = source, transform, batch_size
        first = 0
        self.shards: list[tuple[int, int]] = []
        for number, length in enumerate(source.lengths):
            self.shards.append((number, first))
            first += length
        self.shards = self.shards[rank::world]

    def __iter__(self) -> Iterator[Batch]:
        worker, workers = _worker()
        for number, first in self.shards[worker::workers]:
            samples = self.source.once(number)
            while part := list(islice(samples, self.batch_size)):
                yield _assemble(self.source, part, first, self.transform, (0, 0))
                first += len(part)


def _assemble(
    source: ShardSource, samples: list[Encoded], first: int, transform: Transform, key: tuple[int, int]
) -> Batch:
    indices = list(range(first, first + len(samples)))
    return assemble(indices, lambda index: source.decode(samples[index - first]), transform, key)


def _worker() -> tuple[int, int]:
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)
