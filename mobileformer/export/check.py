"""Loading what was written in the runtime it is for, and comparing it with the model."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from mobileformer.export.job import TRACED_SMALLEST, ExportError, Job
from mobileformer.measure.difference import LOGIT_BOUNDS, difference, why_wrong

__all__ = ["BOUND", "Check", "Runtime", "compare", "in_fresh_process"]

BOUND = LOGIT_BOUNDS["runtime"][torch.float32]
"""Largest difference of a logit from the model in float64, over the largest logit."""

Runtime = Callable[[list[np.ndarray]], list[np.ndarray]]
"""Float32 images of several shapes -> logits of each."""


@dataclass(frozen=True)
class Check:
    """One input through one runtime: the largest difference of a logit over the largest logit."""

    runtime: str
    shape: tuple[int, ...]
    difference: float


def compare(name: str, run: Runtime, model: nn.Module, job: Job) -> list[Check]:
    """Run both on other shapes than the one that was traced. Raises ExportError above `BOUND`. model: in float64."""
    height, width = job.size
    other = (max(TRACED_SMALLEST, height - 31), max(TRACED_SMALLEST, width - 2)) if job.any_size else job.size
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, job.metadata.in_chans, *job.size), (3, job.metadata.in_chans, *other)]
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    try:
        outputs = run([x.numpy() for x in inputs])
    except Exception as error:
        told = " and ".join(map(str, shapes))
        raise ExportError(f"{name} fails on inputs of the shapes {told}; nothing was written\n{error}") from error
    checks = []
    for x, output in zip(inputs, outputs, strict=True):
        actual = torch.from_numpy(np.array(output))
        with torch.no_grad():
            expected = model(x.double())
        told = f"{name}, on an input of shape {tuple(x.shape)}:"
        if actual.shape != expected.shape:
            shape = tuple(actual.shape)
            raise ExportError(f"{told} gives shape {shape}, the model {tuple(expected.shape)}; nothing was written")
        relative = difference(actual, expected).relative
        wrong = why_wrong("logits", relative, BOUND)
        if wrong is not None:
            raise ExportError(f"{told} {wrong}; nothing was written")
        checks.append(Check(name, tuple(x.shape), relative))
    return checks


def in_fresh_process(load: str, path: Path) -> Runtime:
    """Runs in a Python of its own, which knows nothing of this package.

    load: code that makes `run`, a function of one tensor, of the file called `path`. Raises RuntimeError with what was
    printed where that fails.
    """

    def run(inputs: list[np.ndarray]) -> list[np.ndarray]:
        with tempfile.TemporaryDirectory() as folder:
            np.savez(f"{folder}/inputs.npz", *inputs)
            done = subprocess.run(
                [sys.executable, "-I", "-c", _AROUND.format(load=load), str(path.absolute()), folder],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode != 0:
                raise RuntimeError(done.stderr[-2000:])
            with np.load(f"{folder}/outputs.npz") as outputs:
                return [outputs[key] for key in outputs.files]

    return run


_AROUND = """\
import sys
import numpy, torch
torch.set_num_threads(1)
path, folder = sys.argv[1:]
{load}
inputs = numpy.load(folder + "/inputs.npz")
with torch.no_grad():
    outputs = [run(torch.from_numpy(inputs[key])).numpy() for key in inputs.files]
assert "mobileformer" not in sys.modules
numpy.savez(folder + "/outputs.npz", *outputs)
"""
