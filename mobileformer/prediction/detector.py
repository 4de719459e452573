"""Images through a detector in a stream: decoded ahead on threads, answered in order, in bounded memory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from mobileformer.config import MIN_SIZE
from mobileformer.data.image import ImageError
from mobileformer.inference.threads import check_threads, thread_count
from mobileformer.prediction.found import Found, found_in
from mobileformer.prediction.network import on_device
from mobileformer.prediction.stream import groups
from mobileformer.prediction.view import ImageLike, Picture, named_pictures, normalisation, opened, pictures_in

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DetectionPredictor"]

SHORT_SIDE, LONGEST = 800, 1333  # COCO's, where the file says nothing


@dataclass(frozen=True, slots=True)
class _Loaded:
    """`sample`: what `BoxTransform.collate` takes. `image` is kept for who draws on it."""

    name: str
    size: tuple[int, int]
    sample: Any
    image: Image.Image | None


class DetectionPredictor:
    """A detector's weights, ready to answer: `for found in DetectionPredictor(path)(images)`.

    ===========  ==============================================================================================
    argument     meaning
    ===========  ==============================================================================================
    weights      what `mobileformer.weights.detectors.save_detector` wrote
    size         short side that an image is resized to, in pixels; None is what the file says, else 800. The
                 long side has at most 1333, or 5/3 of a larger `size`
    labels       one name a class, in place of the file's own
    threshold    boxes with a lower score are no answer; RetinaNet itself tells none below the one of its file,
                 0.05 as trained here
    device       as PyTorch names it
    threads      of the network on the CPU; None is PyTorch's count
    workers      threads that read images ahead of the network; 0 reads when the network has time
    batch        images in one call of the network
    keep_images  whether an answer has the picture with it
    ===========  ==============================================================================================

    A call takes what `mobileformer.prediction.Predictor` takes and gives an iterator of `Found`s in the same order,
    reading no further ahead than that does. The network sees the whole image: resized as `BoxTransform.for_evaluation`
    does it, normalised as the file says. An image that cannot be used is an answer with `error`. Images of one size run
    together, so another `batch` may round differently.

    One predictor may answer several callers at a time, each in a thread of its own.

    Raises OSError and WeightsError for a file that cannot be used, ValueError for an argument out of range, DeviceError
    (a RuntimeError) for a device that is not there.
    """

    def __init__(
        self,
        weights: str | os.PathLike[str],
        *,
        size: int | None = None,
        labels: Sequence[str] | None = None,
        threshold: float = 0.5,
        device: str = "cpu",
        threads: int | None = None,
        workers: int = 0,
        batch: int = 4,
        keep_images: bool = False,
    ) -> None:
        from mobileformer.data.box_transforms import MAX_SIDE, BoxTransform
        from mobileformer.weights.detectors import load_detector, read_detector_metadata

        for name, value, least in (("workers", workers, 0), ("batch", batch, 1), ("size", size or MIN_SIZE, MIN_SIZE)):
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold: expected a number in [0, 1], got {threshold!r}")
        if threads is not None:
            check_threads(threads, ", or None")
        self.metadata = read_detector_metadata(weights)
        mean, std = normalisation(self.metadata, os.fspath(weights))
        self.labels: Sequence[str] | None = self.metadata.labels if labels is None else labels
        if self.labels is not None and len(self.labels) != self.metadata.num_classes:
            raise ValueError(
                f"labels: expected {self.metadata.num_classes} names, one for each class, got {len(self.labels)}"
            )
        self.size = size or self.metadata.input_size or SHORT_SIDE
        self.transform = BoxTransform.for_evaluation(
            mean,
            std,
            short_side=self.size,
            longest=LONGEST if size is None else min(MAX_SIDE, max(LONGEST, size * 5 // 3)),
        )
        self.model = on_device(load_detector(weights), device)
        self.threshold, self.device, self.threads = threshold, device, threads
        self.workers, self.batch, self.keep_images = workers, batch, keep_images

    @property
    def detector(self) -> str:
        """ "retinanet" or "end-to-end"."""
        return str((self.metadata.arguments or {})["detector"])

    @property
    def names(self) -> list[str]:
        """A name for every class, "class N" where there are none."""
        return list(self.labels or (f"class {index}" for index in range(self.metadata.num_classes)))

    def __call__(self, images: ImageLike | Picture | Iterable[ImageLike | Picture]) -> Iterator[Found]:
        """images -> their answers, in order, as they come. Raises as `Predictor.__call__`."""
        for group in groups(self._load, named_pictures(images), self.workers, self.batch):
            good = [loaded for loaded in group if isinstance(loaded, _Loaded)]
            answers = iter(self._answers(good))
            for loaded in group:
                yield loaded if isinstance(loaded, Found) else next(answers)

    def files(self, arguments: Sequence[str | os.PathLike[str]]) -> Iterator[Found]:
        """The answers to every image that files, folders and patterns stand for."""
        return self(pictures_in(arguments))

    def find(self, x: Tensor, sizes: Tensor) -> list[dict[str, Tensor]]:
        """What the network says of a batch, on the CPU, nothing left out.

        x (B,C,H,W) and sizes (B,2) as `BoxTransform.collate` gives them -> boxes (n,4) in pixels of x, labels, scores.
        """
        import torch

        with torch.inference_mode(), self.computing():
            found = self.model(x.to(self.device), None, sizes)
        return [{key: value.cpu() for key, value in answer.items()} for answer in found]

    def computing(self) -> Any:
        """A context in which PyTorch has the threads that were asked for."""
        return nullcontext() if self.threads is None else thread_count(self.threads)

    def __repr__(self) -> str:
        return f"DetectionPredictor({self.detector}, {self.metadata.variant}, {self.device})"

    def prepare(self, image: ImageLike, name: str = "image") -> tuple[Image.Image, Any]:
        """An image upright and opaque, and the sample of `BoxTransform.collate` that is made of it.

        Raises ImageError for one that cannot be used, or would be narrower than the network takes.
        """
        picture = opened(image, self.transform.channels, name)
        target = {"boxes": np.zeros((0, 4), np.float32), "labels": np.zeros(0, np.int64), "image_id": 0}
        sample = self.transform((picture, target), np.random.default_rng(0))  # of which nothing is drawn
        height, width = sample.pixels.shape[1:]
        if min(height, width) < MIN_SIZE:
            raise ImageError(
                f"{name}: {picture.width} x {picture.height} pixels become {width} x {height} for the network, which "
                f"takes no side below {MIN_SIZE}"
            )
        return picture, sample

    def _load(self, picture: Picture) -> _Loaded | Found:
        """On the worker threads, where there are any."""
        if picture.image is None:
            return Found(picture.name, error=picture.problem or f"{picture.name}: no image")
        try:
            image, sample = self.prepare(picture.image, picture.name)
        except ImageError as error:
            return Found(picture.name, error=str(error))
        return _Loaded(picture.name, image.size, sample, image if self.keep_images else None)

    def _answers(self, group: list[_Loaded]) -> list[Found]:
        """The answers to what was loaded, with the network called once."""
        if not group:
            return []
        x, y = self.transform.collate((loaded.sample for loaded in group), len(group))
        try:
            answers = self.find(x, y.sizes)
        except ValueError as error:  # what RetinaNet raises where a score is not finite, whichever image it is of
            if len(group) > 1:
                return [found for loaded in group for found in self._answers([loaded])]
            return [Found(group[0].name, error=f"{group[0].name}: {error}")]
        return [
            found_in(
                loaded.name,
                loaded.image,
                loaded.size,
                {**answer, "boxes": y.in_original(answer["boxes"], place)},
                labels=self.labels,
                threshold=self.threshold,
            )
            for place, (loaded, answer) in enumerate(zip(group, answers, strict=True))
        ]
