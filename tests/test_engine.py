"""The inference engine's numbers: against the golden files and the model in float64, in every instruction set."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from bfloat16_agreement import measure, recipe_images
from engine_support import (
    exact_logits,
    exact_model,
    folded,
    image,
    isas,
    largest,
    needs_engine,
    stages_of,
    typical,
)
from golden import recipe
from golden_support import golden_file
from hypothesis import given, settings
from hypothesis import strategies as st

from mobileformer.config import VARIANTS
from mobileformer.inference import Engine

pytestmark = needs_engine

FILES = ["26m", "96m", "294m", "26m_spatial", "294m_spatial"]
EPSILON = float(np.finfo(np.float32).eps)
ISA = pytest.mark.parametrize("isa", isas())
SPATIAL = pytest.mark.parametrize("spatial", [False, True], ids=["token 0", "spatial"])


@functools.lru_cache(maxsize=4)  # hundreds of megabytes each
def engine(variant: str, spatial: bool = False, dtype: str = "float32", isa: str | None = None) -> Engine:
    return Engine(folded(variant, spatial), dtype, isa=isa)


@functools.cache
def float32_error(file: str, size: str) -> float:
    """What plain PyTorch in float32 is off the golden logits by."""
    variant, _, mode = file.partition("_")
    plain = exact_model(variant, mode == "spatial")
    with torch.inference_mode():
        logits = plain.float()(torch.from_numpy(golden_image(size))).numpy()
    plain.double()
    return largest(logits, golden_file(file)[f"logits_{size}"])


def golden_image(size: str) -> np.ndarray:
    return recipe.image(2, 224, 224, 1) if size == "224" else recipe.image(2, 192, 256, 2)


@ISA
@pytest.mark.parametrize("size", ["224", "192x256"])
@pytest.mark.parametrize("file", FILES)
def test_golden_logits(file: str, size: str, isa: str) -> None:
    """As near as asked, and not much further off than PyTorch in the same precision."""
    variant, _, mode = file.partition("_")
    logits = engine(variant, mode == "spatial", isa=isa)(golden_image(size))
    off = largest(logits, golden_file(file)[f"logits_{size}"])
    assert off < 2e-4
    assert off < 5 * float32_error(file, size)


@ISA
@pytest.mark.parametrize(("variant", "spatial"), [("96m", False), ("26m", False), ("26m", True), ("96m", True)])
def test_every_stage(variant: str, spatial: bool, isa: str) -> None:
    """What fails names the first stage that is off, in the order of execution, so the fault lies just before it."""
    x = image(2, 70, 93, seed=5)
    model = exact_model(variant, spatial)
    exact = stages_of(model, torch.from_numpy(x).double())
    plain = stages_of(model.float(), torch.from_numpy(x))
    model.double()
    found = engine(variant, spatial, isa=isa).stages(x)
    assert set(found) <= set(exact)
    assert set(found) >= {name for name in exact if not name.endswith(("_relu", ".project"))}
    for name, value in found.items():
        assert value.shape == exact[name].shape, name
        scale = float(np.sqrt(np.square(exact[name]).mean()))
        assert typical(value, exact[name]) < 5 * typical(plain[name], exact[name]) + EPSILON * scale, name


@ISA
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_every_variant(variant: str, isa: str) -> None:
    x = image(2, 64, 96, seed=7)
    assert largest(engine(variant, isa=isa)(x), exact_logits(variant, x)) < 2e-4


@ISA
@SPATIAL
@pytest.mark.parametrize("variant", ["26m", "52m", "96m"])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 47), (63, 129), (97, 34), (40, 200)])
def test_odd_sizes(variant: str, height: int, width: int, spatial: bool, isa: str) -> None:
    x = image(1, height, width, seed=height)
    assert largest(engine(variant, spatial, isa=isa)(x), exact_logits(variant, x, spatial)) < 2e-4


@ISA
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", ["26m", "96m"])
def test_batches(variant: str, dtype: str, isa: str) -> None:
    """A sample does not see the others, and none is left out."""
    x = image(7, 45, 58, seed=1)
    run = engine(variant, dtype=dtype, isa=isa)
    together = run(x)
    tolerance = 1e-4 if dtype == "float32" else 2e-2 * np.abs(together).max()
    for index in range(7):
        np.testing.assert_allclose(run(x[index : index + 1])[0], together[index], rtol=0, atol=tolerance)
    assert run(x[:0]).shape == (0, 1000)
    maps, tokens = run.forward_features(x[:0])
    assert [len(m) for m in maps] == [0] * 4
    assert len(tokens) == 0


@settings(max_examples=40, deadline=None)
@given(
    network=st.sampled_from([("26m", False), ("26m", True), ("52m", False), ("96m", False), ("96m", True)]),
    batch=st.integers(0, 3),
    height=st.integers(32, 100),
    width=st.integers(32, 100),
    isa=st.sampled_from(isas()),
)
def test_any_shape(network: tuple[str, bool], batch: int, height: int, width: int, isa: str) -> None:
    x = image(batch, height, width, seed=height * width)
    assert largest(engine(*network, isa=isa)(x), exact_logits(network[0], x, network[1])) < 2e-4


@ISA
@SPATIAL
@pytest.mark.parametrize("variant", ["26m", "294m"])
def test_features_are_those_of_the_blocks(variant: str, spatial: bool, isa: str) -> None:
    x = image(2, 75, 100, seed=3)
    run = engine(variant, spatial, isa=isa)
    maps, tokens = run.forward_features(x)
    model = exact_model(variant, spatial)
    exact = stages_of(model, torch.from_numpy(x).double())
    plain = stages_of(model.float(), torch.from_numpy(x))
    model.double()
    last = {}
    for index in range(len(VARIANTS[variant].blocks)):
        last[exact[f"blocks.{index}"].shape[2]] = f"blocks.{index}"
    assert [m.shape[2:] for m in maps] == [(19, 25), (10, 13), (5, 7), (3, 4)]
    for value, stage in [*zip(maps, (last[size] for size in (19, 10, 5, 3)), strict=True), (tokens, "tokens")]:
        assert largest(value, exact[stage]) < 5 * largest(plain[stage], exact[stage]), stage
    np.testing.assert_array_equal(run(x), run.stages(x)["logits"])


# bfloat16


def relative(logits: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(logits - exact) / np.linalg.norm(exact))


@ISA
@pytest.mark.parametrize("file", FILES)
def test_bfloat16_logits(file: str, isa: str) -> None:
    variant, _, mode = file.partition("_")
    logits = engine(variant, mode == "spatial", "bfloat16", isa)(golden_image("224"))
    assert relative(logits, golden_file(file)["logits_224"]) < 2e-2


@ISA
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_bfloat16_of_every_variant(variant: str, isa: str) -> None:
    x = image(2, 64, 96, seed=7)
    logits = engine(variant, dtype="bfloat16", isa=isa)(x)
    assert relative(logits, exact_logits(variant, x)) < 2e-2
    assert relative(logits, engine(variant, isa=isa)(x)) > 1e-4, "this is not bfloat16"


@settings(max_examples=40, deadline=None)
@given(
    network=st.sampled_from([("26m", False), ("26m", True), ("52m", False), ("96m", False), ("96m", True)]),
    batch=st.integers(1, 2),
    height=st.integers(32, 100),
    width=st.integers(32, 100),
    isa=st.sampled_from(isas()),
)
def test_bfloat16_of_any_shape(network: tuple[str, bool], batch: int, height: int, width: int, isa: str) -> None:
    x = image(batch, height, width, seed=height * width)
    logits = engine(*network, dtype="bfloat16", isa=isa)(x)
    assert relative(logits, exact_logits(network[0], x, network[1])) < 2e-2


@ISA
def test_bfloat16_weights_of_rows(isa: str) -> None:
    """Rows of linear layers are 16-bit integers with a factor: of any size, or of zeros."""
    network = folded("26m")
    arrays = dict(network.arrays)
    weight, bias = arrays["head.classifier.weight"].copy(), arrays["head.classifier.bias"]
    factors = np.array([1e-30, 1e-3, 1, 1e3, 1e30], np.float32)
    weight[0:5] = weight[5:10] * factors[:, None]
    weight[10] = 0
    arrays["head.classifier.weight"] = weight
    logits = Engine(replace(network, arrays=arrays), "bfloat16", isa=isa)(image(1, 64, 64))[0]
    np.testing.assert_allclose(logits[0:5] - bias[0:5], (logits[5:10] - bias[5:10]) * factors, rtol=1e-3, atol=1e-6)
    assert logits[10] == bias[10]
    # on the scale of the others, for which a factor that is wrong by itself would not do
    exact = Engine(network, isa=isa)(image(1, 64, 64))[0]
    assert relative(logits[5:10], exact[5:10]) < 5e-2


@pytest.mark.parametrize("variant", ["26m", "96m"])
def test_bfloat16_names_the_same_class(variant: str) -> None:
    """A sample of what `bfloat16_agreement.py` measures on 1,000 images of each variant."""
    found = measure(folded(variant), recipe_images(60, 96))
    assert found["agreement"] >= 0.97
    assert found["relative_error"] < 2e-2
