"""What the public functions accept, said once: names, shapes, dtypes, devices; and the cast under autocast.

Every message names the operator, the argument, what was expected and what came.
"""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor

ACTIVATIONS = ("hardswish", "relu6", "identity")
KERNEL_SIDES = (3, 5)
STRIDES = (1, 2)
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def tensor(op: str, name: str, value: Any) -> None:
    """A tensor, and no number, array or None."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name}: expected a tensor, got {type(value).__name__}")


def whole(op: str, name: str, value: Any) -> None:
    """A whole number: True and 2.0 are none."""
    if type(value) is int:
        return
    if type(value) is int:  # first, since a question to an abstract class takes as long as the rest of the checks
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Integral | torch.SymInt):
        raise TypeError(f"{op}: {name}: expected an integer, got {value!r:.80}")


def epsilon(op: str, value: Any) -> None:
    """What is added to a variance: a number of at least 0."""
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
        raise TypeError(f"{op}: eps: expected a number, got {value!r:.80}")
    if not float(value) >= 0:
        raise ValueError(f"{op}: eps: expected at least 0, got {value!r}")


def feature_map(op: str, x: Tensor) -> None:
    """x: floating point (B, C, H, W) with at least one channel and one position; B may be 0."""
    if not isinstance(x, Tensor):
        tensor(op, "x", x)
    if x.dim() != 4:
        raise ValueError(f"{op}: x: expected (B, C, H, W), got {x.dim()} dimensions, shape {tuple(x.shape)}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{op}: x: expected a floating point dtype, got {x.dtype}")
    _, channels, height, width = x.shape
    if channels == 0 or height == 0 or width == 0:
        raise ValueError(f"{op}: x: expected C, H and W of at least 1, got shape {tuple(x.shape)}")


def _its(name: str) -> str:
    return f"{name}'" if name.endswith("s") else f"{name}'s"


def companion(
    op: str, name: str, t: Tensor, x: Tensor, shape: tuple[int, ...], letters: str, *, of: str = "x", same: bool = True
) -> None:
    """Another argument of the same call: the shape that x implies, x's device, and its dtype if that is the `same`."""
    if not isinstance(t, Tensor):
        tensor(op, name, t)
    if t.shape != shape:
        raise ValueError(
            f"{op}: {name}: expected {letters} = {tuple(shape)} to go with {of} {tuple(x.shape)}, got {tuple(t.shape)}"
        )
    if same and t.dtype != x.dtype:
        raise TypeError(f"{op}: {name}: expected {_its(of)} dtype {x.dtype}, got {t.dtype}")
    if not same and t.dtype not in FLOATS:
        raise TypeError(f"{op}: {name}: expected a floating point dtype, got {t.dtype}")
    if not (t.is_cpu and x.is_cpu) and t.device != x.device:  # two devices are compared slowly
        raise ValueError(f"{op}: {name}: expected {_its(of)} device {x.device}, got {t.device}")


def tokens(op: str, name: str, t: Tensor, x: Tensor, num_heads: int) -> None:
    """A token tensor (B, M, C) of x's batch and width, M of at least 1, C a multiple of the heads."""
    channels = x.shape[1]
    if type(num_heads) is not int:  # a call that says nothing costs as much as the question itself
        whole(op, "num_heads", num_heads)
    if not isinstance(t, Tensor):
        tensor(op, name, t)
    if num_heads < 1 or channels % num_heads != 0:
        raise ValueError(f"{op}: num_heads: expected a divisor of C = {channels}, got {num_heads}")
    if t.dim() != 3 or t.shape[1] == 0:
        raise ValueError(f"{op}: {name}: expected (B, M, C) with M of at least 1, got {tuple(t.shape)}")
    companion(op, name, t, x, (x.shape[0], t.shape[1], channels), "(B, M, C)")


def spatial_slopes(op: str, x: Tensor, theta: Tensor, alpha: Tensor) -> None:
    """theta (B, M, 2C) of x's batch and channels with M of at least 1, alpha (B, M, H, W) of x's positions."""
    batch, channels, height, width = x.shape
    if not isinstance(theta, Tensor):
        tensor(op, "theta", theta)
    if theta.dim() != 3 or theta.shape[1] == 0:
        raise ValueError(f"{op}: theta: expected (B, M, 2C) with M of at least 1, got {tuple(theta.shape)}")
    count = theta.shape[1]
    companion(op, "theta", theta, x, (batch, count, 2 * channels), "(B, M, 2C)")
    companion(op, "alpha", alpha, x, (batch, count, height, width), "(B, M, H, W)")


def depthwise(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, activation: str) -> None:
    """weight (C*mult, 1, K, K) with K of 3 or 5, bias (C*mult), stride 1 or 2, a known activation."""
    channels = x.shape[1]
    if not isinstance(weight, Tensor):
        tensor(op, "weight", weight)
    if weight.dim() != 4 or weight.shape[1] != 1 or weight.shape[2] != weight.shape[3]:
        raise ValueError(f"{op}: weight: expected (C*mult, 1, K, K), got {tuple(weight.shape)}")
    if weight.shape[2] not in KERNEL_SIDES:
        raise ValueError(f"{op}: weight: expected a kernel side K in {KERNEL_SIDES}, got {weight.shape[2]}")
    outputs = weight.shape[0]
    if outputs == 0 or outputs % channels != 0:
        raise ValueError(f"{op}: weight: expected a multiple of C = {channels} filters, got {outputs}")
    companion(op, "weight", weight, x, tuple(weight.shape), "(C*mult, 1, K, K)")
    if bias is not None:
        companion(op, "bias", bias, x, (outputs,), "(C*mult,)")
    if type(stride) is not int:
        whole(op, "stride", stride)
    if stride not in STRIDES:
        raise ValueError(f"{op}: stride: expected one of {STRIDES}, got {stride}")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation: expected one of {ACTIVATIONS}, got {activation!r}")


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on where x lies; the meta device has none to ask for."""
    return not x.is_meta and torch.is_autocast_enabled(device_type(x))


def device_type(x: Tensor) -> str:
    """`x.device.type`, on the CPU at a quarter of the time."""
    return "cpu" if x.is_cpu else x.device.type


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, every floating tensor in the autocast dtype (float64 is left alone); else untouched."""
    x = tensors[0]
    if not autocasts(x):
        return tensors
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )
