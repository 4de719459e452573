"""A network of one block of each kind, for what takes seconds a block: exporters, compilers."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

import pytest

import mobileformer
import mobileformer.files.metadata
import mobileformer.weights.load
from mobileformer import VARIANTS, Model
from mobileformer.config import BlockConfig, VariantConfig
from mobileformer.measure.difference import lively_weights_
from mobileformer.training import recipe

# Groups and shuffles, several filters a channel at both strides. Exporters take seconds for it, and up to minutes for
# the smallest published network. The engine takes it too.
TINY = VariantConfig(
    "tiny",
    8,
    (
        BlockConfig("lite", 8, 2),
        BlockConfig("down", 32, 3, second_expansion=2, stride=2),
        BlockConfig("same", 32, 2),
    ),
    num_tokens=3,
    token_dim=64,
    hidden_features=48,
    num_parameters=0,
    published_madds=0,
    published_top1=0.0,
    groups=4,
)


UNGROUPED = dataclasses.replace(TINY, name="tiny_ungrouped", groups=1)


@contextlib.contextmanager
def tiny_variants() -> Iterator[None]:
    """Both are variants inside the block, for files too."""
    known = MappingProxyType(VARIANTS | {config.name: config for config in (TINY, UNGROUPED)})
    with pytest.MonkeyPatch.context() as patch:
        for module in (
            mobileformer,
            mobileformer.config,
            mobileformer.files.metadata,
            mobileformer.weights.load,
            recipe,
        ):
            patch.setattr(module, "VARIANTS", known)
        yield


def add_tiny(monkeypatch: pytest.MonkeyPatch) -> Model:
    """ "tiny" is a variant until the test ends; and one of it."""
    monkeypatch.setattr(mobileformer.config, "VARIANTS", MappingProxyType(VARIANTS | {"tiny": TINY}))
    return make("tiny")


def make(variant: str, **kwargs: Any) -> Model:
    """A network of seven classes that every part moves, in evaluation mode."""
    model = Model(variant, num_classes=7, **kwargs).eval()
    lively_weights_(model, seed=5)
    return model
