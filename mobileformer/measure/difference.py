"""How far numbers are from a reference, and weights that let errors show."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["Difference", "difference", "lively_weights_"]


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
