"""BatchNorm joined with its activation: equal to the operators in turn, in every layout, dtype and instruction set."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from kernel_support import native
from torch import Tensor

import mf_kernels
from mf_kernels import record_kernels, testing, use_backend

SHAPES = [
    pytest.param((3, 36, 6, 5), id="36 channels"),  # whole vectors and a rest
    pytest.param((2, 13, 3, 2), id="fewer channels than lanes"),
    pytest.param((9, 17, 1, 1), id="one position"),
    pytest.param((2, 40, 33, 41), id="strips and long planes"),
    pytest.param((70, 19, 2, 4), id="groups of samples"),
]
ACTIVATIONS = ["identity", "relu6", "dynamic_relu"]


def arguments(shape: tuple[int, ...], dtype: torch.dtype, activation: str, layout: str = "contiguous") -> list[Tensor]:
    """x, weight, bias and, for a dynamic ReLU, theta; x far from zero, as a sum of squares would show."""
    generator = torch.Generator().manual_seed(11)
    channels = shape[1]
    sizes = [shape, (channels,), (channels,)] + [(shape[0], 2 * channels)] * (activation == "dynamic_relu")
    tensors = [2 * torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    tensors[0] += 10
    return [testing.in_layout(tensors[0].to(dtype), layout), *(t.to(dtype) for t in tensors[1:])]


def normalize(x: Tensor, weight: Tensor, bias: Tensor, theta: Tensor | None = None, activation: str = "identity"):
    """(y, running mean, running variance)"""
    mean, variance = torch.full_like(weight, 3), torch.full_like(weight, 5)
    activation = "identity" if activation == "dynamic_relu" else activation
    y = mf_kernels.batch_norm_activation(
        x, weight, bias, mean, variance, theta=theta, activation=activation, momentum=0.3, eps=1e-3
    )
    return y, mean, variance


def evaluate(tensors: list[Tensor], activation: str, d_y: Tensor | None) -> dict[str, Tensor]:
    leaves = [t.detach().requires_grad_(d_y is not None) for t in tensors]
    y, mean, variance = normalize(*leaves, activation=activation)
    results = {"y": y.detach(), "running_mean": mean, "running_variance": variance}
    if d_y is not None:
        gradients = torch.autograd.grad(y, leaves, d_y)
        results |= dict(zip(("d_x", "d_weight", "d_bias", "d_theta"), gradients, strict=False))
    return results


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(
    shape: tuple[int, ...], activation: str, dtype: torch.dtype, layout: str, isa: str
) -> None:
    """Within the error that PyTorch makes in the same dtype; the gradient comes in another layout."""
    tensors = arguments(shape, dtype, activation, layout)
    d_y = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    given = testing.in_layout(d_y, testing.LAYOUTS[testing.LAYOUTS.index(layout) - 1])
    with record_kernels() as record:
        actual = evaluate(tensors, activation, given)
    assert record.counts == native("batch_norm_activation_fwd", "batch_norm_activation_bwd", isa=isa)
    with use_backend("reference"):
        eager = evaluate(tensors, activation, d_y)
        truth = evaluate([t.double() for t in tensors], activation, d_y.double())
    slack = 1.25 if isa == "baseline" else 1.0  # without fused multiply-add, which PyTorch's own sums use
    for name, value in actual.items():
        allowed = testing.budget(eager[name], truth[name], dtype)
        testing.assert_close(name, value, truth[name], testing.Error(*(slack * limit for limit in allowed)), dtype)
    x = tensors[0]
    dense = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    assert actual["y"].is_contiguous(memory_format=torch.channels_last if dense else torch.contiguous_format)
    with torch.no_grad():
        assert torch.equal(evaluate(tensors, activation, None)["y"], actual["y"])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradcheck(layout: str, activation: str, isa: str) -> None:
    tensors = [t.requires_grad_() for t in arguments((3, 2, 2, 3), torch.float64, activation, layout)]
    with use_backend("native"):
        assert torch.autograd.gradcheck(lambda *leaves: normalize(*leaves, activation=activation)[0], tensors)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_corners_have_the_slopes_of_torch(layout: str, isa: str) -> None:
    """Two equal lines share the gradient; ReLU6 passes none at 0 and 6. A channel of zeros becomes its bias."""
    x = testing.in_layout(torch.zeros(2, 4, 2, 2), layout)
    weight, bias = torch.ones(4), torch.tensor([0.0, 6.0, -1.0, 3.0])
    theta = torch.tensor([[-1.5] * 4 + [1.5] * 4, [0.0] * 8])
    d_y = torch.arange(32.0).view(2, 4, 2, 2)
    for activation, more in (("relu6", []), ("dynamic_relu", [theta])):
        actual = evaluate([x, weight, bias, *more], activation, d_y)
        leaves = [t.clone().requires_grad_() for t in (bias, *more)]
        normalized = leaves[0][:, None, None].expand(2, 4, 2, 2)
        expected = mf_kernels.reference.dynamic_relu(normalized, leaves[1]) if more else F.relu6(normalized)
        gradients = torch.autograd.grad(expected, leaves, d_y)
        assert torch.equal(actual["y"], expected)
        for name, gradient in zip(("d_bias", "d_theta"), gradients, strict=False):
            torch.testing.assert_close(actual[name], gradient)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_same_bits_with_any_number_of_threads(layout: str) -> None:
    tensors = arguments((16, 40, 20, 20), torch.float32, "dynamic_relu", layout)
    d_y = torch.randn_like(tensors[0])
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(evaluate(tensors, "dynamic_relu", d_y))
    torch.set_num_threads(1)
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_elsewhere_it_is_pytorch() -> None:
    """In bfloat16 and under autocast."""
    x, weight, bias = arguments((2, 3, 4, 4), torch.float32, "relu6")
    for given, cast in ((x.bfloat16(), False), (x, True)):
        with record_kernels() as record, torch.autocast("cpu", enabled=cast):
            y = normalize(given, weight, bias, activation="relu6")[0]
            expected = F.batch_norm(given, torch.zeros(3), torch.ones(3), weight, bias, True, 0.3, 1e-3)
        assert record.counts == {}
        assert torch.equal(y, F.relu6(expected))


def test_it_has_no_second_derivative() -> None:
    x, weight, bias = (t.requires_grad_() for t in arguments((2, 3, 2, 2), torch.float32, "identity"))
    y, _, _ = normalize(x, weight, bias)
    (d_x,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"batch_norm_activation: the fused kernels have no second derivative"):
        d_x.sum().backward()


def test_refused() -> None:
    x, weight, bias, theta = arguments((2, 3, 2, 2), torch.float32, "dynamic_relu")
    running = (torch.zeros(3), torch.ones(3))
    call = mf_kernels.batch_norm_activation
    for wrong, told in (
        (lambda: call(x[0], weight, bias, *running), "x: expected (B, C, H, W)"),
        (lambda: call(x, weight[:2], bias, *running), "weight: expected (C,) = (3,)"),
        (lambda: call(x, weight, bias, running[0], torch.ones(4)), "running_variance: expected (C,) = (3,)"),
        (lambda: call(x, weight, bias, *running, theta=theta[:, :3]), "theta: expected (B, 2C) = (2, 6)"),
        (lambda: call(x, weight, bias, *running, theta=theta, activation="relu6"), "activation: expected identity"),
        (lambda: call(x, weight, bias, *running, activation="hardswish"), "activation: expected identity"),
        (lambda: call(x[:1, :, :1, :1], weight, bias, *running), "Expected more than 1 value per channel"),
    ):
        with pytest.raises(ValueError, match=re.escape(told)):
            wrong()


def test_opcheck() -> None:
    ops = torch.ops.mf_kernels
    for activation in ACTIVATIONS:
        x, weight, bias, *theta = arguments((2, 5, 3, 4), torch.float32, activation, "channels_last")
        given = (x, weight, bias, theta[0] if theta else None)
        forward = (*given, torch.zeros(5), torch.ones(5), 0.1, 1e-5, activation)
        torch.library.opcheck(ops.batch_norm_activation_fwd.native, forward)
        _, mean, inverse = ops.batch_norm_activation_fwd.native(*forward)
        torch.library.opcheck(ops.batch_norm_activation_bwd.native, (x, *given, mean, inverse, activation))
