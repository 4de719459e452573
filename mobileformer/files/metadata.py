"""What a file of ours says of itself, as text beside its arrays. No torch here: the inference engine reads it too."""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mobileformer.config import IMAGENET_MEAN, IMAGENET_STD, MIN_SIZE, VARIANTS

__all__ = ["DEFAULT_TASK", "Metadata", "Network", "WeightsError", "check", "check_task", "decode", "describe", "encode"]

# Of what does not say its task: files, recipes and checkpoints from before there were others.
DEFAULT_TASK = "classification"
# Beyond these a number is no size but damage: whoever believed it would ask for memory that no machine has.
_LARGEST = {"num_classes": 1 << 24, "in_chans": 1 << 12, "input_size": 1 << 13}
_LARGEST_RESIZED = 1 << 15  # pixels of the short side before the crop
_SMALLEST_CROP = 0.01
_LARGEST_VALUE = 1e6  # of mean and std, whose pixels are in [0, 1]: float32 can still divide by its inverse


class WeightsError(ValueError):
    """A weight file, or a state dict, that cannot be used; the message says which and why."""


@dataclass(frozen=True, slots=True)
class Metadata:
    """What a weight file says of itself.

    labels: one name a class. mean, std: one number a channel, of what the input is normalised with (pixels in
    [0, 1]). input_size, crop_fraction: how an image becomes the input that the weights were trained for: short side
    to input_size / crop_fraction pixels, then the square of input_size pixels in the middle. None: not told.
    task: what the network answers, one of the tasks that can be trained for. arguments: what else the network was
    built with, as plain values by name; None for a classifier, which has no more.
    """

    variant: str
    num_classes: int
    in_chans: int
    spatial_dynamic_relu: bool = False
    labels: tuple[str, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    input_size: int | None = None
    crop_fraction: float | None = None
    task: str = DEFAULT_TASK
    arguments: Mapping[str, Any] | None = None


class Network(Protocol):
    """What a description is made of: a `mobileformer.Model`, or whoever says the same."""

    @property
    def variant(self) -> str: ...
    @property
    def num_classes(self) -> int: ...
    @property
    def in_chans(self) -> int: ...
    @property
    def spatial_dynamic_relu(self) -> bool: ...


def describe(
    network: Network,
    *,
    labels: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    input_size: int | None = None,
    crop_fraction: float | None = None,
    task: str = DEFAULT_TASK,
    arguments: Mapping[str, Any] | None = None,
) -> Metadata:
    """What a file made from `network` will say: for 3 channels ImageNet's mean and std where none are given.

    Raises ValueError when there are not as many labels as classes, or numbers as channels, for a mean or std that
    nothing can be normalised with, for a size below the smallest input and a fraction outside (0, 1].
    """
    if network.in_chans == len(IMAGENET_MEAN):
        mean = IMAGENET_MEAN if mean is None else mean
        std = IMAGENET_STD if std is None else std
    metadata = Metadata(
        variant=network.variant,
        num_classes=network.num_classes,
        in_chans=network.in_chans,
        spatial_dynamic_relu=network.spatial_dynamic_relu,
        labels=None if labels is None else tuple(labels),
        mean=None if mean is None else tuple(map(float, mean)),
        std=None if std is None else tuple(map(float, std)),
        input_size=None if input_size is None else operator.index(input_size),
        crop_fraction=None if crop_fraction is None else float(crop_fraction),
        task=task,
        arguments=None if arguments is None else dict(arguments),
    )
    check(metadata)
    return metadata


def encode(metadata: Metadata, *, form: str, version: int) -> dict[str, str]:
    """As the text metadata of a safetensors file, under the name and version of a file format of ours."""
    header = {
        "format": form,
        "format_version": str(version),
        "variant": metadata.variant,
        "num_classes": str(metadata.num_classes),
        "in_chans": str(metadata.in_chans),
        "spatial_dynamic_relu": json.dumps(metadata.spatial_dynamic_relu),
    }
    for key in ("labels", "mean", "std"):
        values = getattr(metadata, key)
        if values is not None:
            header[key] = json.dumps(list(values), ensure_ascii=False)
    for key in ("input_size", "crop_fraction"):
        value = getattr(metadata, key)
        if value is not None:
            header[key] = json.dumps(value)
    if metadata.task != DEFAULT_TASK:  # a file of classification reads as files always have
        header["task"] = metadata.task
    if metadata.arguments is not None:
        header["arguments"] = json.dumps(metadata.arguments, ensure_ascii=False, allow_nan=False)
    return header


def decode(
    header: Mapping[str, str], name: str, *, form: str, version: int, task: str = DEFAULT_TASK
) -> Metadata | None:
    """The reverse of `encode`, or None for a file of another format; `name` is how errors call the file.

    task: the one that the file has to be of. Raises WeightsError for metadata that is damaged, of a later version, of
    another task or of an unknown variant.
    """
    if header.get("format") != form:
        return None
    try:
        found = int(header["format_version"])
        if found > version:
            raise WeightsError(f"{name}: format version {found}, this package reads up to {version}; update it")
        check_task(header.get("task", DEFAULT_TASK), name, task)
        spatial = json.loads(header["spatial_dynamic_relu"])
        if not isinstance(spatial, bool):
            raise TypeError(f"spatial_dynamic_relu: expected true or false, got {spatial!r}")
        metadata = Metadata(
            variant=header["variant"],
            num_classes=int(header["num_classes"]),
            in_chans=int(header["in_chans"]),
            spatial_dynamic_relu=spatial,
            labels=_list(header, "labels", str),
            mean=_list(header, "mean", float),
            std=_list(header, "std", float),
            input_size=int(header["input_size"]) if "input_size" in header else None,
            crop_fraction=float(header["crop_fraction"]) if "crop_fraction" in header else None,
            task=task,
            arguments=_arguments(header),
        )
        if metadata.variant not in VARIANTS:
            raise WeightsError(f"{name}: holds the unknown variant {metadata.variant!r:.60}")
        check(metadata)
    except WeightsError:
        raise
    except (KeyError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise WeightsError(f"{name}: its metadata is damaged ({_short(error)})") from error
    return metadata


def check_task(found: Any, name: str, task: str = DEFAULT_TASK) -> None:
    """Raise WeightsError where what was found in the file called `name` is for another task than `task`."""
    if found != task:
        raise WeightsError(f"{name}: holds weights for the task {found!r:.60}, expected {task!r}")


def _list(header: Mapping[str, str], key: str, kind: type) -> tuple[Any, ...] | None:
    if key not in header:
        return None
    values = json.loads(header[key])
    if not isinstance(values, list):
        raise TypeError(f"{key}: expected a list, got {type(values).__name__}")
    return tuple(map(kind, values))


def _arguments(header: Mapping[str, str]) -> dict[str, Any] | None:
    if "arguments" not in header:
        return None
    found = json.loads(header["arguments"])
    if not isinstance(found, dict):
        raise TypeError(f"arguments: expected a table, got {type(found).__name__}")
    return found


def check(metadata: Metadata) -> None:
    """Raise ValueError, in one line, for what does not fit together or is out of range."""
    for key, smallest in (("num_classes", 1), ("in_chans", 1), ("input_size", MIN_SIZE)):
        value = getattr(metadata, key)
        if value is None:
            continue
        unit = " pixels" if key == "input_size" else ""
        if value < smallest:
            raise ValueError(f"{key}: expected at least {smallest}{unit}, got {_number(value)}")
        if value > _LARGEST[key]:
            raise ValueError(f"{key}: expected at most {_LARGEST[key]}{unit}, got {_number(value)}")
    _check_length("labels", metadata.labels, metadata.num_classes, "classes")
    _check_length("mean", metadata.mean, metadata.in_chans, "channels")
    _check_length("std", metadata.std, metadata.in_chans, "channels")
    if not all(abs(value) <= _LARGEST_VALUE for value in metadata.mean or ()):  # false for NaN
        raise ValueError(f"mean: expected finite numbers up to {_LARGEST_VALUE:g}, got {_numbers(metadata.mean)}")
    if not all(1 / _LARGEST_VALUE <= value <= _LARGEST_VALUE for value in metadata.std or ()):
        span = f"{1 / _LARGEST_VALUE:g} to {_LARGEST_VALUE:g}"
        raise ValueError(f"std: expected positive numbers, {span}, got {_numbers(metadata.std)}")
    crop = metadata.crop_fraction
    if crop is not None and not 0 < crop <= 1:
        raise ValueError(f"crop_fraction: expected a number in (0, 1], got {crop}")
    if crop is not None and crop < _SMALLEST_CROP:
        raise ValueError(f"crop_fraction: expected at least {_SMALLEST_CROP}, got {crop}")
    if crop is not None and (metadata.input_size or MIN_SIZE) / crop > _LARGEST_RESIZED:
        raise ValueError(
            f"crop_fraction: {crop} of {metadata.input_size} pixels means images resized to more than "
            f"{_LARGEST_RESIZED} pixels"
        )


def _number(value: int) -> str:
    """A number that may have thousands of digits."""
    return str(value) if abs(value) < 10**20 else "a number of more than 20 digits"


def _numbers(values: Sequence[float] | None) -> str:
    return f"{values!r:.100}"


def _short(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _check_length(key: str, values: Sequence[Any] | None, expected: int, what: str) -> None:
    if values is not None and len(values) != expected:
        raise ValueError(f"{key}: expected {expected}, one for each of the {what}, got {len(values)}")
