"""A network of one block of each kind, for what takes seconds a block: exporters, compilers."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import pytest

import mobileformer
from mobileformer import VARIANTS, Model
from mobileformer.config import BlockConfig, VariantConfig
from mobileformer.measure.difference import lively_weights_

# Groups and shuffles, several filters a channel at both strides. Exporters take seconds for it, and up to minutes for
# the smallest published network.
TINY = VariantConfig(
    "tiny",
    8,
    (
        BlockConfig("lite", 8, 2),
        BlockConfig("down", 16, 3, second_expansion=2, stride=2),
        BlockConfig("same", 16, 2),
    ),
    num_tokens=3,
    token_dim=16,
    hidden_features=24,
    num_parameters=0,
    published_madds=0,
    published_top1=0.0,
    groups=2,
)


def add_tiny(monkeypatch: pytest.MonkeyPatch) -> Model:
    """ "tiny" is a variant until the test ends; and one of it."""
    monkeypatch.setattr(mobileformer.config, "VARIANTS", MappingProxyType(VARIANTS | {"tiny": TINY}))
    return make("tiny")


def make(variant: str, **kwargs: Any) -> Model:
    """A network of seven classes that every part moves, in evaluation mode."""
    model = Model(variant, num_classes=7, **kwargs).eval()
    lively_weights_(model, seed=5)
    return model
