"""Weights in and out: our own self-describing safetensors, and the published checkpoints."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mobileformer.checkpoint import read_header, read_state, unwrap_state
from mobileformer.config import IMAGENET_MEAN, IMAGENET_STD, VARIANTS
from mobileformer.files import replacing
from mobileformer.inference.folded import FORMAT as FOLDED_FORMAT
from mobileformer.keys import to_official, to_ours
from mobileformer.metadata import Metadata, WeightsError, decode, describe, encode
from mobileformer.model import Model, unwrap

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
_NEW_HEAD = ("head.classifier.weight", "head.classifier.bias")
_STORED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_CLASSES_KEY, _CHANNELS_KEY = "head.classifier.weight", "stem.conv.weight"


def load_weights(
    model: Model,
    path_or_state_dict: str | os.PathLike[str] | Mapping[str, Any],
    *,
    allow_new_head: bool = False,
) -> None:
    """Copy weights into `model`, all of them or none.

    ======  =============================================================================================
    source  accepted
    ======  =============================================================================================
    path    safetensors; or a published `.pth.tar`: what `torch.save` wrote, read as weights only
    dict    {key: tensor}, or one that holds it under "state_dict"
    keys    ours or the published ones, told apart by themselves; `module.` before all of them or none
    ======  =============================================================================================

    Values are converted to the dtype and device of the model. With `allow_new_head`, a file for another
    number of classes is taken too, and the last linear layer stays as it is.

    Raises FileNotFoundError, and WeightsError (a ValueError) that names every missing, unexpected or
    wrong-shaped key, every value that is not finite or no floating-point number, and files that are cut off
    or hold more than weights. Warns when the file was saved from a model with another `spatial_dynamic_relu`.
    """
    name, state, metadata = _read(path_or_state_dict)
    _copy_into(unwrap(model), name, state, metadata, allow_new_head)


def load_model(path: str | os.PathLike[str], *, use_fused: bool = True) -> Model:
    """Build the model a file describes, load its weights, and return it in evaluation mode.

    A published checkpoint says nothing of itself: its variant, classes and channels are read off the shapes.
    Raises as `load_weights`, and WeightsError when the shapes belong to none of the seven variants.
    """
    name, state, metadata = _read(path)
    if metadata is None:
        metadata = _infer_metadata(state, name)
    model = Model(
        metadata.variant,
        num_classes=metadata.num_classes,
        in_chans=metadata.in_chans,
        use_fused=use_fused,
        spatial_dynamic_relu=metadata.spatial_dynamic_relu,
    )
    _copy_into(model, name, state, metadata, allow_new_head=False)
    return model.eval()


def read_metadata(path: str | os.PathLike[str]) -> Metadata:
    """What the file says of itself, or what the shapes of a published one say. Raises as `load_model`."""
    metadata = _parse_metadata(read_header(path), str(path))
    return metadata if metadata is not None else _infer_metadata(read_state(path)[0], str(path))


def save_weights(
    model: Model,
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
    state = {key: _stored(key, value, dtype) for key, value in model.state_dict().items()}
    with replacing(path) as temporary:
        save_file(state, temporary, metadata=encode(metadata, form=FORMAT, version=FORMAT_VERSION))


def official_state_dict(model: Model) -> dict[str, Tensor]:
    """The weights under the published names, in the published order: the model's own tensors, detached."""
    model = unwrap(model)
    state = model.state_dict()
    return {official: state[ours] for ours, official in to_official(state, model.config).items()}


def save_official_checkpoint(model: Model, path: str | os.PathLike[str]) -> None:
    """Write what the published code reads, {"state_dict": ...} under its names. Whole or not at all."""
    state = {key: value.cpu() for key, value in official_state_dict(model).items()}
    with replacing(path) as temporary:
        torch.save({"state_dict": state}, temporary)


def _stored(key: str, value: Tensor, dtype: torch.dtype | None) -> Tensor:
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


def _read(source: Any) -> tuple[str, dict[str, Tensor], Metadata | None]:
    """(how errors call the source, its state dict, what it says of itself)."""
    if isinstance(source, Mapping):
        return "state dict", unwrap_state(source, name="state dict"), None
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"path_or_state_dict: expected a path or a dict, got {type(source).__name__}")
    name = str(Path(source))
    state, header = read_state(source)
    return name, unwrap_state(state, name=name), _parse_metadata(header, name)


def _copy_into(
    model: Model, name: str, state: dict[str, Tensor], metadata: Metadata | None, allow_new_head: bool
) -> None:
    if metadata is not None and metadata.variant != model.variant:
        raise WeightsError(f"{name}: holds the variant {metadata.variant}, the model is {model.variant}")
    official_names, state = _our_names(state, model, name)
    own = model.state_dict()
    skipped: set[str] = set()
    if allow_new_head and any(key in state and state[key].shape != own[key].shape for key in _NEW_HEAD):
        skipped = set(_NEW_HEAD)
    problems = _problems(state, own, skipped, to_official(own, model.config) if official_names else {})
    if problems:
        raise WeightsError(
            f"{name}: does not fit the model ({model.variant}, {model.num_classes} classes, "
            f"{model.in_chans} channels); nothing was loaded\n  " + "\n  ".join(problems)
        )
    if metadata is not None and metadata.spatial_dynamic_relu != model.spatial_dynamic_relu:
        warnings.warn(
            f"{name}: saved with spatial_dynamic_relu={metadata.spatial_dynamic_relu}, "
            f"the model has {model.spatial_dynamic_relu}: same parameters, other outputs",
            stacklevel=3,
        )
    with torch.no_grad():
        for key, target in own.items():
            if key not in skipped:
                target.copy_(state[key])


def _our_names(state: dict[str, Tensor], model: Model, name: str) -> tuple[bool, dict[str, Tensor]]:
    """(whether the names are the published ones, the state under ours). Unknown keys keep their names."""
    ours = to_official(state, model.config)
    official = to_ours(state, model.config)
    if not ours and not official:
        first = ", ".join(list(state)[:3])
        raise WeightsError(f"{name}: no key belongs to a Mobile-Former, it starts with {first}")
    if len(ours) >= len(official):
        return False, state
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
            hint = " (allow_new_head=True keeps the model's own last layer)" if key in _NEW_HEAD else ""
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


@functools.cache
def _shapes(variant: str) -> dict[str, torch.Size]:
    """Our keys and shapes for one variant, with one class and one channel, without allocating anything."""
    with torch.device("meta"):
        model = Model(variant, num_classes=1, in_chans=1, use_fused=False)
    return {key: value.shape for key, value in model.state_dict().items() if key not in _NEW_HEAD}


def _infer_metadata(state: dict[str, Tensor], name: str) -> Metadata:
    """The variant, classes and channels that the shapes of a state dict belong to."""
    for variant, config in VARIANTS.items():
        named = {**state, **{ours: state[key] for key, ours in to_ours(state, config).items()}}
        shapes = _shapes(variant)
        fits = all(
            key in named and (named[key].shape == shape or key == _CHANNELS_KEY) for key, shape in shapes.items()
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
