"""Rows of shapes for the operators' tests: those of `mf_kernels.testing`, and one for each branch of Triton and CUDA.

Legend: B batch, C channels, H W height and width, M tokens, N heads, K kernel side.
"""

from __future__ import annotations

from collections.abc import Sequence

from mf_kernels import _triton, testing
from mf_kernels._cases import _depthwise_conv2d as depthwise
from mf_kernels._cases import _dynamic_relu as dynamic_relu
from mf_kernels._cases import _former_to_mobile as former_to_mobile
from mf_kernels._cases import _mobile_to_former as mobile_to_former
from mf_kernels.testing import CASES, Case

LAYERS = tuple(case for case in CASES if case.layer_of)
BRANCHES = tuple(case for case in CASES if not case.layer_of)
# Several filters a channel, each with a way of its own to a channel of the output
FILTERS = tuple(case for case in BRANCHES if "filters a channel" in case.reaches)
# More than one task of the CPU's kernels works at one result
SPLIT = tuple(case for case in BRANCHES if any(part in case.reaches for part in ("spans", "strips", "task takes")))


# One small row of every operator with tails in every axis, for properties that do not depend on the branch. Triton's
# interpreter takes its time for every place of a filter.
SMALL = dict(testing.SMALL)
if _triton.interpreting():
    SMALL["depthwise_conv2d"] = depthwise("tails in every axis, stride 2", 2, 3, 5, 3, 1, 3, 2, "identity")


def attentions(reaches: str, *shape: int) -> list[Case]:
    """A row of both attentions: B, C, H, W, M, N."""
    return [mobile_to_former(reaches, *shape), former_to_mobile(reaches, *shape)]


TRITON = (
    *attentions("one position, one channel a head", 1, 2, 1, 1, 1, 2),
    *(case for M in range(1, 9) for case in attentions(f"{M} tokens; odd heads; one tile", 2, 14, 3, 5, M, 2)),
    *attentions("several tiles in each of two splits, the last one short", 1, 40, 17, 31, 6, 2),
    *attentions("several tiles, one split for each sample and head", 2, 6, 16, 25, 3, 2),
    *attentions("a head of several chunks, the last one short", 1, 146, 5, 9, 4, 1),
    *attentions("several chunks, two heads", 1, 272, 2, 9, 3, 2),
    *attentions("a whole tile, no padding but the tokens'", 1, 32, 8, 16, 8, 2),
    *attentions("no samples", 0, 12, 5, 5, 3, 2),
    dynamic_relu("one value", 1, 1, 1, 1),
    dynamic_relu("odd sides", 3, 13, 3, 5),
    dynamic_relu("rows that fill vectors exactly", 2, 16, 4, 16),
    dynamic_relu("several tiles of channels, the last one short", 2, 133, 3, 3),
    dynamic_relu("several tiles in each of two splits", 1, 12, 37, 61),
    dynamic_relu("several tiles, one split", 2, 6, 33, 50),
    dynamic_relu("no samples", 0, 5, 4, 4),
    depthwise("one value", 1, 1, 1, 1),
    depthwise("a window wider than the map", 2, 3, 2, 1, 1, 5, 1, "relu6", False),
    depthwise("the same, stride 2", 1, 3, 1, 2, 1, 5, 2, "identity"),
    depthwise("several tiles of channels and rows, odd sides", 1, 19, 11, 9, 1, 3, 1, "identity"),
    depthwise("stride 2, even sides", 1, 18, 8, 6, 1, 3, 2, "relu6"),
    depthwise("stride 2, odd sides, several tiles", 1, 3, 37, 21, 1, 3, 2, "hardswish", False),
    depthwise("5 x 5, stride 2", 1, 4, 9, 7, 1, 5, 2),
    depthwise("2 filters a channel", 1, 5, 6, 7, 2, 3, 1, "relu6"),
    depthwise("6 filters a channel, stride 2", 1, 3, 5, 6, 6, 3, 2, "identity", False),
    depthwise("3 filters a channel, 5 x 5", 1, 2, 5, 4, 3, 5, 1, "identity"),
    depthwise("no samples", 0, 5, 6, 6, 2, 3, 1, "identity"),
)
# What half precision adds, loads and stores of another width, is the same in every branch
TRITON_IN_HALF = (
    *SMALL.values(),
    *(case for case in TRITON if case.reaches.startswith(("several", "one value", "2 f"))),
)

# Branches of the grid that the rows for the CPU kernels do not reach
CUDA = (
    dynamic_relu("more columns than a block has threads", 1, 2080, 1, 8),
    dynamic_relu("more columns of single values", 2, 523, 1, 3),
    dynamic_relu("rows of two and of four positions", 2, 12, 4, 8),
    dynamic_relu("planes in parts", 1, 2, 96, 181),
    *attentions("16 bytes of channels; 3 lanes of a group of 4 have some", 2, 48, 5, 8, 6, 2),
    *attentions("8 bytes of channels in half precision; 3 tokens", 1, 24, 8, 8, 3, 2),
    *attentions("8 bytes of positions in half precision; 4 tokens", 1, 10, 3, 4, 4, 2),
    *attentions("8 bytes of positions in half precision; 6 tokens", 1, 10, 5, 4, 6, 2),
    *attentions("three heads: some groups of a block stay empty", 1, 48, 4, 4, 7, 3),
    *attentions("all 32 lanes of a group", 1, 256, 3, 8, 4, 1),
    *attentions("several steps of a part", 1, 16, 72, 72, 6, 2),
    *attentions("no tokens compiled for: 5 of 6; many samples", 9, 8, 4, 4, 5, 1),
    depthwise("16 bytes of columns", 2, 3, 6, 16),
    depthwise("16 bytes of columns, stride 2", 1, 2, 9, 32, stride=2, activation="relu6"),
    depthwise("16 bytes of columns, 2 filters a channel", 1, 2, 5, 16, 2, activation="identity"),
    depthwise("16 bytes of channels, 3 filters a channel", 1, 8, 5, 6, 3, stride=2, activation="identity"),
    depthwise("more channels than a block holds", 1, 288, 3, 5),
    depthwise("tiles in parts, many samples", 5, 8, 33, 31, activation="relu6"),
)


def unique(*rows: Sequence[Case]) -> tuple[Case, ...]:
    """Each operator, shape and options once."""
    return tuple({case.id: case for some in rows for case in some}.values())


__all__ = [
    "BRANCHES",
    "CUDA",
    "FILTERS",
    "LAYERS",
    "SMALL",
    "SPLIT",
    "TRITON",
    "TRITON_IN_HALF",
    "attentions",
    "dynamic_relu",
    "unique",
]
