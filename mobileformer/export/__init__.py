"""A trained network as a file for another runtime, loaded back there and compared before it gets its name."""

from __future__ import annotations

import copy
import importlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from mobileformer.export.check import BOUND, Check, compare
from mobileformer.export.job import ExportError, Job, staged
from mobileformer.export.plain import ExportNetwork
from mobileformer.files.metadata import Metadata, describe
from mobileformer.network.classifier import Classifier, unwrap

__all__ = ["BOUND", "OPSET", "TARGETS", "Check", "ExportError", "Report", "export_model"]

TARGETS = ("onnx", "torch-export", "aotinductor", "executorch")
OPSET = 20
"""Of ONNX: the first with GELU as one operator."""

OPSETS = 18, 25  # the first and the last that torch's exporter writes


@dataclass(frozen=True)
class Report:
    """What was written, what it takes, and how it was checked; no checks where none were asked for."""

    target: str
    path: Path
    metadata: Metadata
    takes: str
    facts: Mapping[str, Any]
    checks: tuple[Check, ...]


def export_model(
    model: Classifier,
    path: str | os.PathLike[str],
    target: str,
    *,
    size: int | tuple[int, int] = 224,
    opset: int | None = None,
    check: bool = True,
    labels: Sequence[str] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    input_size: int | None = None,
    crop_fraction: float | None = None,
) -> Report:
    """Write the folded network in float32 for another runtime: images (B,in_chans,H,W) -> logits (B,num_classes).

    ============  ==============================  =====================================  ==========================
    target        file                            batch, height and width                checked in
    ============  ==============================  =====================================  ==========================
    onnx          .onnx, one file                 any batch, any size from 32            ONNX Runtime and OpenVINO
    torch-export  .pt2                            any batch, any size from 33            torch, in a fresh process
    aotinductor   .pt2, for this processor        any batch, any size from 33            torch, in a fresh process
    executorch    .pte, with XNNPACK              a batch of 1 to 4, 33 to the size      ExecuTorch, fresh process
    ============  ==============================  =====================================  ==========================

    A model with slopes by position (`spatial_dynamic_relu`) keeps the size given in all of them.

    size: height and width of the traced example, one number for both. opset: of ONNX, 18 to 25, None for `OPSET`.
    check: load the file in its runtime, at other batches and another size, and compare it with the model in float64;
    one that differs by more than `BOUND` of the largest logit is deleted. labels, mean, std, input_size,
    crop_fraction: as for `save_weights`.

    Raises ExportError when a runtime or tool is missing (naming the extra that brings it), when the file fails or is
    wrong; ValueError for an argument out of range and for a model with parts of its own.
    """
    if target not in TARGETS:
        raise ValueError(f"target: expected one of {', '.join(TARGETS)}, got {target!r}")
    backend = importlib.import_module(f"mobileformer.export.to_{target.replace('-', '_')}")
    height, width = size if isinstance(size, tuple) else (size, size)
    if min(height, width) < backend.SMALLEST:
        raise ValueError(f"size: expected at least {backend.SMALLEST} for {target}, got {height} x {width}")
    if opset is not None and (target != "onnx" or not OPSETS[0] <= opset <= OPSETS[1]):
        raise ValueError(f"opset: expected {OPSETS[0]} to {OPSETS[1]}, and the target onnx, got {opset} for {target}")
    path, model = Path(path), unwrap(model)
    if path.suffix != backend.SUFFIX:
        raise ValueError(f"path: expected the ending {backend.SUFFIX} for {target}, got {path.name}")
    job = Job(
        network=ExportNetwork(model, edge=backend.EDGE),
        metadata=describe(model, labels=labels, mean=mean, std=std, input_size=input_size, crop_fraction=crop_fraction),
        size=(height, width),
        any_size=not model.spatial_dynamic_relu,
        opset=opset or OPSET,
    )
    backend.require_tools(check)
    with staged(path) as temporary:
        facts = backend.write(job, temporary)
        checks = _checked(backend, temporary, model, job) if check else ()
    takes = f"{height} x {width}"
    if job.any_size:
        takes = f"any size from {backend.SMALLEST}" + (f" to {height} x {width}" if backend.EDGE else "")
    takes = f"{backend.TAKES}, {takes}"
    return Report(target, path, job.metadata, takes, facts, checks)


def _checked(backend: ModuleType, path: Path, model: Classifier, job: Job) -> tuple[Check, ...]:
    reference = copy.deepcopy(model).double().cpu().eval()
    runtimes = backend.runtimes(path)
    return tuple(check for name, run in runtimes.items() for check in compare(name, run, reference, job))
