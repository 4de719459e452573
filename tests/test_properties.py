"""Any shape, any strides: operators equal their references in float64, forward and backward; samples are alone."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_support import native, runnable
from torch import Tensor

import mf_kernels
from mf_kernels import _native, record_kernels, reference, testing

EXAMPLES = settings(max_examples=150, deadline=None, derandomize=True, database=None)


@st.composite
def strided(draw: st.DrawFn, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Normal values of that shape in some order of axes, with gaps of NaN, beginnings and steps, or step 0."""
    dims = len(shape)
    order = draw(st.permutations(range(dims)))
    steps = [draw(st.sampled_from((1, 1, 1, 2, 3))) for _ in shape]
    first = [draw(st.integers(0, 2)) for _ in shape]
    expanded = [draw(st.integers(0, 9)) == 0 for _ in shape]
    sizes = [1 if e else n for n, e in zip(shape, expanded, strict=True)]
    extents = [f + n * s for n, s, f in zip(sizes, steps, first, strict=True)]
    buffer = torch.full([extents[axis] for axis in order], float("nan"), dtype=torch.float64)
    view = buffer.permute([order.index(axis) for axis in range(dims)])
    view = view[tuple(slice(f, f + n * s, s) for n, s, f in zip(sizes, steps, first, strict=True))]
    return view.copy_(torch.randn(sizes, generator=generator, dtype=torch.float64)).expand(shape)


@st.composite
def calls(draw: st.DrawFn, op: str) -> tuple[testing.Case, dict[str, Tensor], Tensor, str]:
    """A row that is in no table, its arguments, the gradient of its output, and the instruction set to serve it."""
    B, H, W = draw(st.integers(0, 3)), draw(st.integers(1, 40)), draw(st.integers(1, 20))
    options: dict[str, object] = {}
    if op == "dynamic_relu":
        C = draw(st.integers(1, 70))
        shapes = {"x": (B, C, H, W), "theta": (B, 2 * C)}
    elif op == "spatial_dynamic_relu":
        C, M = draw(st.integers(1, 70)), draw(st.integers(1, 8))
        shapes = {"x": (B, C, H, W), "theta": (B, M, 2 * C), "alpha": (B, M, H, W)}
    elif op == "depthwise_conv2d":
        C, mult, K = draw(st.integers(1, 20)), draw(st.integers(1, 6)), draw(st.sampled_from((3, 5)))
        shapes = {"x": (B, C, H, W), "weight": (C * mult, 1, K, K)}
        if draw(st.booleans()):
            shapes["bias"] = (C * mult,)
        options["stride"] = draw(st.sampled_from((1, 2)))
        options["activation"] = draw(st.sampled_from(("hardswish", "relu6", "identity")))
    else:
        options["num_heads"] = heads = draw(st.sampled_from((1, 2, 4)))
        C, M = heads * draw(st.integers(1, 20)), draw(st.integers(1, 8))
        tokens = ("q",) if op == "mobile_to_former" else ("k", "v")
        shapes = {"x": (B, C, H, W)} | dict.fromkeys(tokens, (B, M, C))
    case = testing.Case(op, "drawn", shapes, "any", options)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    inputs = {name: draw(strided(shape, generator)) for name, shape in shapes.items()}
    d_output = draw(strided(case.output_shape, generator))
    return case, inputs, d_output, draw(st.sampled_from(runnable()))


def check(call: tuple[testing.Case, dict[str, Tensor], Tensor, str]) -> None:
    case, inputs, d_output, isa = call
    before = _native.cpu_report()["isa"]
    _native.set_cpu_isa(isa)
    try:
        with record_kernels() as record:
            results = testing.evaluate(case.function(mf_kernels), inputs, d_output)
        assert record.counts == native(f"{case.op}_fwd", f"{case.op}_bwd", isa=isa)
        alone = case.function(mf_kernels)(**first_sample(inputs)) if d_output.shape[0] else None
    finally:
        _native.set_cpu_isa(before)
    for name, truth in testing.evaluate(case.function(reference), inputs, d_output).items():
        size = testing.error(0 * truth, truth).largest
        allowed = 1e-11 * (1 + size)
        testing.assert_close(name, results[name], truth, testing.Error(allowed, allowed), torch.float64)
    if alone is not None:
        assert torch.equal(results["output"][:1], alone)


def first_sample(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t if name in ("weight", "bias") else t[:1] for name, t in inputs.items()}


@EXAMPLES
@given(calls("mobile_to_former"))
def test_mobile_to_former(call) -> None:
    check(call)


@EXAMPLES
@given(calls("former_to_mobile"))
def test_former_to_mobile(call) -> None:
    check(call)


@EXAMPLES
@given(calls("dynamic_relu"))
def test_dynamic_relu(call) -> None:
    check(call)


@EXAMPLES
@given(calls("spatial_dynamic_relu"))
def test_spatial_dynamic_relu(call) -> None:
    check(call)


@EXAMPLES
@given(calls("depthwise_conv2d"))
def test_depthwise_conv2d(call) -> None:
    check(call)
