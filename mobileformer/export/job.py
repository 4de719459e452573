"""What every target is given, and how a file is written before it gets its name."""

from __future__ import annotations

import importlib.util
import logging
import os
import secrets
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim, ExportedProgram

from mobileformer.export.plain import ExportNetwork
from mobileformer.files.metadata import Metadata
from mobileformer.files.replacing import resting_place

__all__ = ["TRACED_SMALLEST", "ExportError", "Job", "quietly", "require", "staged", "traced"]

TRACED_BATCH = 2  # with 1, the batch would be taken for a constant
TRACED_SMALLEST = 33  # a map of one position would be another graph to torch.export


class ExportError(RuntimeError):
    """A file that was not written, because it cannot be made or checked here, or because it came out wrong."""


@dataclass(frozen=True)
class Job:
    """A network to export.

    ========  =======================================================================================
    field     meaning
    ========  =======================================================================================
    network   in the target's form, float32
    metadata  what the file says of itself
    size      height and width of the example that is traced
    any_size  whether the file is to take other heights and widths
    opset     of ONNX
    ========  =======================================================================================
    """

    network: ExportNetwork
    metadata: Metadata
    size: tuple[int, int]
    any_size: bool
    opset: int

    def example(self) -> torch.Tensor:
        """What is traced; the values do not matter."""
        size = [max(side, TRACED_SMALLEST) if self.any_size else side for side in self.size]
        return torch.zeros(TRACED_BATCH, self.metadata.in_chans, *size)

    def dynamic_shapes(self, *, largest_batch: int | None = None) -> tuple[dict[int, Any]]:
        """What may vary, in torch.export's terms; with a largest batch, the size that is traced is the largest too."""
        dimensions = {0: Dim("batch", max=largest_batch)}
        if self.any_size:
            height, width = (None, None) if largest_batch is None else self.size
            dimensions[2] = Dim("height", min=TRACED_SMALLEST, max=height)
            dimensions[3] = Dim("width", min=TRACED_SMALLEST, max=width)
        return (dimensions,)


def traced(job: Job, dynamic_shapes: tuple[dict[int, Any]]) -> ExportedProgram:
    """The network as a graph, without the paths of this machine that torch keeps for its error messages."""
    with torch.no_grad():
        program = torch.export.export(job.network, (job.example(),), dynamic_shapes=dynamic_shapes)
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)
    return program


def require(extra: str, *modules: str) -> None:
    """Raise ExportError naming the extra that installs what is missing."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise ExportError(
            f"{' and '.join(missing)}: not installed; pip install 'mobileformer[{extra}]' brings what this needs"
        )


@contextmanager
def quietly() -> Iterator[None]:
    """Leave out what exporters warn of and log on their own account, none of it about the network."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def staged(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the name of `path` in a temporary folder beside it; on success that gets its place, on an error it is gone.

    Unlike with `replacing`, the file bears its own name already: loaders go by its ending, and it is loaded before it
    is trusted. Through a link, what that points to is replaced. Raises what the body raises, and as `resting_place`.
    """
    target, name = resting_place(path), Path(path).name
    folder = target.with_name(f".{target.name[:40]}.{secrets.token_hex(6)}.tmp")
    folder.mkdir()
    try:
        yield folder / name
        os.replace(folder / name, target)
    finally:
        shutil.rmtree(folder)
