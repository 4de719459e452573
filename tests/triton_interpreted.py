"""What the Triton kernels have beside the properties of all kernels, in Triton's interpreter: indexing and refusals.

`tests/test_triton.py` runs this file, and with it `test_operators.py` and `test_operator_values.py`, in processes of
their own with TRITON_INTERPRET=1. The interpreter shows no races, no shared memory and no speed.
"""

from __future__ import annotations

import pytest
import torch
from kernel_support import TRITON_OPS
from operator_backends import BACKENDS, INTERPRETED
from operator_rows import SMALL

import mf_kernels
from mf_kernels import testing
from mf_kernels.triton import _launch

assert BACKENDS == (INTERPRETED,), "TRITON_INTERPRET=1 has to be set before the first import"


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("op", TRITON_OPS)
def test_64_bit_offsets(op: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels of a sample of 2^31 elements or more, on a small one."""
    case, dtype = SMALL[op], torch.float32
    inputs, d_output = case.inputs(dtype, layout=layout), case.d_output(dtype, layout=layout)
    narrow = INTERPRETED.evaluate(case, inputs, d_output)
    monkeypatch.setattr(_launch, "WIDE_FROM", 0)
    wide = INTERPRETED.evaluate(case, inputs, d_output)
    assert all(torch.equal(t, narrow[name]) for name, t in wide.items())


def test_when_offsets_take_64_bits() -> None:
    most, more = (torch.empty(1, channels, 2**16, 2**14, device="meta") for channels in (1, 2))
    assert not _launch.position_arguments(most)[1]["WIDE"]
    assert _launch.position_arguments(more)[1]["WIDE"]


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
