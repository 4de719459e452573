"""What the arguments must be. An error names the operator, the argument, what was expected and what came."""

from __future__ import annotations

import pytest
import torch
from operator_rows import SMALL

import mf_kernels
from mf_kernels import record_kernels, reference, use_backend


def zeros(*shape: int, **options) -> torch.Tensor:
    return torch.zeros(shape, **options)


INT, HALF, META = {"dtype": torch.int32}, {"dtype": torch.bfloat16}, {"device": "meta"}

# Each in place of an argument of the small rows: x (3, 13, 3, 5), (2, 14, 3, 5) with 6 tokens, (2, 13, 9, 11)
REFUSED = [
    ("dynamic_relu", "x", zeros(13, 3, 5), ValueError, r"(B, C, H, W), got 3 dimensions, shape (13, 3, 5)"),
    ("dynamic_relu", "x", zeros(3, 13, 3, 5, **INT), TypeError, "floating point dtype, got torch.int32"),
    ("dynamic_relu", "x", zeros(3, 13, 0, 5), ValueError, "at least 1, got shape (3, 13, 0, 5)"),
    ("dynamic_relu", "x", zeros(3, 0, 3, 5), ValueError, "at least 1, got shape (3, 0, 3, 5)"),
    ("dynamic_relu", "theta", zeros(3, 13), ValueError, "(3, 26) to go with x (3, 13, 3, 5), got (3, 13)"),
    ("dynamic_relu", "theta", zeros(3, 26, **HALF), TypeError, "dtype torch.float32, got torch.bfloat16"),
    ("dynamic_relu", "theta", zeros(3, 26, **META), ValueError, "x's device cpu, got meta"),
    ("mobile_to_former", "x", zeros(14, 15), ValueError, "(B, C, H, W), got 2 dimensions"),
    ("mobile_to_former", "q", zeros(2, 14), ValueError, "(B, M, C) with M of at least 1, got (2, 14)"),
    ("mobile_to_former", "q", zeros(2, 0, 14), ValueError, "(B, M, C) with M of at least 1, got (2, 0, 14)"),
    ("mobile_to_former", "q", zeros(3, 6, 14), ValueError, "(B, M, C) = (2, 6, 14) to go with x"),
    ("mobile_to_former", "q", zeros(2, 6, 14, **HALF), TypeError, "dtype torch.float32, got torch.bfloat16"),
    ("mobile_to_former", "num_heads", 3, ValueError, "a divisor of C = 14, got 3"),
    ("mobile_to_former", "num_heads", 0, ValueError, "a divisor of C = 14, got 0"),
    ("mobile_to_former", "num_heads", 2.0, TypeError, "an integer, got 2.0"),
    ("mobile_to_former", "num_heads", True, TypeError, "an integer, got True"),
    ("mobile_to_former", "num_heads", "2", TypeError, "an integer, got '2'"),
    ("mobile_to_former", "num_heads", 2**70, ValueError, "a divisor of C = 14"),
    ("mobile_to_former", "num_heads", -2, ValueError, "a divisor of C = 14, got -2"),
    ("former_to_mobile", "x", zeros(2, 14, 3, 5, **INT), TypeError, "floating point dtype, got torch.int32"),
    ("former_to_mobile", "k", zeros(2, 6, 12), ValueError, "(B, M, C) = (2, 6, 14) to go with x"),
    ("former_to_mobile", "v", zeros(2, 5, 14), ValueError, "(B, M, C) = (2, 6, 14) to go with x"),
    ("former_to_mobile", "v", zeros(2, 6, 14, **META), ValueError, "x's device cpu, got meta"),
    ("former_to_mobile", "num_heads", 4, ValueError, "a divisor of C = 14, got 4"),
    ("depthwise_conv2d", "x", zeros(13, 9, 11), ValueError, "(B, C, H, W), got 3 dimensions"),
    ("depthwise_conv2d", "weight", zeros(13, 3, 3), ValueError, "(C*mult, 1, K, K), got (13, 3, 3)"),
    ("depthwise_conv2d", "weight", zeros(13, 2, 3, 3), ValueError, "(C*mult, 1, K, K), got (13, 2, 3, 3)"),
    ("depthwise_conv2d", "weight", zeros(13, 1, 3, 5), ValueError, "(C*mult, 1, K, K), got (13, 1, 3, 5)"),
    ("depthwise_conv2d", "weight", zeros(13, 1, 7, 7), ValueError, "kernel side K in (3, 5), got 7"),
    ("depthwise_conv2d", "weight", zeros(14, 1, 3, 3), ValueError, "a multiple of C = 13 filters, got 14"),
    ("depthwise_conv2d", "weight", zeros(0, 1, 3, 3), ValueError, "a multiple of C = 13 filters, got 0"),
    (
        "depthwise_conv2d",
        "weight",
        zeros(13, 1, 3, 3, **HALF),
        TypeError,
        "dtype torch.float32, got torch.bf",
    ),
    ("depthwise_conv2d", "bias", zeros(26), ValueError, "(C*mult,) = (13,) to go with x"),
    ("depthwise_conv2d", "bias", zeros(13, **HALF), TypeError, "dtype torch.float32, got torch.bfloat16"),
    ("depthwise_conv2d", "stride", 3, ValueError, "one of (1, 2), got 3"),
    ("depthwise_conv2d", "activation", "relu", ValueError, "'identity'), got 'relu'"),
]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("op", "argument", "value", "error", "told"), REFUSED)
def test_arguments_that_do_not_fit_are_refused(
    op: str, argument: str, value: object, error: type[Exception], told: str, backend: str
) -> None:
    """By every backend alike, before anything is computed."""
    arguments = SMALL[op].inputs(torch.float32) | SMALL[op].options | {argument: value}
    with use_backend(backend), record_kernels() as record, pytest.raises(error) as refusal:
        getattr(mf_kernels, op)(**arguments)
    assert str(refusal.value).startswith(f"{op}: {argument}: expected ")
    assert told in str(refusal.value)
    assert record.counts == {}


def test_the_reference_names_an_unknown_activation_itself() -> None:
    with pytest.raises(ValueError, match=r"activation: expected .*'relu6'.*, got 'gelu'"):
        reference.depthwise_conv2d(torch.zeros(1, 1, 3, 3), torch.zeros(1, 1, 3, 3), activation="gelu")


ONES = torch.ones
NORM = {
    "x": zeros(2, 4, 3, 5),
    "weight": ONES(4),
    "bias": ONES(4),
    "running_mean": ONES(4),
    "running_variance": ONES(4),
}
FOLD = {"weight": ONES(4, 1, 3, 3), **{name: ONES(4) for name in ("norm_weight", "norm_bias", "mean", "variance")}}
JOINED = {"x": zeros(2, 4, 3, 5), "weight": ONES(4, 1, 3, 3), "bias": ONES(4), "theta": ONES(2, 8)}
HELPERS = {"batch_norm_activation": NORM, "fold_batch_norm": FOLD | {"eps": 0.0}, "depthwise_dynamic_relu": JOINED}

REFUSED_BY_HELPERS = [
    *(
        ("fold_batch_norm", name, ONES(1), ValueError, "(O,) = (4,) to go with weight (4, 1, 3, 3), got (1,)")
        for name in list(FOLD)[1:]
    ),
    *(
        ("batch_norm_activation", name, ONES(5), ValueError, "(C,) = (4,) to go with x (2, 4, 3, 5), got (5,)")
        for name in list(NORM)[1:]
    ),
    ("fold_batch_norm", "weight", ONES(4, 9), ValueError, "(O, I, K, K), got shape (4, 9)"),
    ("fold_batch_norm", "weight", zeros(4, 1, 3, 3, **INT), TypeError, "floating point dtype"),
    ("fold_batch_norm", "mean", zeros(4, **META), ValueError, "weight's device cpu, got meta"),
    ("fold_batch_norm", "mean", None, TypeError, "a tensor, got NoneType"),
    ("fold_batch_norm", "eps", -1.0, ValueError, "at least 0, got -1.0"),
    ("fold_batch_norm", "eps", float("nan"), ValueError, "at least 0, got nan"),
    ("fold_batch_norm", "eps", "1", TypeError, "a number, got '1'"),
    ("batch_norm_activation", "x", 1.0, TypeError, "a tensor, got float"),
    ("batch_norm_activation", "theta", ONES(2, 4), ValueError, "(B, 2C) = (2, 8) to go with x"),
    ("batch_norm_activation", "momentum", None, TypeError, "a number, got None"),
    ("batch_norm_activation", "activation", ["relu6"], ValueError, "got ['relu6']"),
    ("depthwise_dynamic_relu", "theta", ONES(2, 4), ValueError, "(B, 2*C*mult) = (2, 8) to go with x"),
    ("depthwise_dynamic_relu", "weight", ONES(3, 1, 3, 3), ValueError, "a multiple of C = 4 filters, got 3"),
    ("depthwise_dynamic_relu", "stride", 1.0, TypeError, "an integer, got 1.0"),
    ("depthwise_dynamic_relu", "stride", True, TypeError, "an integer, got True"),
]


@pytest.mark.parametrize("way", ["kernel", "with gradients", "reference"])
@pytest.mark.parametrize(("op", "argument", "value", "error", "told"), REFUSED_BY_HELPERS)
def test_helpers_refuse_the_same_whoever_serves(
    op: str, argument: str, value: object, error: type[Exception], told: str, way: str
) -> None:
    """Before anything is written: the running statistics stay as they were."""
    arguments = HELPERS[op] | {argument: value}
    before = {name: t.clone() for name, t in arguments.items() if isinstance(t, torch.Tensor) and not t.is_meta}
    with (
        use_backend("reference" if way == "reference" else "auto"),
        torch.set_grad_enabled(way == "with gradients"),
        pytest.raises(error) as refusal,
    ):
        getattr(mf_kernels, op)(**arguments)
    assert str(refusal.value).startswith(f"{op}: {argument}: expected ")
    assert told in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert all(torch.equal(arguments[name], t) for name, t in before.items())


@pytest.mark.parametrize("value", [None, 1.0, [1.0]])
@pytest.mark.parametrize("op", list(SMALL))
def test_what_is_no_tensor_is_named(op: str, value: object) -> None:
    inputs = SMALL[op].inputs(torch.float32)
    for name in inputs.keys() - {"bias"}:
        with pytest.raises(TypeError, match=rf"^{op}: {name}: expected a tensor, got {type(value).__name__}$"):
            getattr(mf_kernels, op)(**inputs | SMALL[op].options | {name: value})
