"""torch.ops.mf_kernels is open to any caller: whatever an operator is given, it serves it or says what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kernel_support import interpreter
from torch import Tensor

import mf_kernels
from mf_kernels import _native, reference

OPS = torch.ops.mf_kernels
assert _native.load("cpu") is None  # or the dispatcher has nothing to call
FUZZ = Path(__file__).with_name("fuzz_operators.py")


def test_no_call_reads_outside_its_arguments() -> None:
    """Two thousand calls, wrong and right ones; a page that cannot be read at the end of every tensor."""
    done = interpreter(str(FUZZ), "2000", "0", MALLOC_PERTURB_="165", OMP_NUM_THREADS="1")
    last = done.stdout.splitlines()[-1] if done.stdout else ""
    assert done.returncode == 0, f"{done.returncode} in {last:.2000}\n{done.stderr[-3000:]}"
    _, served, _, refused = last.split()
    assert int(served) > 500
    assert int(refused) > 500
    assert int(served) + int(refused) == 2000


def refused(told: str, call: object, *arguments: object) -> None:
    with pytest.raises(RuntimeError) as refusal:
        call(*arguments)  # type: ignore[operator]
    assert str(refusal.value) == told


def test_the_message_names_operator_argument_what_was_expected_and_what_came() -> None:
    x, theta = torch.ones(2, 3, 4, 5), torch.ones(2, 6)
    refused("dynamic_relu_fwd: theta: expected shape (2, 6), got (2, 5)", OPS.dynamic_relu_fwd.native, x, theta[:, :5])
    refused(
        "dynamic_relu_fwd: x: expected one of the dtypes Float, Double, BFloat16, got Half",
        OPS.dynamic_relu_fwd.native,
        x.half(),
        theta,
    )
    refused(
        "mobile_to_former_fwd: num_heads: expected a divisor of C = 3, got -1",
        OPS.mobile_to_former_fwd.native,
        x,
        torch.ones(2, 6, 3),
        -1,
    )
    short = torch.ones(2, 6)
    short.untyped_storage().resize_(0)
    refused(
        "dynamic_relu_fwd: theta: expected 48 bytes of storage for its shape and strides, got 0",
        OPS.dynamic_relu_fwd.native,
        x,
        short,
    )


@pytest.mark.parametrize("heads", [-1, 0, 3, 5, 2**62, -(2**63)])
def test_token_side_refuses_heads_that_do_not_divide(heads: int) -> None:
    width, channels, ones = 32, 5, torch.ones
    shapes = [(channels, width), (width, channels), (width,), (width, width), (width, width), (width,)]
    shapes += [(2 * width, width), (width, 2 * width), (width,), (channels, width), (channels, width)]
    parameters = [t for shape in shapes for t in (ones(shape), ones(shape[0]))]
    tokens, gathered = ones(1, 6, width), ones(1, 6, channels)
    refused(
        f"token_side: num_heads: expected a divisor of D / 16 for D = 32, got {heads}",
        OPS.token_side.native,
        tokens,
        gathered,
        parameters,
        heads,
        1e-5,
    )
    for grad in (False, True):
        with torch.set_grad_enabled(grad), pytest.raises(ValueError, match="token_side: num_heads: expected a divisor"):
            mf_kernels.token_side(tokens, gathered, parameters, num_heads=heads)


# What a saved tensor may come back as from hooks that keep it elsewhere: the same values in other strides
RELAID = [
    pytest.param(lambda t: t.repeat_interleave(2, -1)[..., ::2], id="every second"),
    pytest.param(lambda t: t.transpose(0, -1).contiguous().transpose(0, -1), id="transposed"),
]


@pytest.mark.parametrize("relaid", RELAID)
def test_what_was_saved_may_come_back_in_other_strides(relaid) -> None:
    def gradients(unpack) -> list[Tensor]:
        torch.manual_seed(0)
        x, q = torch.randn(2, 6, 5, 7, requires_grad=True), torch.randn(2, 3, 6, requires_grad=True)
        weight, bias = torch.randn(6, requires_grad=True), torch.randn(6, requires_grad=True)
        theta = torch.randn(2, 12, requires_grad=True)
        thetas, alpha = torch.randn(2, 3, 12, requires_grad=True), torch.rand(2, 3, 5, 7, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            y = mf_kernels.batch_norm_activation(x, weight, bias, torch.zeros(6), torch.ones(6), theta=theta)
            y = mf_kernels.former_to_mobile(y, q, q + 1)
            y = mf_kernels.depthwise_conv2d(y, torch.ones(6, 1, 3, 3))
            y = mf_kernels.spatial_dynamic_relu(y, thetas, alpha)
            out = mf_kernels.mobile_to_former(mf_kernels.dynamic_relu(y, theta), q)
        return list(torch.autograd.grad(out.square().sum(), (x, q, weight, bias, theta, thetas, alpha)))

    for got, expected in zip(gradients(relaid), gradients(lambda t: t), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_statistics_of_another_layout_are_read_as_they_are() -> None:
    x, weight, bias = torch.randn(2, 4, 3, 5), torch.randn(4), torch.randn(4)
    _, mean, inverse = OPS.batch_norm_activation_fwd.native(
        x, weight, bias, None, torch.zeros(4), torch.ones(4), 0.1, 1e-5, "relu6"
    )
    spread = [torch.stack([t, torch.full((4,), 9.0)], 1)[:, 0] for t in (mean, inverse)]
    expected = OPS.batch_norm_activation_bwd.native(x, x, weight, bias, None, mean, inverse, "relu6")
    actual = OPS.batch_norm_activation_bwd.native(x, x, weight, bias, None, *spread, "relu6")
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_in_place_refuses_what_lies_in_the_memory_that_it_writes_to() -> None:
    memory = torch.randn(2, 8, 4, 4)
    k = memory.view(-1)[: 2 * 3 * 8].view(2, 3, 8)
    told = ": expected memory apart from x, which is written to, got a part of it; clone() it"
    before = memory.clone()
    refused(f"former_to_mobile_: k{told}", OPS.former_to_mobile_.native, memory, k, k.clone(), 2)
    refused(f"former_to_mobile_: v{told}", OPS.former_to_mobile_.native, memory, k.clone(), k, 2)
    theta = memory.view(-1)[-32:].view(2, 16)
    refused(f"dynamic_relu_: theta{told}", OPS.dynamic_relu_.native, memory, theta)
    thetas, alpha = torch.ones(2, 1, 16), torch.ones(2, 1, 4, 4)
    inside = memory.view(-1)[:32]
    told_of = f"spatial_dynamic_relu_: {{}}{told}".format
    refused(told_of("theta"), OPS.spatial_dynamic_relu_.native, memory, inside.view_as(thetas), alpha)
    refused(told_of("alpha"), OPS.spatial_dynamic_relu_.native, memory, thetas, inside.view_as(alpha))
    one = torch.ones(8)
    with pytest.raises(RuntimeError, match="running_variance: expected memory apart from running_mean"):
        OPS.batch_norm_activation_fwd.native(memory, one, one.clone(), None, *[torch.zeros(8)] * 2, 0.1, 1e-5, "relu6")
    with pytest.raises(RuntimeError, match="x: expected contiguous or channels_last, since it is written to"):
        OPS.dynamic_relu_.native(memory.transpose(2, 3), torch.ones(2, 16))
    assert torch.equal(memory, before)
    beside = torch.randn(memory.numel() + k.numel())
    x, k = beside[: memory.numel()].view_as(memory).copy_(memory), beside[memory.numel() :].view_as(k).clone()
    OPS.former_to_mobile_.native(x, k, k, 2)
    torch.testing.assert_close(x, reference.former_to_mobile(memory, k, k))
