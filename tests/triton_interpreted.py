"""The Triton kernels in Triton's interpreter, against the float64 reference: indexing, masks and mathematics.

`tests/test_triton.py` runs this file in a process of its own, with TRITON_INTERPRET=1. The interpreter shows no
races, no shared memory and no speed.
"""

from __future__ import annotations

import pytest
import slopes_support
import torch
from kernel_support import SMALL, TRITON_OPS

import mf_kernels
from mf_kernels import reference, testing
from mf_kernels.testing import Case
from mf_kernels.triton import _launch

torch.set_num_threads(1)
DTYPES = (torch.float32, torch.bfloat16)
NAN, INF = float("nan"), float("inf")


def _attention(reaches: str, B: int, C: int, H: int, W: int, M: int, N: int) -> list[Case]:
    name = f"{B}x{C}x{H}x{W}-{M}tokens-{N}heads"
    tokens, options = (B, M, C), {"num_heads": N}
    return [
        Case("mobile_to_former", name, {"x": (B, C, H, W), "q": tokens}, reaches, options),
        Case("former_to_mobile", name, {"x": (B, C, H, W), "k": tokens, "v": tokens}, reaches, options),
    ]


def _dynamic_relu(reaches: str, B: int, C: int, H: int, W: int) -> Case:
    shapes = {"x": (B, C, H, W), "theta": (B, 2 * C)}
    return Case("dynamic_relu", f"{B}x{C}x{H}x{W}", shapes, reaches)


def _depthwise(
    reaches: str, B: int, C: int, H: int, W: int, mult: int, K: int, stride: int, activation: str, bias: bool
) -> Case:
    shapes = {"x": (B, C, H, W), "weight": (C * mult, 1, K, K)}
    if bias:
        shapes["bias"] = (C * mult,)
    name = f"{B}x{C}x{H}x{W}-mult{mult}-k{K}-s{stride}-{activation}{'' if bias else '-nobias'}"
    return Case("depthwise_conv2d", name, shapes, reaches, {"stride": stride, "activation": activation})


CASES = [
    *_attention("one position, one channel a head", 1, 2, 1, 1, 1, 2),
    *(case for M in range(1, 9) for case in _attention(f"{M} tokens; odd heads; one tile", 2, 14, 3, 5, M, 2)),
    *_attention("several tiles in each of two splits, the last one short", 1, 40, 17, 31, 6, 2),
    *_attention("several tiles, one split for each sample and head", 2, 6, 16, 25, 3, 2),
    *_attention("a head of several chunks, the last one short", 1, 146, 5, 9, 4, 1),
    *_attention("several chunks, two heads", 1, 272, 2, 9, 3, 2),
    *_attention("a whole tile, no padding but the tokens'", 1, 32, 8, 16, 8, 2),
    *_attention("no samples", 0, 12, 5, 5, 3, 2),
    _dynamic_relu("one value", 1, 1, 1, 1),
    _dynamic_relu("odd sides", 3, 13, 3, 5),
    _dynamic_relu("rows that fill vectors exactly", 2, 16, 4, 16),
    _dynamic_relu("several tiles of channels, the last one short", 2, 133, 3, 3),
    _dynamic_relu("several tiles in each of two splits", 1, 12, 37, 61),
    _dynamic_relu("several tiles, one split", 2, 6, 33, 50),
    _dynamic_relu("no samples", 0, 5, 4, 4),
    _depthwise("one value", 1, 1, 1, 1, 1, 3, 1, "hardswish", True),
    _depthwise("a window wider than the map", 2, 3, 2, 1, 1, 5, 1, "relu6", False),
    _depthwise("the same, stride 2", 1, 3, 1, 2, 1, 5, 2, "identity", True),
    _depthwise("several tiles of channels and rows, odd sides", 1, 19, 11, 9, 1, 3, 1, "identity", True),
    _depthwise("stride 2, even sides", 1, 18, 8, 6, 1, 3, 2, "relu6", True),
    _depthwise("stride 2, odd sides, several tiles", 1, 3, 37, 21, 1, 3, 2, "hardswish", False),
    _depthwise("5 x 5, stride 2", 1, 4, 9, 7, 1, 5, 2, "hardswish", True),
    _depthwise("2 filters a channel", 1, 5, 6, 7, 2, 3, 1, "relu6", True),
    _depthwise("6 filters a channel, stride 2", 1, 3, 5, 6, 6, 3, 2, "identity", False),
    _depthwise("3 filters a channel, 5 x 5", 1, 2, 5, 4, 3, 5, 1, "identity", True),
    _depthwise("no samples", 0, 5, 6, 6, 2, 3, 1, "identity", True),
]


def run(case: Case, inputs: dict[str, torch.Tensor], d_output: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output and gradients through the public function; Triton served both, and nothing else did."""
    with mf_kernels.use_backend("triton"), mf_kernels.record_kernels() as record:
        results = testing.evaluate(case.function(mf_kernels), inputs, d_output)
    assert record.counts == {f"{case.op}_fwd:triton:cpu": 1, f"{case.op}_bwd:triton:cpu": 1}
    return results


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [(layout, dtype) for layout in ("contiguous", "channels_last") for dtype in DTYPES]
    + [("channels_last", torch.float16)],
    ids=str,
)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_forward_and_gradients(case: Case, layout: str, dtype: torch.dtype) -> None:
    inputs, d_output = case.inputs(dtype, layout=layout), case.d_output(dtype, layout=layout)
    results = run(case, inputs, d_output)
    testing.assert_within_budget(case, dtype, results)
    for name in ("output", "d_x"):
        if results[name].dim() == 4 and _launch.is_channels_last(inputs["x"]):
            assert results[name].is_contiguous(memory_format=torch.channels_last)
        else:
            assert results[name].is_contiguous()


@pytest.mark.parametrize("layout", ["sliced", "permuted", "unaligned"])
@pytest.mark.parametrize("op", TRITON_OPS)
def test_any_strides(op: str, layout: str) -> None:
    """What surrounds the inputs in memory is NaN: reading beside them shows."""
    case, dtype = SMALL[op], torch.float32
    inputs, d_output = case.inputs(dtype, layout=layout), case.d_output(dtype, layout=layout)
    testing.assert_within_budget(case, dtype, run(case, inputs, d_output))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("op", TRITON_OPS)
def test_64_bit_offsets(op: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels of a sample of 2^31 elements or more, on a small one."""
    case, dtype = SMALL[op], torch.float32
    inputs, d_output = case.inputs(dtype, layout=layout), case.d_output(dtype, layout=layout)
    narrow = run(case, inputs, d_output)
    monkeypatch.setattr(_launch, "WIDE_FROM", 0)
    wide = run(case, inputs, d_output)
    assert all(torch.equal(t, narrow[name]) for name, t in wide.items())


def test_when_offsets_take_64_bits() -> None:
    most, more = (torch.empty(1, channels, 2**16, 2**14, device="meta") for channels in (1, 2))
    assert not _launch.position_arguments(most)[1]["WIDE"]
    assert _launch.position_arguments(more)[1]["WIDE"]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, which computes for the interpreter
@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("op", TRITON_OPS)
def test_a_value_that_is_not_finite_spreads_as_in_the_reference(op: str, value: float, layout: str) -> None:
    """In x, tokens, slopes, bias. Of a filter it is nobody's promise: it multiplies the padding's zeros."""
    case = SMALL[op]
    for name in case.shapes.keys() - {"weight"}:
        inputs = case.inputs(torch.float32)
        inputs[name].view(-1)[inputs[name].numel() // 2] = value
        inputs = {n: testing.in_layout(t, layout) for n, t in inputs.items()}
        with mf_kernels.use_backend("triton"):
            actual = case.function(mf_kernels)(**inputs)
        expected = case.function(reference)(**inputs)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("size", [1e4, 1e18], ids=str)
@pytest.mark.parametrize("op", TRITON_OPS[:2])
def test_scores_far_apart(op: str, size: float) -> None:
    """A softmax that saturates: one term is 1 and the others underflow, and the term of 1 is exact.

    Scores of 10^4 are rounded to 10^-3. How well two equal sums then cancel in their gradient is a matter of the order
    in which this processor's matrix products add, here and in plain PyTorch: the budget is four times the usual one.
    """
    case = SMALL[op]
    inputs, d_output = case.inputs(torch.float32), case.d_output(torch.float32)
    inputs["q" if op == "mobile_to_former" else "k"] *= size
    function = case.function(reference)
    truth = testing.evaluate(function, {n: t.double() for n, t in inputs.items()}, d_output.double())
    eager = testing.evaluate(function, inputs, d_output)
    for name, actual in run(case, inputs, d_output).items():
        if size > 1e4 and name.startswith("d_"):
            continue  # there the gradient of a score is the rounding of two equal sums, times 10^18
        typical, largest = testing.budget(eager[name], truth[name], torch.float32)
        testing.assert_close(name, actual, truth[name], testing.Error(4 * typical, 4 * largest), torch.float32)


def test_where_the_two_lines_meet_the_gradient_is_shared() -> None:
    """x = 0, and equal slopes: half and half, as torch.maximum."""
    x = torch.tensor([0.0, -1.0, 2.0, 0.0]).view(1, 2, 1, 2)
    theta = torch.tensor([[0.0, 0.5, 3.0, 0.25]])  # equal slopes of 1 in the first channel
    case = _dynamic_relu("ties", 1, 2, 1, 2)
    d_output = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 2, 1, 2)
    expected = testing.evaluate(case.function(reference), {"x": x, "theta": theta}, d_output)
    for name, actual in run(case, {"x": x, "theta": theta}, d_output).items():
        torch.testing.assert_close(actual, expected[name])


@pytest.mark.parametrize("op", TRITON_OPS)
def test_auto_leaves_cpu_tensors_to_the_cpu(op: str) -> None:
    case = SMALL[op]
    with mf_kernels.record_kernels() as record:
        case.function(mf_kernels)(**case.inputs(torch.float32))
    assert not any(":triton:" in kernel for kernel in record.counts)


def test_float64_is_refused_with_the_reason() -> None:
    with (
        mf_kernels.use_backend("triton"),
        pytest.raises(RuntimeError, match=r"no kernel for torch\.float64, only float32, float16, bfloat16"),
    ):
        mf_kernels.dynamic_relu(torch.ones(1, 1, 1, 1).double(), torch.ones(1, 2).double())


@pytest.mark.parametrize("op", TRITON_OPS)
def test_compiled_graphs_call_it(op: str) -> None:
    """torch.compile keeps the operator as one node, forward and backward."""
    case = SMALL[op]
    inputs, d_output = case.inputs(torch.float32), case.d_output(torch.float32)
    function = torch.compile(case.function(mf_kernels), fullgraph=True, backend="aot_eager")
    with mf_kernels.use_backend("triton"), mf_kernels.record_kernels() as record:
        results = testing.evaluate(function, inputs, d_output)
    testing.assert_within_budget(case, torch.float32, results)
    assert record.counts == {f"{op}_fwd:triton:cpu": 1, f"{op}_bwd:triton:cpu": 1}


@pytest.mark.parametrize("d_y", [1.0, -2.0, INF])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", slopes_support.FLAT)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, which computes for the interpreter
def test_slopes_at_the_corners(activation: str, dtype: torch.dtype, d_y: float) -> None:
    case, inputs = slopes_support.depthwise_row(activation, dtype)
    results = run(case, inputs, torch.full(case.output_shape, d_y, dtype=dtype))
    slopes_support.assert_slopes(activation, results, d_y)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_dynamic_relu_at_the_corners() -> None:
    case, inputs = slopes_support.dynamic_relu_row()
    d_output = torch.full(case.output_shape, 2.0)
    expected = testing.evaluate(case.function(reference), inputs, d_output)
    for name, actual in run(case, inputs, d_output).items():
        torch.testing.assert_close(actual, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_flat_hard_sigmoid_keeps_an_infinite_gradient_from_theta() -> None:
    inputs = {"x": torch.full((1, 1, 1, 4), 1e38), "theta": torch.tensor([[4.0, -4.0]])}
    case = _dynamic_relu("flat", 1, 1, 1, 4)
    assert run(case, inputs, torch.full((1, 1, 1, 4), 1e38))["d_theta"].tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
@pytest.mark.parametrize("op", TRITON_OPS)
def test_the_shape_function_promises_what_comes(op: str, direction: str) -> None:
    call, arguments = raw(op, direction)
    torch.library.opcheck(call, arguments, test_utils=("test_schema", "test_faketensor"))


def raw(op: str, direction: str) -> tuple[torch._ops.OpOverload, tuple]:
    """A small call of an operator's Triton overload, as autograd makes it."""
    case = SMALL[op]
    inputs, d_output = case.inputs(torch.float32), case.d_output(torch.float32)
    forward, backward = (getattr(torch.ops.mf_kernels, f"{op}_{way}").triton for way in ("fwd", "bwd"))
    arguments = (*inputs.values(), *case.options.values())
    if direction == "fwd":
        return forward, arguments
    if op == "mobile_to_former":
        return backward, (d_output, *inputs.values(), *forward(*arguments), *case.options.values())
    return backward, (d_output, *arguments)


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
@pytest.mark.parametrize("op", TRITON_OPS)
def test_a_raw_call_with_another_shape_is_refused(op: str, direction: str) -> None:
    """Each tensor shorter by one along each axis in turn: one line with the operator, and nothing is read beside it."""
    call, arguments = raw(op, direction)
    for number, tensor in enumerate(arguments):
        for axis in range(tensor.dim() if isinstance(tensor, torch.Tensor) else 0):
            if op == "dynamic_relu" and direction == "fwd" and number == 0 and axis > 1:
                continue  # a map of another height or width goes with the same slopes
            if op == "depthwise_conv2d" and direction == "fwd" and number == 0 and axis != 1:
                continue  # and with the same filters
            if op in TRITON_OPS[:2] and direction == "fwd" and number == 0 and axis > 1:
                continue  # and with the same tokens
            if op == "mobile_to_former" and direction == "fwd" and number == 1 and axis == 1:
                continue  # as does another number of tokens
            if op == "mobile_to_former" and direction == "bwd" and number == 1 and axis > 1:
                continue  # whose gradients have the map's batch and channels alone
            shorter = tensor.narrow(axis, 0, tensor.shape[axis] - 1)
            with pytest.raises((ValueError, TypeError), match=rf"^{op}: .*expected.*got.*$") as told:
                call(*arguments[:number], shorter, *arguments[number + 1 :])
            assert "\n" not in str(told.value)
