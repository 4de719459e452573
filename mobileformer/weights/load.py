"""Weights in and out: our own self-describing safetensors, and the published checkpoints."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mobileformer.config import IMAGENET_MEAN, IMAGENET_STD, VARIANTS
from mobileformer.files.metadata import Metadata, WeightsError, check, decode, describe, encode
from mobileformer.files.replacing import replacing
from mobileformer.inference.folded import FORMAT as FOLDED_FORMAT
from mobileformer.layout import state_shapes
from mobileformer.models import Model
from mobileformer.network.classifier import Classifier, unwrap
from mobileformer.weights.checkpoint import open_weights, read_header
from mobileformer.weights.keys import to_official, to_ours
from mobileformer.weights.nesting import KEY, Contents, find_weights
from mobileformer.weights.stem import adapt_channels

__all__ = [
    "Metadata",
    "WeightsError",
    "load_model",
    "load_weights",
    "official_state_dict",
    "read_metadata",
    "save_official_checkpoint",
    "save_weights",
]

FORMAT = "mobileformer"
FORMAT_VERSION = 1
_NEW_HEAD: tuple[str, ...] = ("head.classifier.weight", "head.classifier.bias")
_HINTS: dict[str, str] = dict.fromkeys(_NEW_HEAD, " (allow_new_head=True keeps the model's own last layer)")
_HINTS["stem.conv.weight"] = " (allow_new_channels=True adapts it to other channels)"
_STORED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_CLASSES_KEY, _CHANNELS_KEY = "head.classifier.weight", "stem.conv.weight"


def load_weights(
    model: Classifier,
    path_or_state_dict: str | os.PathLike[str] | Mapping[str, Any],
    *,
    allow_new_head: bool = False,
    allow_new_channels: bool = False,
    average: bool | None = None,
) -> None:
    """Copy weights into `model`, all of them or none.

    ======  =============================================================================================
    source  accepted
    ======  =============================================================================================
    path    safetensors; or a published `.pth.tar`: what `torch.save` wrote, read as weights only
    dict    {key: tensor}, or what a training script saved: weights below "state_dict", "model", "model_ema"
            and the like
    keys    ours or the published ones, told apart by themselves; one prefix before all of them or none
    ======  =============================================================================================

    ==================  =================================================================================
    argument            meaning
    ==================  =================================================================================
    allow_new_head      take a file for another number of classes too: the last linear layer stays as it is
    allow_new_channels  take a file for another number of channels too: the first convolution is adapted,
                        `mobileformer.weights.stem.adapt_channels`
    average             where there are raw weights and their average: True the average, False the raw ones;
                        None the average if it can be used, and a warning says which
    ==================  =================================================================================

    Values are converted to the dtype and device of the model.

    Raises OSError, and WeightsError (a ValueError) that names every missing, unexpected or
    wrong-shaped key, every value that is not finite or no floating-point number, and files that are cut off
    or hold more than weights. Warns when the file was saved from a model with another `spatial_dynamic_relu`.
    """
    model = unwrap(model)
    name, contents = _read(path_or_state_dict, average)
    metadata = _parse_metadata(contents.header, name)
    state = contents.state
    if metadata is not None and metadata.variant != model.variant:
        raise WeightsError(f"{name}: holds the variant {metadata.variant}, the model is {model.variant}")
    official_names, state = _our_names(state, model, name)
    skipped = _fit(name, model, model.state_dict(), state, official_names, allow_new_head, allow_new_channels)
    _copy_into(model, state, skipped)
    if contents.note:
        warnings.warn(contents.note, stacklevel=2)
    if metadata is not None and metadata.spatial_dynamic_relu != model.spatial_dynamic_relu:
        warnings.warn(
            f"{name}: saved with spatial_dynamic_relu={metadata.spatial_dynamic_relu}, "
            f"the model has {model.spatial_dynamic_relu}: same parameters, other outputs",
            stacklevel=2,
        )


def load_model(path: str | os.PathLike[str], *, use_fused: bool = True, average: bool | None = None) -> Model:
    """Build the model a file describes, load its weights, and return it in evaluation mode.

    A published checkpoint says nothing of itself: its variant, classes and channels are read off the shapes.
    Raises and warns as `load_weights`, and WeightsError when the shapes belong to none of the seven variants.
    """
    name, contents = _read(path, average)
    metadata = _metadata(contents, name)
    with torch.device("meta"):  # compared without memory: a text may tell of any number of classes
        outline = Classifier.from_metadata(metadata, use_fused=False)
    official_names, state = _our_names(contents.state, outline, name)
    _fit(name, outline, outline.state_dict(), state, official_names)
    model = Model.from_metadata(metadata, use_fused=use_fused)
    _copy_into(model, state, set())
    if contents.note:
        warnings.warn(contents.note, stacklevel=2)
    return model.eval()


def read_metadata(path: str | os.PathLike[str]) -> Metadata:
    """What the file says of itself, or what the shapes of a published one say. Raises as `load_model`."""
    metadata = _parse_metadata(read_header(path), str(path))
    return metadata if metadata is not None else _metadata(open_weights(path), str(path))


def save_weights(
    model: Classifier,
    path: str | os.PathLike[str],
    *,
    labels: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    input_size: int | None = None,
    crop_fraction: float | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a safetensors file that describes itself: our names, and as text metadata what `Metadata` holds.

    =============  ======================================================================================
    argument       meaning
    =============  ======================================================================================
    labels         one name a class, in order
    mean, std      one number a channel, what the input was normalised with (pixels in [0, 1]); for 3
                   channels ImageNet's when not given
    input_size     side of the square that the weights were trained for, in pixels
    crop_fraction  what that square is of the short side of the resized image, in (0, 1]
    dtype          of the floating-point values in the file: torch.float16 or bfloat16 for half the bytes,
                   float32, float64; None is the model's own. Loading converts to the model's dtype.
    =============  ======================================================================================

    The file appears whole or not at all. Raises ValueError when there are not as many labels as classes, or numbers
    as channels, for a size or fraction out of range, and for a value that `dtype` cannot hold.
    """
    if dtype not in (None, *_STORED_DTYPES):
        raise ValueError(f"dtype: expected one of {', '.join(map(str, _STORED_DTYPES))}, got {dtype}")
    model = unwrap(model)
    metadata = describe(model, labels=labels, mean=mean, std=std, input_size=input_size, crop_fraction=crop_fraction)
    state = {key: stored(key, value, dtype) for key, value in model.state_dict().items()}
    with replacing(path) as temporary:
        save_file(state, temporary, metadata=encode(metadata, form=FORMAT, version=FORMAT_VERSION))


def official_state_dict(model: Classifier) -> dict[str, Tensor]:
    """The weights under the published names, in the published order: the model's own tensors, detached."""
    model = unwrap(model)
    state = model.state_dict()
    return {official: state[ours] for ours, official in to_official(state, model.config).items()}


def save_official_checkpoint(
    model: Classifier,
    path: str | os.PathLike[str],
    *,
    labels: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    input_size: int | None = None,
    crop_fraction: float | None = None,
) -> None:
    """Write what the published code reads, {"state_dict": ...} under its names. Whole or not at all.

    The arguments are those of `save_weights`. They stand below a key that the published code does not look at, and
    with them the file describes itself to this package as its own do. Raises as `save_weights`.
    """
    metadata = describe(
        unwrap(model), labels=labels, mean=mean, std=std, input_size=input_size, crop_fraction=crop_fraction
    )
    state = {key: value.cpu() for key, value in official_state_dict(model).items()}
    header = encode(metadata, form=FORMAT, version=FORMAT_VERSION)
    with replacing(path) as temporary:
        torch.save({"state_dict": state, KEY: header}, temporary)


def stored(key: str, value: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A value as the file holds it. Counters of batches keep their own dtype."""
    value = value.detach().cpu().contiguous()
    if dtype is None or not value.is_floating_point():
        return value
    stored = value.to(dtype)
    lost = torch.isfinite(value) & ~torch.isfinite(stored)
    if bool(lost.any()):
        largest = value[lost].abs().max().item()
        raise ValueError(f"dtype: {key} holds {largest:g}, more than {dtype} can ({torch.finfo(dtype).max:g})")
    return stored


def _read(source: Any, average: bool | None) -> tuple[str, Contents]:
    """(how errors call the source, what it holds)."""
    if average not in (None, True, False):
        raise ValueError(f"average: expected True, False or None, got {average!r}")
    if isinstance(source, Mapping):
        return "state dict", find_weights(source, name="state dict", average=average)
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"path_or_state_dict: expected a path or a dict, got {type(source).__name__}")
    return str(Path(source)), open_weights(source, average=average)


def _fit(
    name: str,
    model: Classifier,
    own: Mapping[str, Tensor],
    state: dict[str, Tensor],
    official_names: bool,
    allow_new_head: bool = False,
    allow_new_channels: bool = False,
) -> set[str]:
    """The keys that are not to be copied; adapts the stem in `state`. Raises WeightsError where the rest does not fit.

    Of `own`, the model's state, only shapes and dtypes count, so it may be on the meta device.
    """
    skipped: set[str] = set()
    if allow_new_head and any(key in state and state[key].shape != own[key].shape for key in _NEW_HEAD):
        skipped = set(_NEW_HEAD)
    stem = state.get(_CHANNELS_KEY)
    if allow_new_channels and stem is not None and stem.ndim == 4 and stem.is_floating_point() and stem.shape[1]:
        state[_CHANNELS_KEY] = adapt_channels(stem, model.in_chans)
    problems = _problems(state, own, skipped, to_official(own, model.config) if official_names else {})
    if problems:
        raise WeightsError(
            f"{name}: does not fit the model ({model.variant}, {model.num_classes} classes, "
            f"{model.in_chans} channels); nothing was loaded\n  " + "\n  ".join(problems)
        )
    return skipped


@torch.no_grad()
def _copy_into(model: Classifier, state: Mapping[str, Tensor], skipped: set[str]) -> None:
    for key, target in model.state_dict().items():
        if key not in skipped:
            target.copy_(state[key])


def _our_names(state: dict[str, Tensor], model: Classifier, name: str) -> tuple[bool, dict[str, Tensor]]:
    """(whether the names are the published ones, the state under ours). Unknown keys keep their names."""
    ours = to_official(state, model.config)
    official = to_ours(state, model.config)
    if not ours and not official:
        first = ", ".join(list(state)[:3])
        raise WeightsError(f"{name}: no key belongs to a Mobile-Former, it starts with {first}")
    if len(ours) >= len(official):
        return False, dict(state)
    return True, {official.get(key, key): value for key, value in state.items()}


def _problems(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], skipped: set[str], shown: Mapping[str, str]
) -> list[str]:
    """One line for everything wrong; `shown` maps our keys to those the file uses."""
    lines = [f"missing: {shown.get(key, key)}" for key in own if key not in state and key not in skipped]
    lines += [f"unexpected: {key}" for key in state if key not in own]
    for key in own:
        if key not in state or key in skipped:
            continue
        value, target, label = state[key], own[key], shown.get(key, key)
        if value.shape != target.shape:
            hint = _HINTS.get(key, "")
            lines.append(f"wrong shape: {label} is {_shape(value)}, the model has {_shape(target)}{hint}")
        elif value.is_complex() or (target.is_floating_point() and not value.is_floating_point()):
            # The other way round is fine: scripts that shorten a state dict turn its batch counters into
            # floats too.
            lines.append(f"wrong dtype: {label} is {value.dtype}, the model has {target.dtype}")
        elif value.is_floating_point() and not bool(torch.isfinite(value).all()):
            lines.append(f"not finite: {label} holds NaN or infinity")
    return lines


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"


def _parse_metadata(header: Mapping[str, str], name: str) -> Metadata | None:
    """None for a file that is not ours."""
    if header.get("format") == FOLDED_FORMAT:
        raise WeightsError(
            f"{name}: holds a network folded for inference, which no model can be made from; "
            "mobileformer.inference.Engine opens it"
        )
    return decode(header, name, form=FORMAT, version=FORMAT_VERSION)


def _metadata(contents: Contents, name: str) -> Metadata:
    """What the contents say of themselves, or what their shapes say, and the recipe of a training run."""
    metadata = _parse_metadata(contents.header, name)
    if metadata is not None:
        return metadata
    metadata = _infer_metadata(contents.state, name)
    if not contents.run:
        return metadata
    try:
        metadata = dataclasses.replace(metadata, **contents.run)
        check(metadata)
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{name}: its recipe does not fit its weights ({error})") from error
    return metadata


def _infer_metadata(state: dict[str, Tensor], name: str) -> Metadata:
    """The variant, classes and channels that the shapes of a state dict belong to."""
    for variant, config in VARIANTS.items():
        named = {**state, **{ours: state[key] for key, ours in to_ours(state, config).items()}}
        shapes = state_shapes(config, num_classes=1, in_chans=1)
        fits = all(
            key in named and (named[key].shape == shape or key == _CHANNELS_KEY)
            for key, shape in shapes.items()
            if key not in _NEW_HEAD
        )
        if fits and named[_CHANNELS_KEY].ndim == 4 and _CLASSES_KEY in named and named[_CLASSES_KEY].ndim == 2:
            in_chans = named[_CHANNELS_KEY].shape[1]
            imagenet = in_chans == len(IMAGENET_MEAN)
            return Metadata(
                variant,
                num_classes=named[_CLASSES_KEY].shape[0],
                in_chans=in_chans,
                mean=IMAGENET_MEAN if imagenet else None,
                std=IMAGENET_STD if imagenet else None,
            )
    raise WeightsError(f"{name}: its shapes belong to none of {', '.join(VARIANTS)}")
