"""How far numbers are from a reference, how far they may be, and weights that let errors show."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = [
    "GRADIENT_BOUNDS",
    "LOGIT_BOUNDS",
    "Difference",
    "difference",
    "lively_weights_",
    "relative_norm",
    "why_wrong",
]

# What rounding explains and a mistake does not, by what is compared: the largest difference of a logit over the largest
# logit. What is further off computes something else, and is neither timed nor written.
LOGIT_BOUNDS: Mapping[str, dict[torch.dtype, float]] = {
    # A network with `lively_weights_` against float64. Plain PyTorch has 2e-6 in float32, 2e-2 in bfloat16.
    "inference": {torch.float64: 1e-9, torch.float32: 3e-5, torch.bfloat16: 0.1},
    # The same in training, where the batch's own statistics amplify rounding: plain PyTorch has 2e-4 in float32.
    "training": dict.fromkeys((torch.float64, torch.float32, torch.bfloat16), 1e-3),
    # Another runtime, which joins and reorders as it likes, with anybody's weights. float32 makes about 1e-6.
    "runtime": {torch.float32: 1e-4, torch.bfloat16: 0.2},
    # Two ways through the same weights, by the largest difference among all images of a data set.
    "data set": {torch.float32: 1e-3},
    # Plain PyTorch itself on a card, whose products may be sums of TF32; bfloat16 is autocast, weights in float32.
    "card": {torch.float32: 1e-3, torch.bfloat16: 0.6},
}
# The same of all gradients in a row, by `relative_norm`. Plain PyTorch has up to 1e-2 in float32: where rounding pushes
# a value across a kink of an activation, its gradient changes at once. In bfloat16 they are far off.
GRADIENT_BOUNDS: Mapping[str, dict[torch.dtype, float]] = {
    "training": dict.fromkeys((torch.float64, torch.float32, torch.bfloat16), 5e-2),
    "card": {torch.float32: 5e-2, torch.bfloat16: 2.0},
}


@dataclass(frozen=True)
class Difference:
    """largest: max |actual - reference|. relative: the same over max |reference|."""

    largest: float
    relative: float


def difference(actual: Tensor, reference: Tensor) -> Difference:
    """Compare two tensors of one shape in float64. A value that is not finite gives an infinite difference.

    Raises:
        ValueError: the shapes differ.
    """
    if actual.shape != reference.shape:
        raise ValueError(f"actual: expected the reference's shape {tuple(reference.shape)}, got {tuple(actual.shape)}")
    if actual.numel() == 0:
        return Difference(0.0, 0.0)
    exact = reference.detach().to("cpu", torch.float64)
    largest = (actual.detach().to("cpu", torch.float64) - exact).abs().max().item()
    if not math.isfinite(largest):
        return Difference(math.inf, math.inf)
    scale = exact.abs().max().item()
    return Difference(largest, largest / scale if scale > 0 else (0.0 if largest == 0 else math.inf))


def relative_norm(actual: Iterable[Tensor], reference: Iterable[Tensor]) -> float:
    """Norm of the difference over the norm of the reference, of all tensors in a row, in float64."""
    off, size = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for a, r in zip(actual, reference, strict=True):
        exact = r.detach().double()
        off = off.to(exact.device) + (a.detach().double() - exact).square().sum()
        size = size.to(exact.device) + exact.square().sum()
    return (off / size).sqrt().item()


def why_wrong(what: str, off: float, bound: float, *, of: str = "the largest one") -> str | None:
    """None where `off`, in units of `of`, is within `bound`; else what is wrong, in words. NaN is within no bound."""
    if off <= bound:
        return None
    return f"{what} are off by {off:.1e} of {of}, more than {bound:g}"


@torch.no_grad()
def lively_weights_(model: nn.Module, seed: int = 0) -> None:
    """Fill a model, in place, with seeded random weights that let every part move the result.

    A fresh model hides errors: its linear layers start near zero, so attention, gates, dynamic ReLU hardly
    count. Here matrices are N(0, 1) / sqrt(fan-in), convolutions 0.9 of that, tokens N(0, 1), biases and
    running means 0.1 * N(0, 1), scales and running variances uniform in 0.5 to 1.5.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        if not value.is_floating_point():
            continue
        leaf = name.rpartition(".")[2]
        normal = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        uniform = torch.rand(value.shape, generator=generator, dtype=torch.float64)
        if leaf in ("bias", "running_mean"):
            filled = 0.1 * normal
        elif value.ndim == 1:
            filled = 0.5 + uniform
        elif name.startswith("tokens"):
            filled = normal
        else:
            gain = 0.9 if value.ndim == 4 else 1.0
            filled = gain / math.sqrt(math.prod(value.shape[1:])) * normal
        value.copy_(filled)
