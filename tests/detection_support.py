"""For tests of detectors: the other side of comparisons, a small variant with all four strides, images and boxes."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor

import mobileformer
from mobileformer import VARIANTS
from mobileformer._torchvision import ensure_torchvision
from mobileformer.config import BlockConfig, VariantConfig

SMALL = VariantConfig(
    "small",
    8,
    (
        BlockConfig("lite", 8, 2, stride=2),
        BlockConfig("down", 12, 2, second_expansion=2, stride=2),
        BlockConfig("down", 16, 2, second_expansion=2, stride=2),
        BlockConfig("same", 16, 2),
        BlockConfig("down", 24, 2, second_expansion=2, stride=2),
    ),
    num_tokens=3,
    token_dim=16,
    hidden_features=24,
    num_parameters=0,
    published_madds=0,
    published_top1=0.0,
)


def add_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """ "small" is a variant until the test ends."""
    monkeypatch.setattr(mobileformer.config, "VARIANTS", MappingProxyType(VARIANTS | {"small": SMALL}))


def torchvision_ops(*, compiled: bool = False) -> Any:
    """`torchvision.ops`, or the test is skipped; beside a torch for the CPU its compiled operators do not load."""
    try:
        ops = ensure_torchvision().ops
    except ImportError as error:
        pytest.skip(f"torchvision is the other side of the comparison: {error}")
    if compiled:
        try:
            ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
        except (RuntimeError, NotImplementedError) as error:
            pytest.skip(f"torchvision's compiled operators do not load: {str(error)[:60]}")
    return ops


def some_targets(count: int, side: int, num_classes: int, *, seed: int = 0) -> list[dict[str, Tensor]]:
    """For `count` images of this side: none, one, two, ... boxes."""
    generator = torch.Generator().manual_seed(seed)
    targets = []
    for boxes in range(count):
        corner = torch.rand(boxes, 2, generator=generator) * side * 0.6
        sides = (0.15 + 0.25 * torch.rand(boxes, 2, generator=generator)) * side
        labels = torch.randint(0, num_classes, (boxes,), generator=generator)
        targets.append({"boxes": torch.cat([corner, corner + sides], 1), "labels": labels})
    return targets
