"""torch.compile and torch.export of the model."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable

import pytest
import torch
from golden_support import recipe_image, recipe_model
from tiny_support import add_tiny, make
from torch import Tensor, nn

from mobileformer import Model

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")


def predict(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def small_image(batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return recipe_image(batch, 64, 64, seed=4, dtype=dtype)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> Model:
    return add_tiny(monkeypatch).double()


@pytest.mark.parametrize(
    ("variant", "use_fused", "spatial"),
    [("tiny", False, False), ("26m", True, False), ("tiny", True, True)],
    ids=["plain", "fused", "spatial"],
)
def test_compiles_into_one_graph(variant: str, use_fused: bool, spatial: bool) -> None:
    torch.compiler.reset()
    model = make(variant, use_fused=use_fused, spatial_dynamic_relu=spatial).double()
    x = small_image(dtype=torch.float64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(predict(compiled, x), predict(model, x), rtol=0, atol=1e-9)


def test_compiled_training_step(tiny: Model) -> None:
    torch.compiler.reset()
    model = tiny.train()
    twin = copy.deepcopy(model)
    x = small_image(4, torch.float64)
    model(x).square().mean().backward()
    torch.compile(twin, fullgraph=True, backend="aot_eager")(x).square().mean().backward()
    expected = {key: p.grad for key, p in model.named_parameters()}
    scale = max(g.abs().max().item() for g in expected.values())
    for key, parameter in twin.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[key], rtol=1e-7, atol=1e-11 * scale, msg=key)


def test_compiles_with_any_batch_and_size(tiny: Model) -> None:
    torch.compiler.reset()
    model = tiny
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    predict(compiled, recipe_image(2, 64, 96, seed=1))
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch, height, width in (
            (3, 96, 64),
            (30, 64, 96),
        ):  # tokens of 30 images are more rows than one kernel takes
            x = recipe_image(batch, height, width, seed=2)
            torch.testing.assert_close(predict(compiled, x), predict(model, x), rtol=0, atol=1e-9)


class FirstBlocks(nn.Module):
    """Stem, lite and same block, which call every kernel that the network does: what a compiler has to know."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.tokens, self.stem, self.blocks = model.tokens, model.stem, model.blocks[:2]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, tokens = self.stem(x), self.tokens.repeat(x.shape[0], 1, 1)
        for block in self.blocks:
            x, tokens = block(x, tokens)
        return x, tokens


@needs_compiler
def test_inductor() -> None:
    torch.compiler.reset()
    model = FirstBlocks(recipe_model("52m", dtype=torch.float32))
    compiled = torch.compile(model, fullgraph=True)
    for value, expected in zip(predict(compiled, small_image()), predict(model, small_image()), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", [lambda m: m, Model.to_inference], ids=["model", "inference"])
def test_export_with_a_dynamic_batch(form: Callable, tiny: Model) -> None:
    model = form(tiny.float())
    dynamic = {"x": {0: torch.export.Dim("batch", min=1, max=64)}}
    program = torch.export.export(model, (small_image(3),), dynamic_shapes=dynamic, strict=False)
    for batch in (1, 5, 40):
        x = small_image(batch)
        torch.testing.assert_close(program.module()(x), predict(model, x), rtol=1e-4, atol=1e-5)
