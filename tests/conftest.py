"""What all tests share: the order of the files, one thread, every instruction set in turn, warnings not yet given."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mf_kernels import _native, _registry

# The files that take longest come first: with `--dist loadfile` a file is one worker's, and one that came last would
# leave the others idle. The rest follows as it is called.
LONGEST = (
    "test_cuda_build",  # nvcc
    "test_export",
    "test_packaging",  # a wheel in isolation
    "test_triton",  # the properties of all kernels in the interpreter
    "test_gpu_dry",
    "test_operators",  # g++ for the emulator
    "test_training_processes",
    "test_engine_sanitizers",
    "test_triton_compile",
    "test_compile",  # inductor
    "test_cuda_sanitizers",
    "test_training",
    "test_timm_optional",
    "test_model_compile",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: number for number, name in enumerate(LONGEST)}
    gone = [name for name in LONGEST if not Path(__file__).with_name(f"{name}.py").is_file()]
    assert not gone, f"tests/conftest.py: LONGEST: no such test files: {gone}"
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


# Small tensors: waiting for a second thread costs more than it gives.
torch.set_num_threads(1)

# What the processor says it has is what inductor takes, without a program for each instruction set to see whether it
# runs; exporters and processes that tests start take it over.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The CPU kernels of one instruction set serve during the test."""
    report = _native.cpu_report()
    if request.param not in report["runnable"]:
        pytest.skip(f"this CPU has no {request.param}")
    _native.set_cpu_isa(request.param)
    yield request.param
    _native.set_cpu_isa(report["isa"])


@pytest.fixture
def unwarned(monkeypatch: pytest.MonkeyPatch) -> None:
    """No operator has warned of its fallback yet."""
    monkeypatch.setattr(_registry, "_warned", set())
