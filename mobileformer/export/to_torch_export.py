"""A program of torch.export: plain PyTorch operators, loaded without this package."""

from __future__ import annotations

import io
import json
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

FORMAT = "mobileformer-torch-export"
FORMAT_VERSION = 1


def require_tools(check: bool) -> None:
    """Torch alone."""


def write(job: Job, path: Path) -> dict[str, Any]:
    """The metadata of a weight file are in the archive's extra file "metadata", as JSON."""
    with quietly():
        program = traced(job, job.dynamic_shapes())
        described = json.dumps(encode(job.metadata, form=FORMAT, version=FORMAT_VERSION))
        # Into memory first: where the disk is full, torch's own file writer ends the process.
        content = io.BytesIO()
        torch.export.save(program, content, extra_files={"metadata": described})
    path.write_bytes(content.getbuffer())
    operators = sum(node.op == "call_function" for node in program.graph.nodes)
    return {"nodes": operators}


def runtimes(path: Path) -> dict[str, Runtime]:
    """Loaded as somebody would who has only torch."""
    return {f"torch {torch.__version__}": in_fresh_process("run = torch.export.load(path).module()", path)}
