"""Images through a network in a stream: decoded ahead on threads, answered in order, in bounded memory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from mobileformer.data.image import ImageError
from mobileformer.files.metadata import Metadata
from mobileformer.prediction.answers import Answer, answer_to
from mobileformer.prediction.network import Network, Path, Precision, open_network
from mobileformer.prediction.stream import groups
from mobileformer.prediction.view import ImageLike, InputView, Picture, input_view, named_pictures, pictures_in

__all__ = ["Predictor"]

Loaded = np.ndarray | ImageError


class Predictor:
    """Weights, ready to answer: `for answer in Predictor(path)(images)`.

    =========  =================================================================================================
    argument   meaning
    =========  =================================================================================================
    weights    our safetensors, a published checkpoint, or a file folded for the engine
    size       side of the square that the network sees, in pixels; None is what the file says, else 224
    labels     one name a class, in place of the file's own
    top_k      classes of an answer
    path       what computes: "engine", the inference engine on the CPU; "fused", PyTorch with the fused operators;
               "plain", PyTorch alone. None is the engine on the CPU, with a warning fused where it is not there,
               and fused on another device. A folded file is for the engine alone.
    device     as PyTorch names it
    precision  "float32"; or "bfloat16", of the engine's matrix products, or of the network on a GPU
    threads    of the network on the CPU; None is PyTorch's count
    workers    threads that read images ahead of the network; 0 reads when the network has time
    batch      images in one call of the network
    =========  =================================================================================================

    A call takes paths, Pillow images, uint8 arrays (H,W) or (H,W,3) of any size, and `Picture`s, one or an iterable of
    them, and gives an iterator of `Answer`s in the same order. It reads no further ahead than one batch and two images
    for each worker, so that there may be any number of images, and an answer is there as soon as its batch is. An image
    that cannot be used is an answer with `error`. `workers` change no bit, nor do `threads` of the engine; PyTorch's
    own matrix products, and another `batch`, may round differently.

    One predictor may answer several callers at a time, each in a thread of its own.

    Raises OSError and WeightsError for a file that cannot be used, ValueError for an argument out of range,
    `PrecisionError` (a ValueError), `DeviceError` and `EngineError` (both RuntimeError) for what cannot be computed
    that way or here.
    """

    def __init__(
        self,
        weights: str | os.PathLike[str],
        *,
        size: int | None = None,
        labels: Sequence[str] | None = None,
        top_k: int = 5,
        path: Path | None = None,
        device: str = "cpu",
        precision: Precision = "float32",
        threads: int | None = None,
        workers: int = 0,
        batch: int = 16,
    ) -> None:
        for name, value, least in (("top_k", top_k, 1), ("workers", workers, 0), ("batch", batch, 1)):
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        self.network: Network = open_network(weights, path=path, device=device, precision=precision, threads=threads)
        self.view: InputView = input_view(self.metadata, os.fspath(weights), size)
        self.labels: Sequence[str] | None = self.metadata.labels if labels is None else labels
        if self.labels is not None and len(self.labels) != self.metadata.num_classes:
            raise ValueError(
                f"labels: expected {self.metadata.num_classes} names, one for each class, got {len(self.labels)}"
            )
        self.top_k, self.workers, self.batch = top_k, workers, batch

    @property
    def metadata(self) -> Metadata:
        """What the weight file says of itself."""
        return self.network.metadata

    def __call__(self, images: ImageLike | Picture | Iterable[ImageLike | Picture]) -> Iterator[Answer]:
        """images -> their answers, in order, as they come.

        Raises TypeError and ValueError, from the iterator, for what is neither an image nor the name of one. Closing
        the iterator stops the reading.
        """
        for group in groups(self._load, named_pictures(images), self.workers, self.batch):
            yield from self._batch(group)

    def files(self, arguments: Sequence[str | os.PathLike[str]]) -> Iterator[Answer]:
        """The answers to every image that files, folders and patterns stand for."""
        return self(pictures_in(arguments))

    def pixels(self, image: ImageLike) -> npt.NDArray[np.uint8]:
        """What the network sees of an image: (size, size, C) uint8. Raises as `InputView.pixels`."""
        return self.view.pixels(image)

    def logits(self, x: np.ndarray) -> npt.NDArray[np.float32]:
        """x -> (B, num_classes) float32: uint8 (B,H,W,C) as `pixels` gives them, or float32 (B,C,H,W), normalised."""
        return self.network.logits(x)

    def answers(self, names: Sequence[str], x: np.ndarray) -> list[Answer]:
        """The answers to B inputs, x as `logits` takes it, under B names."""
        rows = zip(names, self.logits(x), strict=True)
        return [answer_to(name, row, labels=self.labels, top_k=self.top_k) for name, row in rows]

    def __repr__(self) -> str:
        network = self.network
        return f"Predictor({self.metadata.variant}, {network.path}, {network.precision}, {network.device})"

    def _load(self, picture: Picture) -> tuple[str, Loaded]:
        """(name, what goes into the network, or why there is nothing). On the worker threads, where there are any."""
        if picture.image is None:
            return picture.name, ImageError(picture.problem or f"{picture.name}: no image")
        try:
            return picture.name, self.network.prepare(self.view.pixels(picture.image, picture.name))
        except ImageError as error:
            return picture.name, error

    def _batch(self, group: list[tuple[str, Loaded]]) -> Iterator[Answer]:
        """The answers to what was loaded, with the network called once."""
        good = [(name, found) for name, found in group if isinstance(found, np.ndarray)]
        answers = iter(self.answers([name for name, _ in good], np.stack([x for _, x in good])) if good else ())
        for name, found in group:
            yield Answer(name, error=str(found)) if isinstance(found, ImageError) else next(answers)
