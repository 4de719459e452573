"""Every row forward, in every layout, dtype and instruction set; and values that arithmetic treats apart."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernel_support import OPS, SMALL, native
from torch import Tensor

import mf_kernels
from mf_kernels import reference, testing

FILTERS = [case for case in testing.CASES if "filters a channel" in case.reaches]
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
NAN, INF = float("nan"), float("inf")

# Real layers are large, and differ from the small rows in their size only: two layouts tell.
GRID = [
    pytest.param(case, layout, id=f"{case.id}-{layout}")
    for case in testing.CASES
    for layout in (testing.LAYOUTS[:2] if case.layer_of else testing.LAYOUTS)
]


def is_channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("case", "layout"), GRID)
def test_forward(case: testing.Case, layout: str, dtype: torch.dtype, isa: str) -> None:
    inputs = case.inputs(dtype, layout=layout)
    with mf_kernels.record_kernels() as record:
        results = testing.evaluate(case.function(mf_kernels), inputs)
    testing.assert_within_budget(case, dtype, results)
    assert record.counts == native(f"{case.op}_fwd", isa=isa)
    output = results["output"]
    if output.dim() == 4 and is_channels_last(inputs["x"]):
        assert output.is_contiguous(memory_format=torch.channels_last)
    else:
        assert output.is_contiguous()


@pytest.mark.parametrize("axes", [(0,), (2,), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_expanded_inputs(op: str, axes: tuple[int, ...]) -> None:
    """Elements that share their memory: step 0 along some axes of x, and along the last one of the others."""
    inputs = SMALL[op].inputs(torch.float64)
    x = inputs["x"]
    for axis in axes:
        x = x.narrow(axis, 0, 1)
    expanded = {name: t[..., :1].expand(t.shape) for name, t in inputs.items()}
    expanded["x"] = x.expand(inputs["x"].shape)
    with mf_kernels.use_backend("native"):
        actual = SMALL[op].function(mf_kernels)(**expanded)
    torch.testing.assert_close(actual, SMALL[op].function(reference)(**expanded), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("op", OPS)
def test_negated_view(op: str) -> None:
    """x = the imaginary part of a conjugate: torch stores the positive values and a bit that says minus."""
    inputs = SMALL[op].inputs(torch.float64)
    negated = torch.complex(torch.zeros_like(inputs["x"]), -inputs["x"]).conj().imag
    assert negated.is_neg()
    with mf_kernels.use_backend("native"):
        actual = SMALL[op].function(mf_kernels)(**inputs | {"x": negated})
        assert torch.equal(actual, SMALL[op].function(mf_kernels)(**inputs))


def test_operators_do_not_write_to_their_inputs() -> None:
    for case in SMALL.values():
        inputs, d_output = case.inputs(torch.float32), case.d_output(torch.float32)
        before = {name: t.clone() for name, t in (*inputs.items(), ("d_output", d_output))}
        testing.evaluate(case.function(mf_kernels), inputs, d_output)
        assert all(torch.equal(t, before[name]) for name, t in (*inputs.items(), ("d_output", d_output)))


def assert_same_kinds(case: testing.Case, inputs: dict[str, Tensor]) -> None:
    """NaN, inf and -inf where the reference has them; everything else close to it."""
    with mf_kernels.use_backend("native"):
        actual = case.function(mf_kernels)(**inputs)
    expected = case.function(reference)(**inputs)
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        where = (kind(actual) != kind(expected)).nonzero().tolist()
        assert not where, f"{kind.__name__} differs at {where[:5]}"
    finite = expected.isfinite()
    torch.testing.assert_close(actual[finite], expected[finite], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("case", [*SMALL.values(), *FILTERS], ids=lambda case: case.id)
def test_a_value_that_is_not_finite_spreads_as_in_the_reference(
    case: testing.Case, value: float, layout: str, isa: str
) -> None:
    """One such element in the first, a middle and the last place of each argument.

    But not of a filter: whether the padding's zeros are multiplied by it is nobody's promise.
    """
    for name in case.shapes.keys() - {"weight"}:
        for place in (0.0, 0.5, 1.0):
            inputs = case.inputs(torch.float32)
            flat = inputs[name].view(-1)
            flat[int(place * (flat.numel() - 1))] = value
            assert_same_kinds(case, {n: testing.in_layout(t, layout) for n, t in inputs.items()})


@pytest.mark.parametrize("bits", [-1, 0x7FFFFFFF, 0x7F800001, 0x7FC00000])
@pytest.mark.parametrize("op", OPS)
def test_any_bits_of_nan_are_nan(op: str, bits: int, isa: str) -> None:
    inputs = SMALL[op].inputs(torch.float32)
    inputs["x"].view(torch.int32).view(-1)[3] = bits
    assert_same_kinds(SMALL[op], inputs)


def test_slope_zero_times_infinity_is_nan(isa: str) -> None:
    """theta2 = 0 is a second slope of 0: 0 times inf is NaN, and the maximum with NaN is NaN."""
    x, theta = torch.full((1, 1, 3, 7), INF), torch.zeros(1, 2)
    assert mf_kernels.dynamic_relu(x, theta).isnan().all()
    assert mf_kernels.dynamic_relu(-x, theta).isnan().all()


@pytest.mark.parametrize("size", [1e4, 1e18], ids=str)
@pytest.mark.parametrize("op", OPS[:2])
def test_scores_far_apart(op: str, size: float, isa: str) -> None:
    """Softmax that saturates: where one term is 1 the others underflow and pass no gradient at all.

    Scores of 10^4 are rounded to 10^-3, and so are the terms. The scale and log2(e), folded into the tokens,
    round them more often than plain PyTorch does; so the budget is four times the usual one.
    """
    case = SMALL[op]
    inputs, d_output = case.inputs(torch.float32), case.d_output(torch.float32)
    inputs["q" if op == "mobile_to_former" else "k"] *= size
    wide = {name: t.double() for name, t in inputs.items()}
    truth = testing.evaluate(case.function(reference), wide, d_output.double())
    eager = testing.evaluate(case.function(reference), inputs, d_output)
    actual = testing.evaluate(case.function(mf_kernels), inputs, d_output)
    for name, t in actual.items():
        if size > 1e4 and name.startswith("d_"):
            continue  # there the gradient of a score is the rounding of two equal sums, times 10^18
        typical, largest = testing.budget(eager[name], truth[name], torch.float32)
        testing.assert_close(name, t, truth[name], testing.Error(4 * typical, 4 * largest), torch.float32)


@pytest.mark.parametrize("op", OPS[:2])
def test_scores_far_below_zero(op: str, isa: str) -> None:
    """What fills up a vector of positions, or of tokens, has scores of 0: it is not the largest of these."""
    case = SMALL[op]
    inputs = {name: t.abs() for name, t in case.inputs(torch.float64).items()}
    inputs["q" if op == "mobile_to_former" else "k"] *= -1e4
    d_output = case.d_output(torch.float64)
    actual = testing.evaluate(case.function(mf_kernels), inputs, d_output)
    expected = testing.evaluate(case.function(reference), inputs, d_output)
    for name, t in expected.items():
        torch.testing.assert_close(actual[name], t, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 128), (torch.float64, 1024)], ids=str)
def test_scores_whose_distance_from_zero_overflows(dtype: torch.dtype, limit: int, isa: str) -> None:
    """All scores near -limit ln 2: from there to the 0 of what fills up a vector, e^x leaves the range of the dtype."""
    q = torch.linspace(-1.02, -0.98, 8, dtype=dtype).view(1, 8, 1) * limit * 0.6931
    tensors = {"x": torch.ones(1, 1, 1, 3, dtype=dtype), "q": q}
    case = testing.Case("mobile_to_former", "", {n: tuple(t.shape) for n, t in tensors.items()}, "", {"num_heads": 1})
    actual = testing.evaluate(case.function(mf_kernels), tensors, torch.ones_like(q))
    for name, t in testing.evaluate(case.function(reference), tensors, torch.ones_like(q)).items():
        torch.testing.assert_close(actual[name], t, rtol=1e-5, atol=1e-5)


def test_a_huge_value_without_weight_adds_nothing(isa: str) -> None:
    """A softmax term that underflows is 0, not something small: 1e35 times it must not be seen."""
    x = torch.ones(1, 1, 1, 40)
    x[..., 17] = -1e35
    assert mf_kernels.mobile_to_former(x, torch.ones(1, 1, 1), num_heads=1).item() == 1.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_scores_give_the_mean(dtype: torch.dtype, isa: str) -> None:
    case = SMALL["mobile_to_former"]
    x = case.inputs(dtype)["x"]
    gathered = mf_kernels.mobile_to_former(x, torch.zeros(2, 6, 14, dtype=dtype))
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    mean = x.double().mean((2, 3))[:, None].expand(gathered.shape)
    torch.testing.assert_close(gathered.double(), mean, rtol=tolerance, atol=tolerance)

    v = SMALL["former_to_mobile"].inputs(dtype)["v"]
    spread = mf_kernels.former_to_mobile(torch.zeros_like(x), torch.ones_like(v), v)
    mean = v.double().mean(1)[:, :, None, None].expand(spread.shape)
    torch.testing.assert_close(spread.double(), mean, rtol=tolerance, atol=tolerance)


SPLIT = [case for case in testing.CASES if any(n in case.reaches for n in ("spans", "strips", "task takes"))]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", [*SMALL.values(), *SPLIT], ids=lambda case: case.id)
def test_the_same_bits_from_any_number_of_threads(case: testing.Case, layout: str, isa: str) -> None:
    inputs = case.inputs(torch.float32, layout=layout)
    d_output = case.d_output(torch.float32, layout=layout)
    runs = []
    for threads in (1, 1, 2, 3):
        torch.set_num_threads(threads)
        try:
            runs.append(testing.evaluate(case.function(mf_kernels), inputs, d_output))
        finally:
            torch.set_num_threads(1)
    for run in runs[1:]:
        assert all(torch.equal(t, runs[0][name]) for name, t in run.items())


@pytest.mark.parametrize("variant", ["26m", "294m", "508m"])
def test_timed_rows_are_layers_of_the_model(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed under a variant's name is what that variant calls for images of 224 x 224."""
    from mobileformer import Model

    called = set()

    def signature(op: str, x: Tensor, *others: Tensor | None, **options) -> tuple:
        stride_heads = [value for name, value in options.items() if name in ("stride", "num_heads")]
        return op, tuple(x.shape[1:]), others[0].shape.numel() // others[0].shape[0], *stride_heads

    def spy(op: str) -> Callable[..., Tensor]:
        def call(*arguments: Tensor | None, **options) -> Tensor:
            called.add(signature(op, *arguments, **options))
            return getattr(reference, op)(*arguments, **options)

        return call

    for op in OPS:
        monkeypatch.setattr(mf_kernels, op, spy(op))
    # In training the model calls it through this one, which has a name of its own for it
    monkeypatch.setattr("mf_kernels.ops.batch_norm_activation.dynamic_relu", spy("dynamic_relu"))
    with torch.device("meta"):
        Model(variant)(torch.empty(2, 3, 224, 224))
        rows = [case for case in testing.TIMED if variant in case.layer_of]
        timed = {signature(c.op, *map(torch.empty, c.shapes.values()), **c.options) for c in rows}
    assert {op for op, *_ in timed} == set(OPS)
    assert timed <= called
