"""The first convolution of weights for other numbers of channels."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

__all__ = ["adapt_channels", "adapt_numbers"]


def adapt_channels(weight: Tensor, in_chans: int) -> Tensor:
    """weight (O,n,h,w) of a convolution -> (O,in_chans,h,w), as `timm.layers` and timm's `create_model` have it.

        in_chans = 1: w'[:, 0] = sum_c w[:, c]
        else:         w'[:, c] = n / in_chans * w[:, c mod n]

    A grey image, and the same image in every channel, give the same output: exactly for n = 1 and in_chans = 1. Sums
    are in float64. Raises ValueError for numbers of channels below 1 and anything but four dimensions.
    """
    if weight.ndim != 4 or weight.shape[1] < 1 or in_chans < 1:
        raise ValueError(
            f"weight, in_chans: expected (O,n,h,w) and at least 1 channel, got {tuple(weight.shape)} and {in_chans}"
        )
    count = weight.shape[1]
    if in_chans == count:
        return weight
    wide = weight.double()
    if in_chans == 1:
        adapted = wide.sum(dim=1, keepdim=True)
    else:
        adapted = wide.repeat(1, math.ceil(in_chans / count), 1, 1)[:, :in_chans] * (count / in_chans)
    return adapted.to(weight.dtype)


def adapt_numbers(values: Sequence[float], in_chans: int) -> list[float]:
    """A mean or std, one number a channel, for as many channels as that first convolution then has."""
    if in_chans == len(values):
        return list(values)
    if in_chans == 1:
        return [sum(values) / len(values)]
    return [values[channel % len(values)] for channel in range(in_chans)]
