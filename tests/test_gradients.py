"""Every row's gradients, in every layout, dtype and instruction set; and how they behave inside autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from kernel_support import OPS, SMALL, native
from test_ops import DTYPES, GRID
from torch import Tensor

import mf_kernels
from mf_kernels import reference, testing


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("case", "layout"), GRID)
def test_gradients(case: testing.Case, layout: str, dtype: torch.dtype, isa: str) -> None:
    """Of every input; the output's gradient lies in another layout than the input, in turn in each."""
    other = testing.LAYOUTS[testing.LAYOUTS.index(layout) - 1]
    inputs, d_output = case.inputs(dtype, layout=layout), case.d_output(dtype, layout=other)
    with mf_kernels.record_kernels() as record:
        results = testing.evaluate(case.function(mf_kernels), inputs, d_output)
    # The baseline has no fused multiply-add, which PyTorch's own products use: each of its terms is rounded twice. How
    # near PyTorch comes, and with it the budget, differs from one make of processor to another.
    testing.assert_within_budget(case, dtype, results, slack=1.5 if isa == "baseline" else 1.0)
    assert record.counts == native(f"{case.op}_fwd", f"{case.op}_bwd", isa=isa)


def tiny(op: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    values = (torch.randn(s, generator=generator, dtype=torch.float64) for s in testing.TINY[op].values())
    return [t.to(dtype).requires_grad_() for t in values]


@pytest.mark.parametrize("op", OPS)
def test_gradcheck(op: str, isa: str) -> None:
    function = getattr(mf_kernels, op)
    with mf_kernels.use_backend("native"):
        assert torch.autograd.gradcheck(function, tiny(op), fast_mode=False)


@pytest.mark.parametrize("activation", ["hardswish", "relu6", "identity"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
def test_gradcheck_of_the_convolution(activation: str, stride: int, bias: bool) -> None:
    x, weight, offset = tiny("depthwise_conv2d")
    arguments = (x, weight, offset) if bias else (x, weight)

    def convolve(*tensors: Tensor) -> Tensor:
        return mf_kernels.depthwise_conv2d(*tensors, stride=stride, activation=activation)

    with mf_kernels.use_backend("native"):
        assert torch.autograd.gradcheck(convolve, arguments)


def assert_same_gradients(op: str, *tensors: Tensor, **options) -> None:
    gradients = []
    for module in (mf_kernels, reference):
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        y = getattr(module, op)(*leaves, **options)
        d_y = torch.linspace(1, 2, y.numel(), dtype=y.dtype).view_as(y)
        gradients.append(torch.autograd.grad(y, leaves, d_y))
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_two_equal_lines_share_the_gradient(isa: str) -> None:
    """x = 0, and a1 = a2 (theta1 = -3/2 and theta2 = 3/2, both slopes 1/2), as torch.maximum."""
    assert_same_gradients("dynamic_relu", torch.zeros(2, 5, 3, 7), torch.randn(2, 10))
    theta = torch.cat([torch.full((2, 5), -1.5), torch.full((2, 5), 1.5)], dim=1)
    assert_same_gradients("dynamic_relu", torch.randn(2, 5, 3, 7), theta)


def test_slopes_at_the_ends_of_their_range(isa: str) -> None:
    """theta of exactly -3 and 3, where torch.clamp passes the gradient, and the next floats beyond."""
    ends = torch.tensor([-3.0, 3.0])
    beyond = torch.nextafter(ends, 10 * ends)
    theta = torch.cartesian_prod(torch.cat([ends, beyond]), torch.cat([ends, beyond])).T.reshape(1, 32)
    assert_same_gradients("dynamic_relu", torch.randn(1, 16, 3, 5), theta)


@pytest.mark.parametrize(("activation", "corners"), [("relu6", (0.0, 6.0)), ("hardswish", (-3.0, 3.0))])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_corners_of_the_activations(activation: str, corners: tuple[float, float], layout: str, isa: str) -> None:
    """Sums that are exactly at a corner, one float below and one above take the slope that torch takes."""
    around = [torch.nextafter(torch.tensor(c), torch.tensor(to)) for c in corners for to in (-9.0, c, 9.0)]
    x = torch.stack(around).repeat(1, 18, 3, 3)
    weight = torch.zeros(18, 1, 3, 3)
    weight[:, :, 1, 1] = 1
    x = testing.in_layout(x, layout)
    assert_same_gradients("depthwise_conv2d", x, weight, torch.zeros(18), activation=activation)
    leaf = x.clone().requires_grad_()
    act = {"relu6": F.relu6, "hardswish": F.hardswish}[activation]
    (expected,) = torch.autograd.grad(act(leaf).sum(), leaf)
    y = mf_kernels.depthwise_conv2d(leaf, weight, activation=activation)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), leaf)[0], expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_a_clamped_slope_has_no_gradient_whatever_x_is(value: float, isa: str) -> None:
    x, theta = SMALL["dynamic_relu"].inputs(torch.float32).values()
    x[:, :, 1, 2] = value
    theta[:, ::2], theta[:, 1::2] = 4, 0.5
    theta.requires_grad_()
    (d_theta,) = torch.autograd.grad(mf_kernels.dynamic_relu(x, theta).sum(), theta)
    assert (d_theta[:, ::2] == 0).all()
    assert not d_theta[:, 1::2].isfinite().any()


def by_group(case: testing.Case, name: str, t: Tensor) -> Tensor:
    """(B, groups, rest): groups are the heads of attention, else the channels of x; B = 1 for filters."""
    channels = case.shapes["x"][1]
    if name.endswith(("weight", "bias")):
        return t.reshape(1, channels, -1)
    if t.dim() == 2:  # theta
        t = t.unflatten(1, (2, channels))
    if t.dim() == 3:  # tokens, and theta
        t = t.movedim(2, 1)
    return t.reshape(t.shape[0], case.options.get("num_heads", channels), -1)


LEAKS = [*SMALL.values(), *(case for case in testing.CASES if "filters a channel" in case.reaches)]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", LEAKS, ids=lambda case: case.id)
def test_nan_stays_in_its_sample_and_channel(case: testing.Case, layout: str, isa: str) -> None:
    """In an argument or the output's gradient, it changes no bit of another sample or group of channels."""
    for name in (*case.shapes, "d_output"):
        results = []
        for value in (None, float("nan")):
            tensors = case.inputs(torch.float32) | {"d_output": case.d_output(torch.float32)}
            index = by_group(case, name, torch.arange(tensors[name].numel()).view_as(tensors[name]))
            if value is not None:
                tensors[name].view(-1)[index[0, 1, 0]] = value
            placed = {n: testing.in_layout(t, layout) for n, t in tensors.items()}
            results.append(testing.evaluate(case.function(mf_kernels), placed, placed.pop("d_output")))
        for result in results[0]:
            clean, dirty = (by_group(case, result, r[result]) for r in results)
            others = torch.ones(clean.shape[:2], dtype=torch.bool)
            others[0 if index.shape[0] > 1 else slice(None), 1] = False
            assert torch.equal(dirty[others], clean[others]), f"NaN in {name}: {result}"


@pytest.mark.parametrize("op", OPS)
def test_expanded_gradient(op: str, isa: str) -> None:
    """The gradient of a sum is one element seen from everywhere."""
    sums = []
    for module in (mf_kernels, reference):
        leaves = tiny(op)
        getattr(module, op)(*leaves).sum().backward()
        sums.append([leaf.grad for leaf in leaves])
    for actual, expected in zip(*sums, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("op", OPS)
def test_gradients_of_some_inputs_only(op: str) -> None:
    leaves = tiny(op)
    expected = torch.autograd.grad(getattr(mf_kernels, op)(*leaves).square().sum(), leaves)
    for chosen in range(len(leaves)):
        some = [leaf.detach().requires_grad_(i == chosen) for i, leaf in enumerate(leaves)]
        with mf_kernels.record_kernels() as record:
            getattr(mf_kernels, op)(*some).square().sum().backward()
        assert torch.equal(some[chosen].grad, expected[chosen])
        assert all(leaf.grad is None for i, leaf in enumerate(some) if i != chosen)
        assert len(record.counts) == 2


@pytest.mark.parametrize("op", OPS)
def test_no_graph_where_none_is_wanted(op: str) -> None:
    leaves = tiny(op)
    with torch.no_grad():
        assert not getattr(mf_kernels, op)(*leaves).requires_grad
    assert not getattr(mf_kernels, op)(*(leaf.detach() for leaf in leaves)).requires_grad
    with torch.inference_mode():
        assert getattr(mf_kernels, op)(*leaves).is_inference()


def first_gradients(op: str, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    y = getattr(mf_kernels, op)(*leaves)
    return torch.autograd.grad(y.square().sum(), leaves, create_graph=True)


@pytest.mark.parametrize("op", OPS)
def test_a_second_derivative_is_refused_by_name(op: str) -> None:
    """Whichever of the first gradients is differentiated again."""
    for i in range(len(testing.TINY[op])):
        leaves = tiny(op)
        gradient = first_gradients(op, leaves)[i]
        with pytest.raises(RuntimeError, match=rf"mf_kernels\.{op}: .*second derivative.*use_backend"):
            gradient.sum().backward()


@pytest.mark.parametrize("op", OPS)
def test_the_reference_has_a_second_derivative(op: str) -> None:
    with mf_kernels.use_backend("reference"):
        leaves = tiny(op)
        (second,) = torch.autograd.grad(first_gradients(op, leaves)[0].sum(), leaves[:1])
        assert second.abs().max() > 0


@pytest.mark.parametrize("inputs", ["float32", "bfloat16", "mixed"])
@pytest.mark.parametrize("op", OPS)
def test_autocast(op: str, inputs: str, isa: str) -> None:
    """The kernel computes in bfloat16, and each gradient comes back in its leaf's own dtype."""
    case = SMALL[op]
    bfloat16, d_output = case.inputs(torch.bfloat16), case.d_output(torch.bfloat16)
    expected = testing.evaluate(case.function(mf_kernels), bfloat16, d_output)
    leaves = {
        name: t.to(torch.float32 if inputs == "float32" or (inputs == "mixed" and i == 0) else t.dtype)
        for i, (name, t) in enumerate(bfloat16.items())
    }

    def autocast(**arguments: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return case.function(mf_kernels)(**arguments)

    with mf_kernels.record_kernels() as record:
        results = testing.evaluate(autocast, leaves, d_output)
    assert record.counts == native(f"{op}_fwd", f"{op}_bwd", isa=isa)
    assert results["output"].dtype == torch.bfloat16
    for name, leaf in leaves.items():
        assert results[f"d_{name}"].dtype == leaf.dtype
    assert all(torch.equal(t.to(torch.bfloat16), expected[name]) for name, t in results.items())


@pytest.mark.parametrize("op", OPS)
def test_autocast_leaves_float64_alone(op: str) -> None:
    leaves = tiny(op)
    with torch.autocast("cpu", torch.bfloat16):
        y = getattr(mf_kernels, op)(*leaves)
    assert y.dtype == torch.float64
    assert torch.equal(y, getattr(mf_kernels, op)(*leaves))
