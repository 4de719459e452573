"""Gradients at the corners of every activation: one rule for the CPU kernels, the CUDA kernels, Triton and PyTorch.

Triton's part is in `triton_interpreted.py`, which runs in a process of its own.
"""

from __future__ import annotations

import emulator_support
import pytest
import torch
from slopes_support import FLAT, INF, assert_slopes, corner_values, depthwise_row, dynamic_relu_row, slopes

import mf_kernels
from mf_kernels import reference, testing

DTYPES = (torch.float32, torch.bfloat16)
needs_emulator = pytest.mark.skipif(bool(emulator_support.missing()), reason=emulator_support.missing())


@pytest.mark.parametrize("activation", FLAT)
def test_the_rule_is_that_of_pytorch(activation: str) -> None:
    """Where both say the same: torch has two answers at NaN, by whether a value is alone or in a vector."""
    case, inputs = depthwise_row(activation, torch.float32)
    found = testing.evaluate(case.function(reference), inputs, torch.ones(case.output_shape))["d_x"].flatten()
    known = ~corner_values(torch.float32).isnan()
    torch.testing.assert_close(found[known].double(), slopes(activation, corner_values(torch.float32))[known])


@pytest.mark.parametrize("d_y", [1.0, -2.0, INF])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", FLAT)
def test_native(activation: str, dtype: torch.dtype, d_y: float, isa: str) -> None:
    case, inputs = depthwise_row(activation, dtype)
    d_output = torch.full(case.output_shape, d_y, dtype=dtype)
    with mf_kernels.use_backend("native"), mf_kernels.record_kernels() as record:
        results = testing.evaluate(case.function(mf_kernels), inputs, d_output)
    assert record.counts[f"depthwise_conv2d_bwd:native:cpu:{isa}"] == 1
    assert_slopes(activation, results, d_y)


@needs_emulator
@pytest.mark.parametrize("d_y", [1.0, -2.0, INF])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", FLAT)
def test_emulated_cuda(activation: str, dtype: torch.dtype, d_y: float) -> None:
    case, inputs = depthwise_row(activation, dtype)
    d_output = torch.full(case.output_shape, d_y, dtype=dtype)
    results = emulator_support._EVALUATE["depthwise_conv2d"](inputs, d_output, case.options, False)
    assert_slopes(activation, results, d_y)


def assert_as_reference(results: dict[str, torch.Tensor], d_y: float) -> None:
    case, inputs = dynamic_relu_row()
    expected = testing.evaluate(case.function(reference), inputs, torch.full(case.output_shape, d_y))
    for name in expected:
        torch.testing.assert_close(results[name], expected[name], rtol=1e-5, atol=1e-6)


def test_native_dynamic_relu(isa: str) -> None:
    case, inputs = dynamic_relu_row()
    with mf_kernels.use_backend("native"), mf_kernels.record_kernels() as record:
        results = testing.evaluate(case.function(mf_kernels), inputs, torch.full(case.output_shape, 2.0))
    assert record.counts[f"dynamic_relu_bwd:native:cpu:{isa}"] == 1
    assert_as_reference(results, 2.0)


@needs_emulator
def test_emulated_dynamic_relu() -> None:
    case, inputs = dynamic_relu_row()
    d_output = torch.full(case.output_shape, 2.0)
    assert_as_reference(emulator_support._EVALUATE["dynamic_relu"](inputs, d_output, {}, False), 2.0)


def test_a_flat_hard_sigmoid_keeps_an_infinite_gradient_from_theta() -> None:
    """Not inf * 0: torch.clamp gives 0 there, whatever comes from above."""
    inputs = {"x": torch.full((1, 1, 1, 4), 1e38), "theta": torch.tensor([[4.0, -4.0]])}
    d_output = torch.full((1, 1, 1, 4), 1e38)
    ways = {"native": testing.evaluate(mf_kernels.dynamic_relu, inputs, d_output)}
    if not emulator_support.missing():
        ways["emulated CUDA"] = emulator_support._EVALUATE["dynamic_relu"](inputs, d_output, {}, False)
    for way, results in ways.items():
        assert results["d_theta"].tolist() == [[0.0, 0.0]], way
