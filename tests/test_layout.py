"""The table of layers is the modules', for all seven variants; it and what reads it need no torch."""

from __future__ import annotations

import json

import pytest
import torch
from kernel_support import python
from torch import nn

from mobileformer import VARIANTS, Model
from mobileformer.config import VariantConfig
from mobileformer.layout import TOKENS, convolutions, layers, state_shapes

KINDS = {
    nn.Conv2d: "convolution",
    nn.BatchNorm2d: "batch_norm",
    nn.BatchNorm1d: "batch_norm",
    nn.Linear: "linear",
    nn.LayerNorm: "layer_norm",
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS)
def config(request: pytest.FixtureRequest) -> VariantConfig:
    return request.param


def outline(config: VariantConfig, classes: int = 7, channels: int = 2) -> Model:
    with torch.device("meta"):
        return Model(config.name, num_classes=classes, in_chans=channels, use_fused=False)


def test_names_kinds_and_shapes_are_the_modules_in_their_order(config: VariantConfig) -> None:
    built = [
        (name, KINDS[type(module)], tuple(module.weight.shape))
        for name, module in outline(config).named_modules()
        if list(module.parameters(recurse=False)) and name
    ]
    assert [(row.name, row.kind, row.shape) for row in layers(config, num_classes=7, in_chans=2)] == built


def test_state_shapes_are_the_state_dict(config: VariantConfig) -> None:
    state = {key: tuple(value.shape) for key, value in outline(config).state_dict().items()}
    assert list(state_shapes(config, num_classes=7, in_chans=2).items()) == list(state.items())
    assert next(iter(state)) == TOKENS


def test_convolutions_have_the_settings_of_the_modules(config: VariantConfig) -> None:
    model, channels = outline(config), config.stem_channels
    for block, built in zip(config.blocks, model.blocks, strict=True):
        rows = {row.name: row for row in convolutions(block, channels, config.groups)}
        made = {name.removesuffix(".conv"): m for name, m in built.named_modules() if isinstance(m, nn.Conv2d)}
        assert list(rows) == list(made)
        for name, conv in made.items():
            row = rows[name]
            assert (row.in_channels, row.out_channels, row.groups) == (conv.in_channels, conv.out_channels, conv.groups)
            assert conv.kernel_size == (row.kernel_size,) * 2
            assert conv.stride == (row.stride,) * 2
            assert row.dynamic_relu == hasattr(built, f"{name}_relu")
        channels = block.out_channels


def test_parameters_add_up(config: VariantConfig) -> None:
    shapes = state_shapes(config, num_classes=1000, in_chans=3)
    counted = {
        key: shape for key, shape in shapes.items() if not key.endswith(("running_mean", "running_var")) and shape
    }
    assert sum(torch.Size(shape).numel() for shape in counted.values()) == config.num_parameters


def test_what_reads_the_table_needs_no_torch() -> None:
    code = """
import json, sys
from mobileformer.files.metadata import Metadata
from mobileformer.inference.folded import array_shapes
from mobileformer.weights.keys import module_names
from mobileformer.config import VARIANTS
array_shapes(Metadata("26m", 1000, 3)), module_names(VARIANTS["26m"])
print(json.dumps(sorted({"torch", "numpy"} & set(sys.modules))))
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["numpy"]
