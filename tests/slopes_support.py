"""Values at which the slope of an activation jumps, with both neighbours, and the gradients that come out there."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mf_kernels import testing

INF, NAN = math.inf, math.nan
CORNERS = (-3.0, 0.0, 3.0, 6.0)
# The gradient that reaches a value behind which the activation is flat is nothing, whatever comes from above.
FLAT = {
    "hardswish": lambda z: z <= -3,
    "relu6": lambda z: not 0 < z < 6,
    "identity": lambda z: False,
}


def corner_values(dtype: torch.dtype) -> Tensor:
    """Each corner between its neighbours (of 0 the smallest normal numbers), the infinities, NaN."""
    corners = torch.tensor(CORNERS, dtype=dtype)
    tiny = torch.finfo(dtype).tiny
    neighbours = [torch.nextafter(corners, torch.full_like(corners, way)) for way in (-INF, INF)]
    neighbours = [torch.where(corners == 0, way * tiny, n) for way, n in zip((-1, 1), neighbours, strict=True)]
    return torch.cat([corners, *neighbours, torch.tensor([-INF, INF, NAN], dtype=dtype)])


def slopes(activation: str, z: Tensor) -> Tensor:
    """As torch has them in float64; at NaN, where its vectors and scalars differ, 0 for relu6 and 1 for hardswish."""
    known = z.double().nan_to_num(nan=-1.0 if activation == "relu6" else 4.0, posinf=INF, neginf=-INF)
    known.requires_grad_()
    functions = {"relu6": F.relu6, "hardswish": F.hardswish, "identity": torch.clone}
    return torch.autograd.grad(functions[activation](known).sum(), known)[0]


def depthwise_row(activation: str, dtype: torch.dtype) -> tuple[testing.Case, dict[str, Tensor]]:
    """A channel for each value on a map of one position, filters of 1: what is activated is the value itself."""
    z = corner_values(dtype)
    shapes = {"x": (1, len(z), 1, 1), "weight": (len(z), 1, 3, 3), "bias": (len(z),)}
    case = testing.Case("depthwise_conv2d", "corners", shapes, "corners", {"stride": 1, "activation": activation})
    weight = torch.zeros(shapes["weight"], dtype=dtype)
    weight[:, :, 1, 1] = 1
    return case, {"x": z.view(shapes["x"]), "weight": weight, "bias": torch.zeros(len(z), dtype=dtype)}


def assert_slopes(activation: str, results: dict[str, Tensor], d_y: float) -> None:
    """`results` of `depthwise_row` with a gradient of `d_y` everywhere."""
    z = corner_values(results["d_x"].dtype)
    expected = d_y * slopes(activation, z)
    if math.isinf(d_y):
        flat = torch.tensor([FLAT[activation](value) for value in z.tolist()])
        expected = torch.where(flat, 0.0, expected)
    for name in ("d_x", "d_bias"):
        actual = results[name].flatten().double()
        torch.testing.assert_close(actual, expected, rtol=1e-2 if z.dtype == torch.bfloat16 else 1e-6, atol=0)


def dynamic_relu_row() -> tuple[Tensor, Tensor]:
    """x and theta: every pair of a theta1 at its corners and a theta2, on x of both signs and 0."""
    corners = torch.tensor((-3.0, 3.0))
    neighbours = [torch.nextafter(corners, torch.full_like(corners, way)) for way in (-INF, INF)]
    theta1 = torch.cat([corners, *neighbours, torch.tensor([-INF, INF, -1.5, 0.25])])
    theta2 = torch.tensor([-INF, -3.0, 0.5, 3.0, INF])  # 0 and 3/2 are ties with a slope of theta1
    pairs = torch.cartesian_prod(theta1, theta2)
    x = torch.tensor([-1.5, -1.0, 0.0, 2.0, 1.0]).expand(len(pairs), 5).reshape(1, len(pairs), 1, 5)
    return x.contiguous(), pairs.T.reshape(1, -1).contiguous()
