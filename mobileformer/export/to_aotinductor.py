"""A package of AOTInductor: compiled for the processor of this machine, run by torch from Python or C++."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mobileformer.export.check import Runtime, in_fresh_process
from mobileformer.export.job import TRACED_SMALLEST, Job, quietly, traced
from mobileformer.files.metadata import encode

__all__ = ["EDGE", "SMALLEST", "SUFFIX", "TAKES", "require_tools", "runtimes", "write"]

EDGE = False
SMALLEST = TRACED_SMALLEST
SUFFIX = ".pt2"
TAKES = "any batch"

FORMAT = "mobileformer-aotinductor"
FORMAT_VERSION = 1


def require_tools(check: bool) -> None:
    """Torch, and the C++ compiler that it finds by itself."""


def write(job: Job, path: Path) -> dict[str, Any]:
    """Compilation takes minutes. The metadata of a weight file are in the package's."""
    described = encode(job.metadata, form=FORMAT, version=FORMAT_VERSION)
    with quietly():
        program = traced(job, job.dynamic_shapes())
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(path), inductor_configs={"aot_inductor.metadata": described}
        )
    return {"processor": torch.backends.cpu.get_cpu_capability()}


def runtimes(path: Path) -> dict[str, Runtime]:
    """In a process of its own: the one that compiled it holds more than the package does."""
    return {
        f"torch {torch.__version__}": in_fresh_process("run = torch._inductor.aoti_load_package(path)", path),
    }
