"""The CUDA kernels on the host: every row that is there for a branch, forward and backward, against float64."""

from __future__ import annotations

import dataclasses
from collections import Counter

import emulator_support
import pytest
import torch
from kernel_support import CUDA_OPS

from mf_kernels import reference, testing

pytestmark = pytest.mark.skipif(bool(emulator_support.missing()), reason=emulator_support.missing())

LAYOUTS = ("contiguous", "channels_last", "unaligned")


def _row(op: str, reaches: str, shapes: dict[str, tuple[int, ...]], **options: object) -> testing.Case:
    name = "x".join(map(str, shapes["x"]))
    return testing.Case(op, f"cuda-{name}", shapes, reaches, options)


def _attention(op: str, reaches: str, B: int, C: int, H: int, W: int, M: int, N: int) -> testing.Case:
    tokens = {"q": (B, M, C)} if op == "mobile_to_former" else {"k": (B, M, C), "v": (B, M, C)}
    return _row(op, reaches, {"x": (B, C, H, W), **tokens}, num_heads=N)


def _depthwise(reaches: str, B: int, C: int, H: int, W: int, mult: int, stride: int, activation: str) -> testing.Case:
    shapes = {"x": (B, C, H, W), "weight": (C * mult, 1, 3, 3), "bias": (C * mult,)}
    return _row("depthwise_conv2d", reaches, shapes, stride=stride, activation=activation)


# Branches of the grid that the rows for the CPU kernels do not reach
ROWS = [
    _row("dynamic_relu", "more columns than a block has threads", {"x": (1, 2080, 1, 8), "theta": (1, 4160)}),
    _row("dynamic_relu", "more columns of single values", {"x": (2, 523, 1, 3), "theta": (2, 1046)}),
    _row("dynamic_relu", "rows of two and of four positions", {"x": (2, 12, 4, 8), "theta": (2, 24)}),
    _row("dynamic_relu", "planes in parts", {"x": (1, 2, 96, 181), "theta": (1, 4)}),
    *(
        _attention(op, reaches, *shape)
        for op in ("mobile_to_former", "former_to_mobile")
        for reaches, shape in (
            ("16 bytes of channels; 3 lanes of a group of 4 have some", (2, 48, 5, 8, 6, 2)),
            ("8 bytes of channels in half precision; 3 tokens", (1, 24, 8, 8, 3, 2)),
            ("three heads: some groups of a block stay empty", (1, 48, 4, 4, 7, 3)),
            ("all 32 lanes of a group", (1, 256, 3, 8, 4, 1)),
            ("several steps of a part", (1, 16, 72, 72, 6, 2)),
            ("no tokens compiled for: 5 of 6; many samples", (9, 8, 4, 4, 5, 1)),
        )
    ),
    _depthwise("16 bytes of columns", 2, 3, 6, 16, 1, 1, "hardswish"),
    _depthwise("16 bytes of columns, stride 2", 1, 2, 9, 32, 1, 2, "relu6"),
    _depthwise("16 bytes of columns, 2 filters a channel", 1, 2, 5, 16, 2, 1, "identity"),
    _depthwise("16 bytes of channels, 3 filters a channel", 1, 8, 5, 6, 3, 2, "identity"),
    _depthwise("more channels than a block holds", 1, 288, 3, 5, 1, 1, "hardswish"),
    _depthwise("tiles in parts, many samples", 5, 8, 33, 31, 1, 1, "relu6"),
]
CASES = [case for case in testing.CASES if not case.layer_of and case.op in CUDA_OPS] + ROWS


@pytest.mark.parametrize("dtype", list(emulator_support.DTYPES), ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_kernels_against_float64(case: testing.Case, dtype: torch.dtype) -> None:
    expected = testing.expectation(case, dtype)
    allowed = testing.with_saved_exponents(case, dtype, expected)
    # Without alignment every dtype takes the same way, one value a load
    for layout in LAYOUTS if dtype == torch.float32 else LAYOUTS[:2]:
        for name, actual in emulator_support.evaluate(case, dtype, layout).items():
            testing.assert_close(f"{layout}: {name}", actual, expected.truth[name], allowed[name], dtype)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("op", CUDA_OPS)
def test_the_same_bits_every_time(op: str, layout: str) -> None:
    case = next(case for case in ROWS if case.op == op)
    first, second = (emulator_support.evaluate(case, torch.float32, layout) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_ties_and_nan_of_the_dynamic_relu(layout: str) -> None:
    """x = 0 is a tie, theta of 0 and 3/2 another one; NaN comes out where it goes in and nowhere else."""
    x = torch.tensor([0.0, 1.0, -2.0, float("nan")]).repeat(8).view(1, 2, 4, 4)
    theta = torch.tensor([[-1.5, 1.0, 1.5, 0.0]])
    inputs = {"x": testing.in_layout(x, layout), "theta": theta}
    d_y = testing.in_layout(torch.ones_like(x), layout)
    actual = emulator_support._EVALUATE["dynamic_relu"](inputs, d_y, {}, layout == "channels_last")
    expected = testing.evaluate(reference.dynamic_relu, inputs, d_y)
    torch.testing.assert_close(actual["output"], expected["output"], equal_nan=True, rtol=1e-6, atol=0)
    known = ~x.isnan()
    torch.testing.assert_close(actual["d_x"][known], expected["d_x"][known], rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("op", ["mobile_to_former", "former_to_mobile"])
@pytest.mark.parametrize("size", [1e4, 1e18])
def test_scores_far_apart(op: str, layout: str, size: float) -> None:
    """A softmax that saturates: one term is 1, the others underflow, and nothing becomes NaN."""
    case = next(case for case in ROWS if case.op == op)
    inputs = case.inputs(torch.float32, layout=layout)
    inputs["q" if op == "mobile_to_former" else "k"] *= size
    d_output = case.d_output(torch.float32, layout=layout)
    actual = emulator_support._EVALUATE[op](inputs, d_output, case.options, layout == "channels_last")
    wide = {name: t.double() for name, t in inputs.items()}
    truth = case.function(reference)(**wide)
    torch.testing.assert_close(actual["output"].double(), truth, rtol=1e-3, atol=1e-3)
    assert all(t.isfinite().all() for t in actual.values())


def test_every_branch_has_a_row() -> None:
    """No two rows of the same operator and shape, or one of them tests nothing."""
    counts = Counter((case.op, str(case.shapes), str(case.options)) for case in CASES)
    assert max(counts.values()) == 1
    assert all(dataclasses.replace(case).reaches for case in CASES)
