"""What the commands share about weights: how to get them, opening them, labels, what they want to see of an image."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mobileformer.cli.output import MAX_SIZE, CommandError, note

if TYPE_CHECKING:
    from torch import Tensor

    from mobileformer import Metadata, Model

__all__ = [
    "InputView",
    "SizeOption",
    "WeightsOption",
    "chosen_weights",
    "input_view",
    "open_metadata",
    "open_model",
    "photo_tensor",
    "read_labels",
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


@dataclass(frozen=True, slots=True)
class InputView:
    """How an image becomes the network's input: the keyword arguments of `mobileformer.data.load_image`."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_fraction: float


def chosen_weights(weights: Path | None) -> Path:
    """The file that was given, or the package's own, which is then told: they know ten kinds of clothing alone."""
    from mobileformer.pretrained import shipped_weights

    if weights is not None:
        return weights
    note("without --weights: the 52m in the package, trained on Fashion-MNIST, ten kinds of clothing on black")
    return shipped_weights()


def input_view(metadata: Metadata, weights: Path, size: int | None) -> InputView:
    """As the weight file says, with `size` in place of its own where one is given. Raises CommandError."""
    from mobileformer.data import CROP_FRACTION

    if metadata.in_chans not in (1, 3):
        raise CommandError(f"{weights}: takes {metadata.in_chans} channels, an image file has 1 or 3")
    if metadata.mean is None or metadata.std is None:
        raise CommandError(
            f"{weights}: does not say what its input is normalised with; write it again with "
            "mobileformer.save_weights(model, path, mean=..., std=...)"
        )
    return InputView(
        size or metadata.input_size or 224, metadata.mean, metadata.std, metadata.crop_fraction or CROP_FRACTION
    )


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
    import warnings

    from mobileformer import WeightsError, load_model

    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.filterwarnings("always", module=__name__)
            model = load_model(path, use_fused=use_fused, average=average)
    except (WeightsError, OSError) as error:
        raise CommandError(str(error)) from error
    for warning in told:
        if warning.filename == __file__:
            note(str(warning.message))
        else:  # not of the loading
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return model


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
