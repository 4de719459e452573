"""Weights of detectors in and out, and a backbone's weights out of whatever network has one."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mobileformer.detection import DETECTORS, EndToEnd, RetinaNet
from mobileformer.files.metadata import DEFAULT_TASK, Metadata, WeightsError, decode, describe, encode
from mobileformer.files.replacing import replacing
from mobileformer.network.backbone import Backbone
from mobileformer.network.classifier import Classifier
from mobileformer.weights.checkpoint import read_header, read_tensors
from mobileformer.weights.load import FORMAT, FORMAT_VERSION, load_weights, read_metadata, stored
from mobileformer.weights.stem import adapt_channels

__all__ = [
    "TASK",
    "Detector",
    "describe_detector",
    "load_detector",
    "read_detector_metadata",
    "save_detector",
    "warm_start",
]

TASK = "detection"
Detector = RetinaNet | EndToEnd
_BACKBONE = "backbone."
_STEM = "stem.conv.weight"


def describe_detector(
    model: Detector,
    *,
    labels: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    input_size: int | None = None,
) -> Metadata:
    """What a file of this detector says of itself. input_size: the short side that images are resized to, in pixels.

    Raises ValueError as `mobileformer.files.metadata.describe`.
    """
    name = next(name for name, kind in DETECTORS.items() if type(model) is kind)
    arguments = {"detector": name, **model.arguments}
    return describe(model, labels=labels, mean=mean, std=std, input_size=input_size, task=TASK, arguments=arguments)


def save_detector(
    model: Detector, path: str | os.PathLike[str], *, dtype: torch.dtype | None = None, **told: Any
) -> None:
    """Write a safetensors file that describes itself: whole, or not at all.

    told: as `describe_detector` takes it. dtype: of the floating-point values in the file; None is the model's own.
    Raises ValueError as `save_weights`.
    """
    metadata = describe_detector(model, **told)
    state = {key: stored(key, value, dtype) for key, value in model.state_dict().items()}
    with replacing(path) as temporary:
        save_file(state, temporary, metadata=encode(metadata, form=FORMAT, version=FORMAT_VERSION))


def read_detector_metadata(path: str | os.PathLike[str]) -> Metadata:
    """What the file of a detector says of itself. Raises OSError and WeightsError, for a classifier's file too."""
    return _metadata(read_header(path), os.fspath(path))


def load_detector(path: str | os.PathLike[str], *, use_fused: bool = True) -> Detector:
    """Build the detector that a file describes, load its weights, and return it in evaluation mode.

    Raises OSError, and WeightsError that names what is wrong: a file of another task, arguments that no detector has,
    keys that are missing, unexpected or of another shape, values that are not finite.
    """
    name = os.fspath(path)
    metadata = read_detector_metadata(path)
    with torch.device("meta"):  # compared without memory: a text may tell of any width
        outline = _built(metadata, name, use_fused=False)
    state, _ = read_tensors(path)
    problems = _problems(state, outline.state_dict())
    if problems:
        raise WeightsError(
            f"{name}: does not fit the detector it tells of; nothing was loaded\n  " + "\n  ".join(problems)
        )
    model = _built(metadata, name, use_fused=use_fused)
    _copy(model.state_dict(), state)
    return model.eval()


def warm_start(model: Detector, path: str | os.PathLike[str]) -> None:
    """Copy what a file of weights has for this detector, and leave the rest as it is.

    ===========================  =================================================================================
    the file is of               taken
    ===========================  =================================================================================
    a detector of the same kind  all of the same name and shape; a warning tells how many are not
    another detector             its backbone
    a classifier                 its backbone, under our names or the published ones
    ===========================  =================================================================================

    A backbone's first convolution is adapted where it takes another number of channels.
    Raises OSError and WeightsError, for another variant too; nothing is then changed.
    """
    name = os.fspath(path)
    found = backbone_metadata(path)
    if found.variant != model.variant:
        raise WeightsError(f"{name}: holds the variant {found.variant}, the detector's backbone is {model.variant}")
    if found.task == DEFAULT_TASK:
        classifier = Classifier.from_metadata(found, use_fused=False)
        load_weights(classifier, path)
        _into_backbone(model.backbone, classifier.state_dict(), name)
        return
    state, _ = read_tensors(path)
    if (found.arguments or {}).get("detector") != describe_detector(model).arguments["detector"]:  # type: ignore[index]
        _into_backbone(model.backbone, _below(_BACKBONE, state), name)
        return
    own = model.state_dict()
    fits = {key: value for key, value in state.items() if key in own and own[key].shape == value.shape}
    _copy(own, fits)
    if len(fits) < len(own):
        warnings.warn(
            f"{name}: {len(own) - len(fits)} of {len(own)} tensors are not in it and start anew", stacklevel=2
        )


def backbone_metadata(path: str | os.PathLike[str]) -> Metadata:
    """What a file of any task says of its network. Raises as `read_metadata`."""
    header = read_header(path)
    return _metadata(header, os.fspath(path)) if header.get("task") == TASK else read_metadata(path)


def _metadata(header: Mapping[str, str], name: str) -> Metadata:
    metadata = decode(header, name, form=FORMAT, version=FORMAT_VERSION, task=TASK)
    if metadata is None:
        raise WeightsError(f"{name}: tells nothing of a detector; expected a file written by this package")
    return metadata


def _built(metadata: Metadata, name: str, *, use_fused: bool) -> Detector:
    arguments = dict(metadata.arguments or {})
    kind = arguments.pop("detector", None)
    if not isinstance(kind, str) or kind not in DETECTORS:
        raise WeightsError(f"{name}: detector: expected one of {', '.join(DETECTORS)}, got {kind!r:.60}")
    try:
        return DETECTORS[kind](
            metadata.variant,
            metadata.num_classes,
            in_chans=metadata.in_chans,
            spatial_dynamic_relu=metadata.spatial_dynamic_relu,
            use_fused=use_fused,
            **arguments,
        )
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        told = str(error).splitlines()[0]
        raise WeightsError(f"{name}: tells of a detector that cannot be built ({told:.200})") from error


def _problems(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    lines = [f"missing: {key}" for key in own if key not in state]
    lines += [f"unexpected: {key}" for key in state if key not in own]
    for key, value in state.items():
        if key not in own:
            continue
        if value.shape != own[key].shape:
            lines.append(f"wrong shape: {key} is {tuple(value.shape)}, the detector has {tuple(own[key].shape)}")
        elif value.is_floating_point() != own[key].is_floating_point():
            lines.append(f"wrong dtype: {key} is {value.dtype}, the detector has {own[key].dtype}")
        elif value.is_floating_point() and not bool(value.isfinite().all()):
            lines.append(f"not finite: {key} holds NaN or infinity")
    return lines[:20]


def _into_backbone(backbone: Backbone, state: Mapping[str, Tensor], name: str) -> None:
    own = backbone.state_dict()
    found = {key: value for key, value in state.items() if key in own}
    if _STEM in found:
        found[_STEM] = adapt_channels(found[_STEM], backbone.in_chans)
    problems = _problems(found, own)
    if problems:
        raise WeightsError(f"{name}: does not fit the backbone; nothing was loaded\n  " + "\n  ".join(problems))
    _copy(own, found)


def _below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


@torch.no_grad()
def _copy(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    for key, value in state.items():
        own[key].copy_(value)
