"""The operators for inference: equal to the equations they stand for, which serve wherever their kernels do not."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kernel_support import native, runnable
from operator_rows import SMALL
from torch import Tensor

import mf_kernels
from mf_kernels import record_kernels, testing, use_backend

MAPS = [
    c for c in testing.CASES if c.op == "depthwise_conv2d" and not c.layer_of and c.options["activation"] != "relu6"
]


def assert_close_to(function: Callable[..., tuple], arguments: tuple, actual: tuple[Tensor, ...]) -> None:
    """Within the error budget of `function`, evaluated in PyTorch in the arguments' dtype and in float64."""
    tensors = [t for t in arguments if isinstance(t, Tensor)]
    dtype = tensors[0].dtype
    with use_backend("reference"):
        eager = function(*arguments)
        truth = function(*(t.double() if isinstance(t, Tensor) else t for t in arguments))
    assert len(actual) == len(truth)
    for i, (a, e, t) in enumerate(zip(actual, eager, truth, strict=True)):
        testing.assert_close(f"result {i}", a, t, testing.budget(e, t, dtype), dtype)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", MAPS, ids=lambda case: case.id)
def test_depthwise_dynamic_relu(case: testing.Case, dtype: torch.dtype, layout: str, isa: str) -> None:
    """The two operators in turn, but that the map between them is not rounded to bfloat16."""
    stride = case.options["stride"]
    inputs = case.inputs(dtype, layout=layout)
    inputs["bias"] = inputs.get("bias")
    theta = torch.randn(case.shapes["x"][0], 2 * case.shapes["weight"][0], dtype=torch.float64).to(dtype)
    with torch.no_grad(), record_kernels() as record:
        y = mf_kernels.depthwise_dynamic_relu(**inputs, theta=theta, stride=stride)
    assert record.counts == native("depthwise_dynamic_relu", isa=isa)
    wide, rounding = (torch.float32, 2**-8) if dtype == torch.bfloat16 else (dtype, 10 * torch.finfo(dtype).eps)
    widened = {name: None if t is None else t.to(wide) for name, t in inputs.items()}
    z = mf_kernels.depthwise_conv2d(**widened, stride=stride, activation="identity")
    expected = mf_kernels.dynamic_relu(z, theta.to(wide))
    torch.testing.assert_close(y.to(wide), expected, rtol=rounding, atol=rounding)
    assert y.stride() == mf_kernels.depthwise_conv2d(**inputs, stride=stride, activation="identity").stride()


def depthwise_dynamic_relu(x: Tensor, weight: Tensor, bias: Tensor, theta: Tensor, stride: int) -> tuple[Tensor]:
    return (mf_kernels.depthwise_dynamic_relu(x, weight, bias, theta, stride=stride),)


def test_depthwise_dynamic_relu_with_gradients_is_the_two_operators(isa: str) -> None:
    x, weight, bias = SMALL["depthwise_conv2d"].inputs(torch.float32).values()
    arguments = (x.requires_grad_(), weight, bias, torch.randn(2, 26), 2)
    with record_kernels() as record:
        (y,) = depthwise_dynamic_relu(*arguments)
        y.sum().backward()
    kernels = [f"{op}_{direction}" for op in ("depthwise_conv2d", "dynamic_relu") for direction in ("fwd", "bwd")]
    assert record.counts == native(*kernels, isa=isa)
    assert_close_to(depthwise_dynamic_relu, arguments, (y,))


IN_PLACE = {
    "dynamic_relu": (mf_kernels.dynamic_relu_, mf_kernels.dynamic_relu),
    "former_to_mobile": (mf_kernels.former_to_mobile_, mf_kernels.former_to_mobile),
}
IN_PLACE_ROWS = [case for case in testing.CASES if case.op in IN_PLACE and not case.layer_of]


@pytest.mark.parametrize("layout", testing.LAYOUTS)
@pytest.mark.parametrize("case", IN_PLACE_ROWS, ids=lambda case: case.id)
def test_in_place(case: testing.Case, layout: str, isa: str) -> None:
    """The same bits as out of place, written over x where x is dense; nothing around x is touched."""
    in_place, out_of_place = IN_PLACE[case.op]
    inputs = case.inputs(torch.float32, layout=layout)
    with torch.no_grad():
        expected = out_of_place(**inputs, **case.options)
        with record_kernels() as record:
            actual = in_place(**inputs, **case.options)
    assert torch.equal(actual, expected)
    assert record.counts == native(f"{case.op}_fwd", isa=isa)
    x = inputs["x"]
    dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    assert (actual is x) == dense
    if layout == "unaligned":
        assert x._base[[0, -1]].isnan().all()


@pytest.mark.parametrize("op", IN_PLACE)
def test_in_place_is_seen_by_autograd(op: str) -> None:
    """A map that somebody's backward pass still needs may not be written over unnoticed."""
    case = SMALL[op]
    inputs = case.inputs(torch.float32)
    saved = inputs.pop("x").requires_grad_().exp()
    with torch.no_grad():
        IN_PLACE[op][0](saved.detach(), **inputs, **case.options)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()


@pytest.mark.parametrize("op", IN_PLACE)
def test_in_place_leaves_x_alone_where_gradients_or_the_reference_are_wanted(op: str) -> None:
    case = SMALL[op]
    in_place, out_of_place = IN_PLACE[op]
    for grad, backend, dtype in (
        (True, "auto", torch.float32),
        (False, "reference", torch.float32),
        (False, "reference", torch.float16),
    ):
        inputs = case.inputs(dtype)
        before = inputs["x"].clone()
        with torch.set_grad_enabled(grad), use_backend(backend):
            inputs["x"].requires_grad_(grad)
            actual = in_place(**inputs, **case.options)
            assert torch.equal(actual, out_of_place(**inputs, **case.options))
        assert torch.equal(inputs["x"], before)
        assert actual.requires_grad == grad


X, SHORT, WIDE = torch.zeros(3, 4, 2, 2), torch.zeros(3, 4), torch.zeros(3, 9, 8)


@pytest.mark.parametrize(
    ("function", "arguments", "told"),
    [
        (mf_kernels.dynamic_relu_, (X[0], SHORT), "dynamic_relu: x: expected (B, C, H, W), got 3 dimensions"),
        (mf_kernels.dynamic_relu_, (X, SHORT), "dynamic_relu: theta: expected (B, 2C) = (3, 8)"),
        (mf_kernels.former_to_mobile_, (X, SHORT, SHORT), "former_to_mobile: k: expected (B, M, C)"),
        (mf_kernels.former_to_mobile_, (X, WIDE, WIDE), "former_to_mobile: k: expected (B, M, C)"),
        (mf_kernels.former_to_mobile_, (X, WIDE[:, :6, :4], WIDE), "former_to_mobile: v: expected (B, M, C)"),
        (mf_kernels.depthwise_dynamic_relu, (X, X[:, :1], None, X), "depthwise_dynamic_relu: weight: expected"),
        (
            mf_kernels.depthwise_dynamic_relu,
            (X, torch.zeros(4, 1, 3, 3), None, SHORT),
            "depthwise_dynamic_relu: theta: expected (B, 2*C*mult) = (3, 8)",
        ),
    ],
)
def test_they_refuse_what_the_operators_refuse(
    function: Callable[..., Tensor], arguments: tuple[Tensor, ...], told: str
) -> None:
    with torch.no_grad(), pytest.raises(ValueError, match=re.escape(told)):
        function(*arguments)


def norm(outputs: int, dtype: torch.dtype, *filters: int) -> tuple[Tensor, ...]:
    """weight (O, I, K, K), and the four vectors of a BatchNorm."""
    generator = torch.Generator().manual_seed(3)
    draw = [torch.randn(s, generator=generator, dtype=torch.float64) for s in ((outputs, *filters), *4 * [(outputs,)])]
    return (*(t.to(dtype) for t in draw[:4]), draw[4].square().to(dtype))


def fold(*arguments: Tensor) -> tuple[Tensor, Tensor]:
    return mf_kernels.fold_batch_norm(*arguments, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("filters", [(1, 1, 1), (3, 3, 3), (1, 5, 5), (16, 1, 1), (21, 1, 1)], ids=str)
def test_fold_batch_norm(filters: tuple[int, ...], dtype: torch.dtype, isa: str) -> None:
    arguments = norm(13, dtype, *filters)
    with torch.no_grad(), record_kernels() as record:
        folded = fold(*arguments)
        strided = fold(*(testing.in_layout(t, "sliced") for t in arguments))
    assert record.counts == {f"fold_batch_norm:native:cpu:{isa}": 2}
    assert_close_to(fold, arguments, folded)
    assert all(torch.equal(a, b) for a, b in zip(folded, strided, strict=True))


def test_fold_batch_norm_elsewhere_is_pytorch() -> None:
    """With gradients, in bfloat16, and where the vectors have a dtype of their own."""
    arguments = norm(5, torch.float32, 2, 3, 3)
    cases = [(True, arguments), (False, tuple(t.bfloat16() for t in arguments))]
    for i in range(1, 5):
        cases.append((False, tuple(t.double() if i == j else t for j, t in enumerate(arguments))))
    for grad, given in cases:
        with torch.set_grad_enabled(grad), record_kernels() as record:
            actual = fold(*given)
        assert record.counts == {}
        with use_backend("reference"):
            assert all(torch.equal(a, b) for a, b in zip(actual, fold(*given), strict=True))
    assert torch.autograd.gradcheck(fold, tuple(t.double().requires_grad_() for t in arguments))


def parameters(D: int, C: int, C_out: int, slopes: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    layers = [(C, D), (D, C), (D,), (D, D), (D, D), (D,), (2 * D, D), (D, 2 * D), (D,), (C_out, D), (C_out, D)]
    for channels in slopes:
        layers += [(D // 4, D), (2 * channels, D // 4)]
    generator = torch.Generator().manual_seed(5)
    tensors = []
    for shape in layers:
        weight = torch.randn(shape, generator=generator, dtype=torch.float64) * shape[-1] ** -0.5
        tensors += [weight + (len(shape) == 1), torch.randn(shape[0], generator=generator, dtype=torch.float64)]
    return [t.to(dtype) for t in tensors]


def token_arguments(B: int, M: int, D: int, C: int, C_out: int, slopes: tuple[int, ...], dtype=torch.float32) -> tuple:
    generator = torch.Generator().manual_seed(9)
    tokens, gathered = (torch.randn(B, M, n, generator=generator, dtype=torch.float64).to(dtype) for n in (D, C))
    return (tokens, gathered, *parameters(D, C, C_out, slopes, dtype))


def test_the_kernel_reads_the_parameters_under_the_same_names() -> None:
    """The order that a caller goes by is the one in which the C++ takes weight after weight."""
    source = (Path(__file__).parents[1] / "csrc" / "cpu" / "token_side.h").read_text()
    constructor = source[source.index("held_(counted(") :]
    assert tuple(re.findall(r"(\w+)\((?:linear|norm)\(", constructor)) == mf_kernels.TokenSideLayers._fields
    members = re.findall(r"^  (?:LinearLayer|NormLayer) ([\w, ]+);", source, re.MULTILINE)  # constructed in their order
    assert tuple(name for line in members for name in line.split(", "))[-11:] == mf_kernels.TokenSideLayers._fields


def token_side(tokens: Tensor, gathered: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    return tuple(mf_kernels.token_side(tokens, gathered, weights))


@pytest.mark.parametrize(
    ("B", "M", "D", "C", "C_out", "slopes"),
    [
        (1, 6, 192, 96, 128, (384, 576)),  # a layer
        (1, 3, 128, 12, 24, (72, 96)),  # rows that do not fill their last vector
        (8, 8, 64, 17, 33, (5,)),  # as many rows as it serves; blocks of outputs cut short
        (9, 7, 64, 16, 16, ()),
        (1, 1, 64, 1, 40, (31, 52, 63)),
        (0, 6, 64, 16, 16, (8,)),
    ],
)
def test_token_side(B: int, M: int, D: int, C: int, C_out: int, slopes: tuple[int, ...], isa: str) -> None:
    arguments = token_arguments(B, M, D, C, C_out, slopes)
    with torch.no_grad(), record_kernels() as record:
        actual = token_side(*arguments)
        strided = token_side(*(testing.in_layout(t, "permuted") for t in arguments))
    assert record.counts == {f"token_side:native:cpu:{isa}": 2}
    assert all(torch.equal(a, b) for a, b in zip(actual, strided, strict=True))
    assert_close_to(token_side, arguments, actual)


@pytest.mark.parametrize(
    ("arguments", "grad"),
    [
        (token_arguments(2, 6, 64, 16, 16, (8,)), True),
        (token_arguments(2, 6, 64, 16, 16, (8,), torch.float64), False),
        (token_arguments(13, 5, 64, 16, 16, (8,)), False),
        (token_arguments(2, 6, 72, 16, 16, (8,)), False),
    ],
    ids=["gradients", "float64", "65 rows", "width"],
)
def test_token_side_elsewhere_is_pytorch(arguments: tuple[Tensor, ...], grad: bool) -> None:
    with torch.set_grad_enabled(grad), record_kernels() as record:
        actual = token_side(*arguments)
    assert set(record.counts) == set(native("mobile_to_former_fwd", isa=runnable()[-1]))
    assert_close_to(token_side, arguments, actual)


def test_token_side_refuses_what_does_not_fit() -> None:
    """Each parameter of another shape or dtype, and too many or too few of them."""
    tokens, gathered, *weights = token_arguments(2, 6, 64, 16, 24, (8,))
    with torch.no_grad():
        for i, weight in enumerate(weights):
            for wrong in (weight[:-1], weight.repeat_interleave(2, 0), weight.unsqueeze(0), weight.double()):
                with pytest.raises(
                    (TypeError, ValueError), match=rf"token_side: parameters\[({i}|{i + 1})\]: expected"
                ):
                    mf_kernels.token_side(tokens, gathered, [*weights[:i], wrong, *weights[i + 1 :]])
        for wrong in (weights[:-1], weights[:20], [*weights, weights[0]]):
            with pytest.raises(ValueError, match="token_side: parameters: expected 22 tensors and 4 for each"):
                mf_kernels.token_side(tokens, gathered, wrong)
        with pytest.raises(ValueError, match="token_side: gathered: expected"):
            mf_kernels.token_side(tokens, gathered[:1], weights)


def test_the_reference_on_request_runs_no_kernel() -> None:
    arguments = token_arguments(2, 6, 64, 16, 16, (8,))
    x, weight, bias = SMALL["depthwise_conv2d"].inputs(torch.float32).values()
    with torch.no_grad(), use_backend("reference"), record_kernels() as record:
        token_side(*arguments)
        fold(*norm(5, torch.float32, 2, 3, 3))
        mf_kernels.depthwise_dynamic_relu(x, weight, bias, torch.zeros(2, 26))
    assert not any("native" in kernel for kernel in record.counts)


def test_opcheck() -> None:
    """Schemas, the writes they declare, and fake kernels."""
    ops = torch.ops.mf_kernels
    x, theta = SMALL["dynamic_relu"].inputs(torch.float32).values()
    torch.library.opcheck(ops.dynamic_relu_.native, (x, theta))
    x, k, v = SMALL["former_to_mobile"].inputs(torch.float32, layout="channels_last").values()
    torch.library.opcheck(ops.former_to_mobile_.native, (x, k, v, 2))
    x, weight, bias = SMALL["depthwise_conv2d"].inputs(torch.float32, layout="permuted").values()
    torch.library.opcheck(ops.depthwise_dynamic_relu.native, (x, weight, bias, torch.randn(2, 26), 2))
    torch.library.opcheck(ops.fold_batch_norm.native, (*norm(5, torch.float32, 2, 3, 3), 1e-5))
    tokens, gathered, *weights = token_arguments(2, 6, 64, 16, 16, (8,))
    torch.library.opcheck(ops.token_side.native, (tokens, gathered, weights, 4, 1e-5))
