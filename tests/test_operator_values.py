"""Values that arithmetic treats apart: NaN and infinity, scores far apart, the corners at which a slope jumps.

What is called is `operator_backends.BACKENDS`: one rule for the CPU kernels, the CUDA kernels, Triton and PyTorch.
"""

from __future__ import annotations

import pytest
import slopes_support
import torch
import torch.nn.functional as F
from kernel_support import OPS
from operator_backends import BACKENDS, FLOAT32, FLOAT64, Backend, Results
from operator_rows import SMALL
from torch import Tensor

from mf_kernels import reference, testing
from mf_kernels.testing import Case

NAN, INF = float("nan"), float("inf")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, which computes for Triton's interpreter
every_backend = pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
SMALLEST = [
    pytest.param(case, backend, id=f"{case.id}-{backend.name}") for backend in BACKENDS for case in backend.small
]


def of(op: str, inputs: Results, **options: object) -> Case:
    """The row that these arguments are of."""
    return Case(op, "values", {name: tuple(t.shape) for name, t in inputs.items()}, "values", options)


def rising(t: Tensor) -> Tensor:
    return torch.linspace(1, 2, t.numel(), dtype=t.dtype).view_as(t)


def assert_same_kinds(case: Case, backend: Backend, inputs: Results, told: object) -> None:
    """NaN, inf and -inf where the reference has them; everything else close to it."""
    actual = backend.evaluate(case, inputs, case.d_output(FLOAT32))["output"]
    expected = case.function(reference)(**inputs)
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        where = (kind(actual) != kind(expected)).nonzero().tolist()
        assert not where, f"{told}: {kind.__name__} differs at {where[:5]}"
    finite = expected.isfinite()
    torch.testing.assert_close(actual[finite], expected[finite], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize(("case", "backend"), SMALLEST)
def test_a_value_that_is_not_finite_spreads_as_in_the_reference(case: Case, backend: Backend, value: float) -> None:
    """One such element in the first, a middle and the last place of each argument.

    But not of a filter: whether the padding's zeros are multiplied by it is nobody's promise.
    """
    for layout in testing.LAYOUTS[:2]:
        for name in case.shapes.keys() - {"weight"}:
            for place in (0.5,) if backend.few else (0.0, 0.5, 1.0):
                inputs = case.inputs(FLOAT32)
                flat = inputs[name].view(-1)
                flat[int(place * (flat.numel() - 1))] = value
                placed = {n: testing.in_layout(t, layout) for n, t in inputs.items()}
                assert_same_kinds(case, backend, placed, (layout, name, place))


@every_backend
@pytest.mark.parametrize("op", OPS)
def test_any_bits_of_nan_are_nan(op: str, backend: Backend) -> None:
    for bits in (-1, 0x7F800001) if backend.few else (-1, 0x7FFFFFFF, 0x7F800001, 0x7FC00000):
        inputs = SMALL[op].inputs(FLOAT32)
        inputs["x"].view(torch.int32).view(-1)[3] = bits
        assert_same_kinds(SMALL[op], backend, inputs, hex(bits))


@every_backend
def test_slope_zero_times_infinity_is_nan(backend: Backend) -> None:
    """theta2 = 0 is a second slope of 0: 0 times inf is NaN, and the maximum with NaN is NaN."""
    for value in (INF, -INF):
        inputs = {"x": torch.full((1, 1, 3, 7), value), "theta": torch.zeros(1, 2)}
        case = of("dynamic_relu", inputs)
        assert backend.evaluate(case, inputs, case.d_output(FLOAT32))["output"].isnan().all()


@every_backend
@pytest.mark.parametrize("size", [1e4, 1e18], ids=str)
@pytest.mark.parametrize("op", OPS[:2])
def test_scores_far_apart(op: str, size: float, backend: Backend) -> None:
    """Softmax that saturates: where one term is 1 the others underflow and pass no gradient at all.

    Scores of 10^4 are rounded to 10^-3, and so are the terms. The scale and log2(e), folded into the tokens, round them
    more often than plain PyTorch does, and how well two equal sums then cancel in their gradient is a matter of the
    order in which a processor's matrix products add; so the budget is four times the usual one.
    """
    case = SMALL[op]
    for layout in testing.LAYOUTS[:2]:
        inputs, d_output = case.inputs(FLOAT32, layout=layout), case.d_output(FLOAT32, layout=layout)
        inputs["q" if op == "mobile_to_former" else "k"] *= size
        actual = backend.evaluate(case, inputs, d_output)
        assert all(t.isfinite().all() for t in actual.values())
        # Above 10^4 the gradient of a score is the rounding of two equal sums, times 10^18
        told = ["output"] if size > 1e4 else list(actual)
        assert_within_four_budgets(backend, case, inputs, d_output, actual, only=told)


def assert_within_four_budgets(
    backend: Backend, case: Case, inputs: Results, d_output: Tensor, actual: Results, only: list[str]
) -> None:
    function = case.function(reference)
    truth = testing.evaluate(function, {name: t.double() for name, t in inputs.items()}, d_output.double())
    eager = testing.evaluate(function, inputs, d_output)
    saved = backend.saves_exponents and case.op == "mobile_to_former"
    rounding = testing.saved_exponent(case, inputs) * 2.0**-24 if saved else 0.0
    for name in only:
        size = testing.error(torch.zeros_like(truth[name]), truth[name])
        more = [rounding * s if name.startswith("d_") else 0.0 for s in size]
        budget = testing.budget(eager[name], truth[name], FLOAT32)
        allowed = testing.Error(*(4 * b + m for b, m in zip(budget, more, strict=True)))
        testing.assert_close(name, actual[name], truth[name], allowed, FLOAT32)


@every_backend
@pytest.mark.parametrize("op", OPS[:2])
def test_scores_far_below_zero(op: str, backend: Backend) -> None:
    """What fills up a vector of positions, or of tokens, has scores of 0: it is not the largest of these."""
    case, dtype = SMALL[op], backend.exact
    inputs = {name: t.abs() for name, t in case.inputs(dtype).items()}
    inputs["q" if op == "mobile_to_former" else "k"] *= -1e4
    d_output = case.d_output(dtype)
    actual = backend.evaluate(case, inputs, d_output)
    if dtype == FLOAT32:
        # Where one term is all of the softmax, the gradient of its score is the rounding of two equal sums
        assert all(t.isfinite().all() for t in actual.values())
        wanted = ["output", "d_v"] if op == "former_to_mobile" else ["output"]
        assert_within_four_budgets(backend, case, inputs, d_output, actual, only=wanted)
        return
    for name, t in testing.evaluate(case.function(reference), inputs, d_output).items():
        torch.testing.assert_close(actual[name], t, rtol=1e-9, atol=1e-9)


@every_backend
@pytest.mark.parametrize(("dtype", "limit"), [(FLOAT32, 128), (FLOAT64, 1024)], ids=str)
def test_scores_whose_distance_from_zero_overflows(dtype: torch.dtype, limit: int, backend: Backend) -> None:
    """All scores near -limit ln 2: from there to the 0 of what fills up a vector, e^x leaves the range of the dtype."""
    if dtype not in backend.looks:
        return
    q = torch.linspace(-1.02, -0.98, 8, dtype=dtype).view(1, 8, 1) * limit * 0.6931
    inputs = {"x": torch.ones(1, 1, 1, 3, dtype=dtype), "q": q}
    case = of("mobile_to_former", inputs, num_heads=1)
    actual = backend.evaluate(case, inputs, torch.ones_like(q))
    for name, t in testing.evaluate(case.function(reference), inputs, torch.ones_like(q)).items():
        torch.testing.assert_close(actual[name], t, rtol=1e-5, atol=1e-5)


@every_backend
def test_a_huge_value_without_weight_adds_nothing(backend: Backend) -> None:
    """A softmax term that underflows is 0, not something small: 1e35 times it must not be seen."""
    x = torch.ones(1, 1, 1, 40)
    x[..., 17] = -1e35
    inputs = {"x": x, "q": torch.ones(1, 1, 1)}
    case = of("mobile_to_former", inputs, num_heads=1)
    assert backend.evaluate(case, inputs, torch.ones(1, 1, 1))["output"].item() == 1.0


@every_backend
def test_equal_scores_give_the_mean(backend: Backend) -> None:
    for dtype in backend.looks:
        tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
        x = SMALL["mobile_to_former"].inputs(dtype)["x"]
        inputs = {"x": x, "q": torch.zeros(2, 6, 14, dtype=dtype)}
        gathered = evaluated(backend, of("mobile_to_former", inputs, num_heads=2), inputs)
        mean = x.double().mean((2, 3))[:, None].expand(gathered.shape)
        torch.testing.assert_close(gathered.double(), mean, rtol=tolerance, atol=tolerance)

        v = SMALL["former_to_mobile"].inputs(dtype)["v"]
        inputs = {"x": torch.zeros_like(x), "k": torch.ones_like(v), "v": v}
        spread = evaluated(backend, of("former_to_mobile", inputs, num_heads=2), inputs)
        mean = v.double().mean(1)[:, :, None, None].expand(spread.shape)
        torch.testing.assert_close(spread.double(), mean, rtol=tolerance, atol=tolerance)


def evaluated(backend: Backend, case: Case, inputs: Results) -> Tensor:
    return backend.evaluate(case, inputs, case.d_output(inputs["x"].dtype))["output"]


def by_group(case: Case, name: str, t: Tensor) -> Tensor:
    """(B, groups, rest): groups are the heads of attention, else the channels of x; B = 1 for filters."""
    channels = case.shapes["x"][1]
    if name.endswith(("weight", "bias")):
        return t.reshape(1, channels, -1)
    if t.dim() == 2:  # theta
        t = t.unflatten(1, (2, channels))
    if t.dim() == 3:  # tokens, and theta
        t = t.movedim(2, 1)
    return t.reshape(t.shape[0], case.options.get("num_heads", channels), -1)


@pytest.mark.parametrize(("case", "backend"), SMALLEST)
def test_nan_stays_in_its_sample_and_channel(case: Case, backend: Backend) -> None:
    """In an argument or the output's gradient, it changes no bit of another sample or group of channels."""
    for layout in testing.LAYOUTS[: 1 if backend.few else 2]:
        for name in ("x", "d_output") if backend.few else (*case.shapes, "d_output"):
            results = []
            for value in (None, NAN):
                tensors = case.inputs(FLOAT32) | {"d_output": case.d_output(FLOAT32)}
                index = by_group(case, name, torch.arange(tensors[name].numel()).view_as(tensors[name]))
                if value is not None:
                    tensors[name].view(-1)[index[0, 1, 0]] = value
                placed = {n: testing.in_layout(t, layout) for n, t in tensors.items()}
                results.append(backend.evaluate(case, placed, placed.pop("d_output")))
            for result in results[0]:
                clean, dirty = (by_group(case, result, r[result]) for r in results)
                others = torch.ones(clean.shape[:2], dtype=torch.bool)
                others[0 if index.shape[0] > 1 else slice(None), 1] = False
                assert torch.equal(dirty[others], clean[others]), f"{layout}: NaN in {name}: {result}"


@pytest.mark.parametrize("activation", slopes_support.FLAT)
def test_the_rule_is_that_of_pytorch(activation: str) -> None:
    """Where both say the same: torch has two answers at NaN, by whether a value is alone or in a vector."""
    values = slopes_support.corner_values(FLOAT32)
    case, inputs = slopes_support.depthwise_row(activation, FLOAT32)
    found = testing.evaluate(case.function(reference), inputs, torch.ones(case.output_shape))["d_x"].flatten()
    known = ~values.isnan()
    torch.testing.assert_close(found[known].double(), slopes_support.slopes(activation, values)[known])


@every_backend
@pytest.mark.parametrize("dtype", [FLOAT32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", slopes_support.FLAT)
def test_slopes_at_the_corners(activation: str, dtype: torch.dtype, backend: Backend) -> None:
    case, inputs = slopes_support.depthwise_row(activation, dtype)
    for d_y in (1.0, -2.0, INF):
        results = backend.evaluate(case, inputs, torch.full(case.output_shape, d_y, dtype=dtype))
        slopes_support.assert_slopes(activation, results, d_y)


def assert_as_the_reference(backend: Backend, case: Case, inputs: Results, d_output: Tensor) -> Results:
    actual = backend.evaluate(case, inputs, d_output)
    for name, expected in testing.evaluate(case.function(reference), inputs, d_output).items():
        torch.testing.assert_close(actual[name], expected, rtol=1e-5, atol=1e-6, equal_nan=True, msg=f"{name} differs")
    return actual


@every_backend
@pytest.mark.parametrize(("activation", "corners"), [("relu6", (0.0, 6.0)), ("hardswish", (-3.0, 3.0))])
def test_corners_all_over_a_map(activation: str, corners: tuple[float, float], backend: Backend) -> None:
    """Sums that are exactly at a corner, one float below and one above take the slope that torch takes."""
    around = [torch.nextafter(torch.tensor(c), torch.tensor(to)) for c in corners for to in (-9.0, c, 9.0)]
    channels, times = (3, 1) if backend.few else (18, 3)
    x = torch.stack(around).repeat(1, channels, times, times)
    weight = torch.zeros(channels, 1, 3, 3)
    weight[:, :, 1, 1] = 1
    leaf = x.clone().requires_grad_()
    act = {"relu6": F.relu6, "hardswish": F.hardswish}[activation]
    (expected,) = torch.autograd.grad(act(leaf).sum(), leaf)
    for layout in testing.LAYOUTS[: 1 if backend.few else 2]:
        inputs = {"x": testing.in_layout(x, layout), "weight": weight, "bias": torch.zeros(channels)}
        case = of("depthwise_conv2d", inputs, stride=1, activation=activation)
        assert_as_the_reference(backend, case, inputs, testing.in_layout(rising(x), layout))
        ones = torch.ones_like(inputs["x"])
        torch.testing.assert_close(backend.evaluate(case, inputs, ones)["d_x"], expected)


@every_backend
def test_dynamic_relu_at_the_corners(backend: Backend) -> None:
    case, inputs = slopes_support.dynamic_relu_row()
    assert_as_the_reference(backend, case, inputs, torch.full(case.output_shape, 2.0))


@every_backend
def test_slopes_at_the_ends_of_their_range(backend: Backend) -> None:
    """theta of exactly -3 and 3, where torch.clamp passes the gradient, and the next floats beyond."""
    ends = torch.tensor([-3.0, 3.0])
    beyond = torch.nextafter(ends, 10 * ends)
    theta = torch.cartesian_prod(torch.cat([ends, beyond]), torch.cat([ends, beyond])).T.reshape(1, 32)
    inputs = {"x": torch.randn(1, 16, 3, 5, generator=torch.Generator().manual_seed(5)), "theta": theta}
    assert_as_the_reference(backend, of("dynamic_relu", inputs), inputs, rising(inputs["x"]))


@every_backend
def test_two_equal_lines_share_the_gradient(backend: Backend) -> None:
    """x = 0, and a1 = a2 (theta1 = -3/2 and theta2 = 3/2, both slopes 1/2), as torch.maximum."""
    generator = torch.Generator().manual_seed(6)
    equal = torch.cat([torch.full((2, 5), -1.5), torch.full((2, 5), 1.5)], dim=1)
    for x, theta in (
        (torch.zeros(2, 5, 3, 7), torch.randn(2, 10, generator=generator)),
        (torch.randn(2, 5, 3, 7, generator=generator), equal),
        (torch.tensor([0.0, -1.0, 2.0, 0.0]).view(1, 2, 1, 2), torch.tensor([[0.0, 0.5, 3.0, 0.25]])),
    ):
        for layout in testing.LAYOUTS[:2]:
            inputs = {"x": testing.in_layout(x, layout), "theta": theta}
            d_output = testing.in_layout(rising(x), layout)
            assert_as_the_reference(backend, of("dynamic_relu", inputs), inputs, d_output)


@every_backend
def test_nan_beside_ties_of_the_dynamic_relu(backend: Backend) -> None:
    """NaN comes out where it goes in and nowhere else; what its own gradient is, is nobody's promise."""
    x = torch.tensor([0.0, 1.0, -2.0, NAN]).repeat(8).view(1, 2, 4, 4)
    known = ~x.isnan()
    for layout in testing.LAYOUTS[:2]:
        inputs = {"x": testing.in_layout(x, layout), "theta": torch.tensor([[-1.5, 1.0, 1.5, 0.0]])}
        case, d_output = of("dynamic_relu", inputs), testing.in_layout(torch.ones_like(x), layout)
        actual = backend.evaluate(case, inputs, d_output)
        expected = testing.evaluate(case.function(reference), inputs, d_output)
        torch.testing.assert_close(actual["output"], expected["output"], equal_nan=True, rtol=1e-6, atol=0)
        torch.testing.assert_close(actual["d_x"][known], expected["d_x"][known], rtol=1e-6, atol=0)


@every_backend
def test_a_clamped_slope_has_no_gradient_whatever_x_is(backend: Backend) -> None:
    case = SMALL["dynamic_relu"]
    for value in (NAN, INF):
        x, theta = case.inputs(FLOAT32).values()
        x[:, :, 1, 2] = value
        theta[:, ::2], theta[:, 1::2] = 4, 0.5
        d_theta = backend.evaluate(case, {"x": x, "theta": theta}, torch.ones_like(x))["d_theta"]
        assert (d_theta[:, ::2] == 0).all(), value
        assert not d_theta[:, 1::2].isfinite().any(), value


@every_backend
def test_a_flat_hard_sigmoid_keeps_an_infinite_gradient_from_theta(backend: Backend) -> None:
    """Not inf * 0: torch.clamp gives 0 there, whatever comes from above."""
    inputs = {"x": torch.full((1, 1, 1, 4), 1e38), "theta": torch.tensor([[4.0, -4.0]])}
    results = backend.evaluate(of("dynamic_relu", inputs), inputs, torch.full((1, 1, 1, 4), 1e38))
    assert results["d_theta"].tolist() == [[0.0, 0.0]]
