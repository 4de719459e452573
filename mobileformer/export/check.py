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
from mobileformer.measure import difference

__all__ = ["BOUND", "Check", "Runtime", "compare", "in_fresh_process"]

BOUND = 1e-4
"""Largest difference of a logit from the model in float64, over the largest logit. float32 makes about 1e-6."""

Runtime = Callable[[np.ndarray], np.ndarray]


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
    checks = []
    for batch, size in ((1, job.size), (3, other)):
        x = torch.randn(batch, job.metadata.in_chans, *size, generator=generator)
        told = f"{name}, on an input of shape {tuple(x.shape)}:"
        with torch.no_grad():
            expected = model(x.double())
        try:
            actual = torch.from_numpy(np.array(run(x.numpy())))
        except Exception as error:
            raise ExportError(f"{told} it fails; nothing was written\n{error}") from error
        if actual.shape != expected.shape:
            raise ExportError(f"{told} gives shape {tuple(actual.shape)}, the model {tuple(expected.shape)}")
        relative = difference(actual, expected).relative
        if not relative <= BOUND:
            raise ExportError(
                f"{told} differs from the model by {relative:.1e} of the largest logit, more than {BOUND:g}; "
                "nothing was written"
            )
        checks.append(Check(name, tuple(x.shape), relative))
    return checks


def in_fresh_process(code: str, path: Path) -> Runtime:
    """Runs `code` in a Python of its own, which knows nothing of this package, with the names `path` and `x`.

    x is a float32 tensor, and `y`, a tensor, is what the code has to set. Raises RuntimeError with what it printed.
    """

    def run(x: np.ndarray) -> np.ndarray:
        with tempfile.TemporaryDirectory() as folder:
            np.save(f"{folder}/x.npy", x)
            done = subprocess.run(
                [sys.executable, "-I", "-c", _AROUND.format(code=code), str(path.absolute()), folder],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode != 0:
                raise RuntimeError(done.stderr[-2000:])
            return np.load(f"{folder}/y.npy")

    return run


_AROUND = """\
import sys
import numpy, torch
torch.set_num_threads(1)
path, folder = sys.argv[1:]
x = torch.from_numpy(numpy.load(folder + "/x.npy"))
with torch.no_grad():
    {code}
assert "mobileformer" not in sys.modules
numpy.save(folder + "/y.npy", y.numpy())
"""
