"""One batch, and the processes that make batches."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mobileformer.data.base import DataError
from mobileformer.data.image import ImageError
from mobileformer.data.transforms import ImageTransform

__all__ = ["Batch", "LabelledImages", "Transform", "assemble", "class_of", "in_processes", "over_samples"]


@dataclass
class Batch:
    """Some samples, and what could not be one. B is the batch size less what is broken, and may be 0.

    | name | shape | dtype, unit |
    |---|---|---|
    | x | (B, C, H, W) | float32, normalised |
    | y | (B) | int64, classes; for another task than classification what its `Transform.collate` gives |
    | index | (B) | int64, positions in the source |
    | broken | | messages, each of which names its image |
    """

    x: Tensor
    y: Any
    index: Tensor
    broken: tuple[str, ...] = ()


class Transform(Protocol):
    """What becomes of a sample, (image, target), and how several become a batch.

    | name | what |
    |---|---|
    | channels | that an image of the source has to have |
    | transform(sample, generator) | a sample again, in the form that `collate` takes; the target moves with the image |
    | transform.collate(samples, most) | (x, y) of a `Batch`; samples come one by one, `most` or fewer, perhaps none |

    All that is random comes from the generator, so that a sample's augmentation depends on nothing else.
    """

    @property
    def channels(self) -> int: ...
    def __call__(self, sample: tuple[Image.Image, Any], rng: np.random.Generator, /) -> Any: ...
    def collate(self, samples: Iterable[Any], most: int, /) -> tuple[Tensor, Any]: ...


class LabelledImages:
    """The `Transform` of images with classes: an `ImageTransform` for the image, the class as it is.

    `collate` writes each image where it stays: into x (B, C, size, size) float32, beside y (B) int64.
    """

    def __init__(self, image: ImageTransform) -> None:
        self.image = image
        self.channels = image.shape[0]

    def __call__(
        self, sample: tuple[Image.Image, int], rng: np.random.Generator
    ) -> tuple[npt.NDArray[np.float32], int]:
        image, label = sample
        return self.image(image, rng), class_of(label)

    def collate(self, samples: Iterable[tuple[npt.NDArray[np.float32], int]], most: int) -> tuple[Tensor, Tensor]:
        x = np.empty((most, *self.image.shape), np.float32)
        labels: list[int] = []
        for pixels, label in samples:
            x[len(labels)] = pixels
            labels.append(label)
        return torch.from_numpy(x[: len(labels)]), torch.tensor(labels, dtype=torch.int64)


def class_of(target: Any) -> int:
    """A sample's target where that is a class. Raises DataError for another task's, which say what they have."""
    if isinstance(target, Mapping):
        raise DataError(f"the targets of these images are no classes but have {', '.join(target)}: another task's data")
    return target


def over_samples(transform: Transform | ImageTransform) -> Transform:
    """The transform; one of images alone becomes that of images with classes."""
    return transform if hasattr(transform, "collate") else LabelledImages(transform)  # type: ignore[return-value, arg-type]


def assemble(
    indices: list[int], read: Callable[[int], tuple[Image.Image, Any]], transform: Transform, key: tuple[int, int]
) -> Batch:
    """The batch of these samples. The generator for each is numpy.random.default_rng((*key, index))."""
    good: list[int] = []
    broken: list[str] = []
    entropy = np.array([*key, 0], np.uint32)  # the same generators as from a tuple, in less time

    def samples() -> Iterator[Any]:
        for index in indices:
            try:
                sample = read(index)
            except ImageError as error:
                broken.append(str(error))
                continue
            entropy[2] = index
            good.append(index)
            yield transform(sample, np.random.default_rng(entropy))

    x, y = transform.collate(samples(), len(indices))
    return Batch(x, y, torch.tensor(good, dtype=torch.int64), tuple(broken))


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
