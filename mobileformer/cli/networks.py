"""Opening weights as functions from images to logits, one for each way to compute them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobileformer.cli.output import CommandError
from mobileformer.cli.weights import open_model

if TYPE_CHECKING:
    from mobileformer import Metadata

__all__ = ["EngineError", "is_folded", "open_networks"]


class EngineError(CommandError):
    """The inference engine cannot run this network, or nothing here."""


def is_folded(weights: Path) -> bool:
    """Whether a file is what `convert --fold` writes. Raises CommandError."""
    from mobileformer import WeightsError
    from mobileformer.inference.folded import FORMAT
    from mobileformer.weights.checkpoint import read_header

    try:
        return read_header(weights).get("format") == FORMAT
    except (WeightsError, OSError) as error:
        raise CommandError(str(error)) from error


def open_networks(
    weights: Path, paths: tuple[str, ...], device: str, threads: int
) -> tuple[Metadata, dict[str, Callable[[Any], Any]]]:
    """What the file says of itself, and for each path a function from a tensor on the CPU to logits.

    paths: "fused", "plain", "engine", "engine-bf16" or "fused-bf16"; "" is the usual one, fused for
    weights and the engine for a file that is folded for it. threads: of the engine. Raises CommandError.
    """
    from mobileformer import WeightsError, read_metadata
    from mobileformer.inference import FoldedNetwork, fold

    folded = is_folded(weights)
    try:
        if folded:
            paths = tuple(path or "engine" for path in paths)
            outside = [path for path in paths if not path.startswith("engine")]
            if outside:
                raise CommandError(f"{weights}: is folded for inference, only the engine runs it, not {outside[0]}")
            network = FoldedNetwork.load(weights)
            return network.metadata, {path: _engine(network, path, device, threads) for path in paths}
        metadata = read_metadata(weights)
    except (WeightsError, OSError) as error:
        raise CommandError(str(error)) from error
    networks: dict[str, Callable[[Any], Any]] = {}
    for path in (path or "fused" for path in paths):
        model = open_model(weights, use_fused=path.startswith("fused"))
        if path.startswith("engine"):
            try:
                networks[path] = _engine(fold(model), path, device, threads)
            except ValueError as error:
                raise EngineError(f"{weights}: {error}") from error
        else:
            networks[path] = _module(model, path, device)
    return metadata, networks


def _engine(network: Any, path: str, device: str, threads: int) -> Callable[[Any], Any]:
    import torch

    from mobileformer.inference import Engine

    if device != "cpu":
        raise CommandError(f"--device {device}: the engine runs on the CPU")
    try:
        engine = Engine(network, "bfloat16" if path == "engine-bf16" else "float32", threads)
    except (RuntimeError, ValueError) as error:
        raise EngineError(f"{path}: {error}") from error
    return lambda x: torch.from_numpy(engine(x.numpy()))


def _module(model: Any, path: str, device: str) -> Callable[[Any], Any]:
    import torch

    try:
        model = model.to(device)
    except RuntimeError as error:  # a GPU that others have filled, or that torch was not built for
        raise CommandError(f"--device {device}: {str(error).strip().splitlines()[0]}") from error
    if path == "fused-bf16":
        model = model.to_inference(dtype=torch.bfloat16)
    return lambda x: model(x.to(device))
