"""What the tests of the kernels share: one thread, every instruction set in turn, warnings not yet given."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mf_kernels import _native, _registry

# Small tensors: waiting for a second thread costs more than it gives.
torch.set_num_threads(1)


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
