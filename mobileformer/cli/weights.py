"""What the commands share about weights: how to get them, opening them, labels."""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mobileformer.cli.output import MAX_SIZE, CommandError, note

if TYPE_CHECKING:
    from torch import Tensor

    from mobileformer import Metadata, Model
    from mobileformer.prediction import DetectionPredictor, Predictor

__all__ = [
    "ShortSideOption",
    "SizeOption",
    "WeightsOption",
    "check_threads_option",
    "chosen_weights",
    "open_detector",
    "open_metadata",
    "open_model",
    "open_predictor",
    "photo_tensor",
    "read_labels",
    "task_of",
    "warnings_told",
]

WeightsOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Our safetensors, or a published checkpoint; else the weights in the package (clothing)."
    ),
]
SizeOption = Annotated[
    int | None,
    typer.Option(
        min=32, max=MAX_SIZE, help="Side of the square the network sees, in pixels; else what the weight file says."
    ),
]
ShortSideOption = Annotated[
    int | None,
    typer.Option(
        min=32,
        max=MAX_SIZE,
        help="Short side that an image is resized to for a detector, side of the square that a classifier sees, in "
        "pixels; else what the weight file says.",
    ),
]


_SHIPPED = {
    "classification": "the 52m in the package, trained on Fashion-MNIST, ten kinds of clothing on black",
    "detection": "the RetinaNet-26m in the package, trained on ten kinds of clothing on photos of 128 x 128 pixels",
}


def chosen_weights(weights: Path | None, task: str = "classification") -> Path:
    """The file that was given, or the package's own for the task, which is then told: they know ten kinds of clothing.

    Raises CommandError where the package has none.
    """
    from mobileformer.pretrained import shipped_weights

    if weights is not None:
        return weights
    try:
        found = shipped_weights(task)
    except FileNotFoundError as error:
        raise CommandError(f"--weights: expected a file for the task {task}: {error}") from error
    note(f"without --weights: {_SHIPPED[task]}")
    return found


def task_of(weights: Path | None, asked: str | None) -> str:
    """The task that was asked for, else the one that a weight file says it is of, else classification."""
    from mobileformer.files.safetensors import stated_task

    return asked or ("classification" if weights is None else stated_task(weights))


def open_metadata(path: Path) -> Metadata:
    """What the file says of itself, or its shapes say. Raises CommandError."""
    from mobileformer import WeightsError, read_metadata

    try:
        return read_metadata(path)
    except (WeightsError, OSError) as error:
        raise CommandError(str(error)) from error


def open_model(path: Path, *, use_fused: bool = True, average: bool | None = None) -> Model:
    """The model a file describes, with its weights, in evaluation mode; which of several is told.

    Raises CommandError.
    """
    from mobileformer import WeightsError, load_model

    try:
        with warnings_told(__name__):
            return load_model(path, use_fused=use_fused, average=average)
    except (WeightsError, OSError) as error:
        raise CommandError(str(error)) from error


def open_predictor(weights: Path, **options: Any) -> Predictor:
    """A `Predictor` of a weight file; which of several weights it takes, and what computes in place of what, is told.

    options: those of `Predictor`. Raises CommandError, and BadParameter for a precision that does not go with them.
    """
    from mobileformer import WeightsError
    from mobileformer.prediction import DeviceError, EngineError, PrecisionError, Predictor, network

    try:
        with warnings_told(network.__name__):
            return Predictor(weights, **options)
    except PrecisionError as error:
        hint = f"--precision {options['precision']}"
        raise typer.BadParameter("is for the inference engine, or fused on a GPU", param_hint=hint) from error
    except DeviceError as error:
        raise CommandError(f"--{error}") from error
    except (WeightsError, EngineError, OSError) as error:
        raise CommandError(str(error)) from error


def open_detector(weights: Path, **options: Any) -> DetectionPredictor:
    """A `DetectionPredictor` of a weight file. options: those that it takes. Raises CommandError."""
    from mobileformer import WeightsError
    from mobileformer.prediction import DetectionPredictor, DeviceError

    try:
        return DetectionPredictor(weights, **options)
    except DeviceError as error:
        raise CommandError(f"--{error}") from error
    except (WeightsError, OSError) as error:
        raise CommandError(str(error)) from error


@contextmanager
def warnings_told(module: str) -> Iterator[None]:
    """What a module warns of, inside, becomes notes, also where warnings are errors; others stay what they are."""
    with warnings.catch_warnings(record=True) as told:
        warnings.filterwarnings("always", module=re.escape(module))
        yield
    for warning in told:
        if warning.filename == sys.modules[module].__file__:
            note(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def check_threads_option(threads: int | None) -> None:
    """Raise BadParameter for more threads than are of use on this machine."""
    from mobileformer.inference.threads import check_threads

    try:
        check_threads(1 if threads is None else threads)
    except ValueError as error:
        raise typer.BadParameter(str(error).removeprefix("threads: "), param_hint="--threads") from error


def photo_tensor(path: Path, size: int) -> Tensor:
    """An image file, preprocessed as for ImageNet: (3, size, size) float32. Raises CommandError."""
    import torch

    from mobileformer.config import IMAGENET_MEAN, IMAGENET_STD
    from mobileformer.data import ImageError, load_image

    try:
        return torch.from_numpy(load_image(path, size=size, mean=IMAGENET_MEAN, std=IMAGENET_STD))
    except ImageError as error:
        raise CommandError(str(error)) from error


def read_labels(path: Path, num_classes: int) -> list[str]:
    """Names of the classes in order: a list in a .json file, else one name a line. Raises CommandError."""
    from mobileformer.files.reading import read_regular

    try:
        text = read_regular(path, limit=1 << 26).decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as error:
        raise CommandError(f"--labels: {error if error.errno is None else f'{path}: {error.strerror}'}") from error
    except ValueError as error:
        raise CommandError(f"--labels: {path}: {error}") from error
    if path.suffix.lower() == ".json":
        try:
            labels = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CommandError(f"--labels: {path}: not valid JSON: {error}") from error
    else:
        labels = text.rstrip().split("\n")
    if not isinstance(labels, list) or not all(isinstance(label, str) and label.strip() for label in labels):
        raise CommandError(f"--labels: {path}: expected a list with a name, not empty, for every class")
    if len(labels) != num_classes:
        raise CommandError(f"--labels: {path}: expected {num_classes} names, one for each class, found {len(labels)}")
    return [label.strip() for label in labels]
