"""Multiply-adds of one 224 x 224 image by two named counters, in units of 1e6. For reading only.

Counters do not agree, so the name of the counter belongs to the number:

| counter            | counts                                                                              |
|--------------------|-------------------------------------------------------------------------------------|
| fvcore             | fvcore 0.1.5, its default operators, on the authors' code; names like 26M round it   |
| conv+linear+matmul | convolutions, linear layers, attention's products; `torch.utils.flop_counter` / 2    |

The plain path of this package gives the same under fvcore, once its mean over the last map is counted as the
authors' pooling layer is: one for each value.
"""

from __future__ import annotations

__all__ = ["COUNTERS", "MADDS", "TOP1_SOURCE"]

COUNTERS = {
    "fvcore": "fvcore 0.1.5 on the authors' code (the published counts)",
    "conv+linear+matmul": "convolution + linear + attention matrix products (torch.utils.flop_counter / 2)",
}
MADDS = {
    "26m": {"fvcore": 26.0, "conv+linear+matmul": 23.550208},
    "52m": {"fvcore": 51.8, "conv+linear+matmul": 49.290496},
    "96m": {"fvcore": 96.3, "conv+linear+matmul": 92.017040},
    "151m": {"fvcore": 152.0, "conv+linear+matmul": 146.249168},
    "214m": {"fvcore": 215.3, "conv+linear+matmul": 208.374240},
    "294m": {"fvcore": 295.4, "conv+linear+matmul": 286.732160},
    "508m": {"fvcore": 510.6, "conv+linear+matmul": 498.467680},
}
TOP1_SOURCE = "ImageNet-1k validation, 224 x 224, as the authors state (README of AAboys/MobileFormer)"
