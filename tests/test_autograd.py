"""How the operators behave inside autograd: what is differentiated, what is refused, what autocast makes of them."""

from __future__ import annotations

import pytest
import torch
from kernel_support import OPS, native
from operator_rows import SMALL
from torch import Tensor

import mf_kernels
from mf_kernels import reference, testing


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


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_forward_alone_gives_the_same_bits(op: str, layout: str, isa: str) -> None:
    """Where no gradient is wanted the output is that of a pass with one, and nothing else is computed."""
    case = SMALL[op]
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        inputs, d_output = case.inputs(dtype, layout=layout), case.d_output(dtype)
        expected = testing.evaluate(case.function(mf_kernels), inputs, d_output)["output"]
        with mf_kernels.record_kernels() as record:
            actual = case.function(mf_kernels)(**inputs)
        assert record.counts == native(f"{op}_fwd", isa=isa)
        assert torch.equal(actual, expected)
        assert actual.stride() == expected.stride()


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
