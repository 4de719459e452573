"""One batch, and the processes that make batches."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mobileformer.data.image import ImageError
from mobileformer.data.transforms import Transform

__all__ = ["Batch", "assemble", "in_processes"]


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


def assemble(
    indices: list[int], read: Callable[[int], tuple[Image.Image, int]], transform: Transform, key: tuple[int, int]
) -> Batch:
    """The batch of these samples. The generator for each is numpy.random.default_rng((*key, index))."""
    x = np.empty((len(indices), *transform.shape), np.float32)
    labels: list[int] = []
    good: list[int] = []
    broken: list[str] = []
    entropy = np.array([*key, 0], np.uint32)  # the same generators as from a tuple, in less time
    for index in indices:
        try:
            image, label = read(index)
        except ImageError as error:
            broken.append(str(error))
            continue
        entropy[2] = index
        x[len(good)] = transform(image, np.random.default_rng(entropy))
        labels.append(label)
        good.append(index)
    return Batch(
        torch.from_numpy(x[: len(good)]),
        torch.tensor(labels, dtype=torch.int64),
        torch.tensor(good, dtype=torch.int64),
        tuple(broken),
    )


def in_processes(dataset: Dataset[Batch], sampler: Iterable[Any] | None, workers: int) -> Iterator[Batch]:
    """The data set's batches, made by processes of their own, in order.

    A server that has loaded torch and nothing else forks them. To fork the training process itself would copy its
    locks while its threads hold them; to start from nothing would load torch for each worker and epoch.
    """
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(["__main__", __name__])
    loader: DataLoader[Batch] = DataLoader(
        dataset,
        batch_size=None,
        sampler=sampler,
        num_workers=workers,
        collate_fn=_as_it_is,
        worker_init_fn=_live_with_the_trainer,
        multiprocessing_context=context,
    )
    return iter(loader)


def _as_it_is(batch: Any) -> Any:
    return batch


def _live_with_the_trainer(worker: int) -> None:
    """Ends with the trainer and not before. Torch's own watchdog sees who forked, and that is the server."""
    # Ctrl-C reaches every process of the terminal, and the trainer decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_trainer, daemon=True).start()


def _end_with_the_trainer() -> None:
    trainer = multiprocessing.parent_process()
    assert trainer is not None  # this runs in a worker
    trainer.join()
    os._exit(1)
