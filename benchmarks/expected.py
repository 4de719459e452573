"""What is expected of an operator's row: the least work it is, the kernel that has to serve, how far it may be off."""

from __future__ import annotations

import math

import forms
import torch
from torch import Tensor

from mf_kernels import testing

# What a kernel may err is made from plain PyTorch on contiguous maps. In the other layout and compiled it sums in
# another order, up to 3.3 times beyond that; left out for it, the faster peer would be missing from the ratio.
PEERS_SHARE = 8


def kernel(case: testing.Case, direction: str, backend: str, device: str) -> str:
    """The record's name of the kernel that has to serve, without its instruction set."""
    suffix = "" if isinstance(case, forms.Form) else {"forward": "_fwd", "backward": "_bwd"}[direction]
    return f"{case.op}{suffix}:{backend}:{device}"


def check_served(counts: dict[str, int], expected: str | None) -> str | None:
    """What served, in words; raises AssertionError unless it was the one kernel expected, or none where that is None.

    The record of a CPU kernel ends in its instruction set, which the expectation leaves open.
    """
    served = sorted(name for name in counts if not name.endswith(":reference"))
    if expected is None:
        right = not served
    else:
        right = len(served) == 1 and f"{served[0]}:".startswith(f"{expected}:") and len(served) == len(counts)
    if not right:
        raise AssertionError(f"expected {expected or 'no kernel'} to serve, got {counts}")
    return ", ".join(served) or None


def share_of_error_allowed(
    case: testing.Case,
    dtype: torch.dtype,
    results: dict[str, Tensor],
    allowed: dict[str, testing.Error] | None = None,
) -> float:
    """The largest error over the error allowed, of all results, typical and largest; infinity where one is NaN."""
    expected = testing.expectation(case, dtype)
    allowed = allowed or expected.allowed
    share = 0.0
    for name, actual in results.items():
        for made, most in zip(testing.error(actual, expected.truth[name]), allowed[name], strict=True):
            if made != 0:
                share = max(share, made / most if most > 0 and not math.isnan(made) else math.inf)
    return share


def minimal_bytes(case: testing.Case, direction: str, dtype: torch.dtype) -> int:
    """Every input read once and every output written once; backward, the output's gradient is one of the inputs."""
    inputs = sum(map(math.prod, case.shapes.values()))
    output = math.prod(case.output_shape)
    elements = inputs + output if direction == "forward" else 2 * inputs + output
    return elements * dtype.itemsize


def flops(case: testing.Case, direction: str) -> int | None:
    """Multiplications and additions of the products, exponentials and slopes not counted; None where those are all.

    Attention forward is two products of L x C x M. Backward is five: the scores again, the gradient of the weights,
    and three to the arguments (the map is two of Mobile-to-Former's, the tokens two of Former-to-Mobile's). A spatial
    dynamic ReLU makes two slopes by two products, and backward those again and two to each of both their factors.
    """
    if case.op == "token_side":
        rows = case.shapes["tokens"][0] * case.shapes["tokens"][1]
        attention = 4 * rows * case.shapes["tokens"][1] * case.shapes["tokens"][2]
        layers = [shape for name, shape in case.shapes.items() if name.startswith("p") and len(shape) == 2]
        every, once = layers[:8], layers[8:]  # the slopes come from token 0
        products = rows * sum(map(math.prod, every)) + case.shapes["tokens"][0] * sum(map(math.prod, once))
        return 2 * products + attention
    if case.op.startswith("depthwise"):
        forward = 2 * math.prod(case.output_shape) * math.prod(case.shapes["weight"][2:])
        return forward if direction == "forward" else 2 * forward
    tokens = case.shapes.get("q", case.shapes.get("k", case.shapes.get("alpha")))
    if tokens is None:
        return None
    product = 2 * math.prod(case.shapes["x"]) * tokens[1]
    return product * {"forward": 2, "backward": 6 if case.op == "spatial_dynamic_relu" else 5}[direction]
