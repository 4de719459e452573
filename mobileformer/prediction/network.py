"""A weight file opened as one function from images to logits: the inference engine, or PyTorch."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from mobileformer.data.image import normalised
from mobileformer.files.metadata import Metadata, WeightsError
from mobileformer.files.safetensors import stated_format
from mobileformer.inference.engine import DTYPES, Engine
from mobileformer.inference.folded import FORMAT, FoldedNetwork
from mobileformer.inference.threads import check_threads, most_threads, thread_count

if TYPE_CHECKING:
    from torch import nn

    from mobileformer.models import Model

__all__ = ["PATHS", "DeviceError", "EngineError", "Network", "PrecisionError", "is_folded", "on_device", "open_network"]

Moved = TypeVar("Moved", bound="nn.Module")
Path = Literal["engine", "fused", "plain"]
Precision = Literal["float32", "bfloat16"]
PATHS = ("engine", "fused", "plain")


class EngineError(RuntimeError):
    """The inference engine cannot run this network, or nothing here."""


class DeviceError(RuntimeError):
    """A device that is not there, or that this way to compute does not use."""

    def __init__(self, device: str, reason: str) -> None:
        super().__init__(f"device {device}: {reason}")


class PrecisionError(ValueError):
    """A precision that this way to compute does not have."""


@dataclass(frozen=True, eq=False)
class Network:
    """What computes, and what it is.

    =========  ==================================================================================================
    field      meaning
    =========  ==================================================================================================
    metadata   what the file says of itself
    path       "engine", "fused" (PyTorch with the fused operators) or "plain" (PyTorch alone)
    precision  of the matrix products
    device     "cpu", or as PyTorch names it
    logits     x -> (B, num_classes) float32: x is uint8 (B,H,W,C), normalised with the file's mean and std on the
               way in, or float32 (B,C,H,W), normalised already
    prepare    what of one image's bytes (H,W,C) is done before they are stacked, on the thread that decoded them
    model      None for the engine
    engine     None for PyTorch
    =========  ==================================================================================================
    """

    metadata: Metadata
    path: Path
    precision: Precision
    device: str
    logits: Callable[[np.ndarray], npt.NDArray[np.float32]]
    prepare: Callable[[npt.NDArray[np.uint8]], np.ndarray]
    model: Model | None = None
    engine: Engine | None = None


def is_folded(weights: str | os.PathLike[str]) -> bool:
    """Whether a file says that it is what `FoldedNetwork.save` or `mobileformer convert --fold` wrote."""
    return stated_format(weights) == FORMAT


def open_network(
    weights: str | os.PathLike[str],
    *,
    path: Path | None = None,
    device: str = "cpu",
    precision: Precision = "float32",
    threads: int | None = None,
) -> Network:
    """Open weights: ours, a published checkpoint, or a file folded for the engine, which only the engine runs.

    path: None is the engine on the CPU and for folded files, else "fused". Where the engine cannot run what nobody
    asked it for, fused PyTorch does, with a warning; `MF_KERNELS_STRICT=1` makes that an error.
    threads: on the CPU; None is PyTorch's count, or all CPUs of the process where there is no PyTorch.

    Raises OSError and WeightsError for the file, EngineError, DeviceError, PrecisionError, and ValueError for an
    argument out of range.
    """
    if path not in (None, *PATHS):
        raise ValueError(f"path: expected one of {', '.join(PATHS)} or None, got {path!r}")
    if precision not in DTYPES:
        raise ValueError(f"precision: expected one of {', '.join(DTYPES)}, got {precision!r}")
    if threads is not None:
        check_threads(threads, ", or None")
    folded, asked = is_folded(weights), path is not None
    path = path or ("engine" if folded or device == "cpu" else "fused")
    if folded and path != "engine":
        raise WeightsError(f"{weights}: is folded for inference, only the engine runs it, not {path}")
    if path == "engine" and device != "cpu":
        raise DeviceError(device, "the engine runs on the CPU")
    if precision != "float32" and path != "engine" and (path == "plain" or device == "cpu"):
        raise PrecisionError(
            f"precision: {precision} is for the inference engine, or fused on a GPU, got path {path} on {device}"
        )
    if folded:
        return _engine(FoldedNetwork.load(weights), precision, threads)
    if path == "engine":
        try:
            return _engine(_fold(weights), precision, threads)
        except EngineError as error:
            if asked or precision != "float32":
                raise
            _fall_back(error)
    return _pytorch(weights, "plain" if path == "plain" else "fused", device, precision, threads)


def _fold(weights: str | os.PathLike[str]) -> FoldedNetwork:
    from mobileformer.inference.folding import fold
    from mobileformer.weights.load import load_model, read_metadata

    metadata = read_metadata(weights)
    model = load_model(weights)
    try:
        return FoldedNetwork(metadata, fold(model).arrays)
    except ValueError as error:
        raise EngineError(f"{weights}: {error}") from error


def _engine(network: FoldedNetwork, precision: Precision, threads: int | None) -> Network:
    try:
        engine = Engine(network, precision, threads or _usual_threads())
    except (RuntimeError, ValueError) as error:
        raise EngineError(f"engine: {error}") from error
    return Network(network.metadata, "engine", precision, "cpu", engine, lambda pixels: pixels, engine=engine)


def _pytorch(
    weights: str | os.PathLike[str], path: Literal["fused", "plain"], device: str, precision: Precision,
    threads: int | None,
) -> Network:  # fmt: skip
    import torch

    from mobileformer.weights.load import load_model, read_metadata

    metadata = read_metadata(weights)
    model = on_device(load_model(weights, use_fused=path == "fused"), device)
    computes = model if precision == "float32" else model.to_inference(dtype=getattr(torch, precision))

    def prepare(pixels: np.ndarray) -> np.ndarray:
        if metadata.mean is None or metadata.std is None:
            raise ValueError("x: the network says no mean and std to normalise uint8 with; give float32")
        return normalised(pixels, metadata.mean, metadata.std)

    def logits(x: np.ndarray) -> npt.NDArray[np.float32]:
        x = prepare(x) if x.dtype == np.uint8 else x
        with torch.inference_mode(), nullcontext() if threads is None else thread_count(threads):
            return computes(torch.from_numpy(x).to(device)).float().cpu().numpy()

    return Network(metadata, path, precision, device, logits, prepare, model=model)


def on_device(model: Moved, device: str) -> Moved:
    """A module, moved. Raises DeviceError: a GPU that others have filled, or that torch was not built for."""
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise DeviceError(device, str(error).strip().splitlines()[0]) from error


def _usual_threads() -> int:
    try:
        import torch
    except ImportError:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(torch.get_num_threads(), most_threads())


def _fall_back(error: EngineError) -> None:
    from mf_kernels import KernelFallbackWarning
    from mf_kernels.environment import switch

    message = f"fused PyTorch computes in place of the engine: {error}"
    if switch("MF_KERNELS_STRICT"):
        raise EngineError(f"{message}; MF_KERNELS_STRICT={os.environ['MF_KERNELS_STRICT']} makes this an error")
    warnings.warn(message, KernelFallbackWarning, stacklevel=1)
