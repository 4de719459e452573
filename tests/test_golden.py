"""The model against the published one: float64, every quantity of every golden file, fused and plain.

What fails here names the first quantity that is off, in the order of execution, so the fault lies just before
it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden import recipe
from golden_support import capture, golden_file, recipe_image, recipe_model, state_sha256, summarise
from torch import Tensor

from mobileformer import Model
from mobileformer.weights.keys import to_official

TOLERANCE = 1e-9
TRAIN_LABELS = [1, 10, 100, 999]

# First four logits of image 0, sum of all, first two of image 1 at 192 x 256, training loss, sha256 of the
# state. fmt: off
SPOT_VALUES = {
    "26m": (
        (1.02763038, -0.08504448, 1.13806558, -0.32212890),
        -16.920016,
        (1.90350497, 0.00352170),
        7.02369715,
        "035ddebb6ca6",
    ),
    "52m": (
        (0.12545999, 1.82156012, 1.19107751, -0.14879551),
        100.885196,
        (0.17761438, 1.88240440),
        6.50534428,
        "8bbb2280fba9",
    ),
    "96m": (
        (0.75697589, -2.43247046, 0.11565583, -1.07848869),
        -88.294374,
        (0.35235494, -2.76865436),
        7.17090916,
        "3fe9ecf92f70",
    ),
    "151m": (
        (-0.58694192, -0.46740692, 3.46305768, -0.23603994),
        147.870053,
        (-0.55921150, 0.69313611),
        7.32997031,
        "91c94c1ba5ca",
    ),
    "214m": (
        (1.02711118, -0.80177024, -2.04099253, -0.76484061),
        -98.408715,
        (0.81011031, -0.95699823),
        7.33133217,
        "196e00eb8a35",
    ),
    "294m": (
        (-0.49709852, 0.85937317, 0.29237363, -1.16149886),
        214.475164,
        (1.36410931, 1.15971665),
        6.87362454,
        "ebd4b0ec3613",
    ),
    "508m": (
        (1.79074013, 0.20910434, 3.39424555, -3.63051933),
        18.259247,
        (1.31190378, 0.20645336),
        7.03967617,
        "1080bdd0da01",
    ),
}
# fmt: on


@dataclass
class Run:
    """One model, fused or not, and what it gave on the golden inputs."""

    file: str
    model: Model
    logits: Tensor
    found: dict[str, Tensor]
    gradients: dict[str, Tensor]
    d_image: Tensor

    @property
    def golden(self) -> dict[str, np.ndarray]:
        return golden_file(self.file)


def official_gradients(model: Model) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    return {official: parameters[ours].grad for ours, official in to_official(parameters, model.config).items()}


def run_file(file: str, use_fused: bool) -> Run:
    variant, _, mode = file.partition("_")
    model = recipe_model(variant, use_fused=use_fused, spatial_dynamic_relu=mode == "spatial")
    image = recipe_image(2, 224, 224, seed=1)
    with torch.no_grad():
        found = capture(model, image)
    image.requires_grad_()
    logits = model(image)
    logits.sum().backward()
    return Run(file, model, logits.detach(), found, official_gradients(model), image.grad)


FILES = [(file, fused) for file in ("26m", "96m", "294m", "26m_spatial", "294m_spatial") for fused in (False, True)]


@pytest.fixture(scope="module", params=FILES, ids=lambda p: f"{p[0]}-{'fused' if p[1] else 'plain'}")
def run(request: pytest.FixtureRequest) -> Run:
    return run_file(*request.param)


def test_recipe_makes_the_documented_values() -> None:
    weight = recipe.tensor("stem.0.weight", (8, 3, 3, 3)).ravel()[:3]
    np.testing.assert_allclose(weight, [-0.00433626, -0.13488826, -0.136221], rtol=1e-6)
    pixels = recipe.image(2, 224, 224, 1)[0, 0, 0, :3]
    np.testing.assert_allclose(pixels, [1.5820913, 1.4756644, 1.8329964], rtol=1e-6)
    np.testing.assert_allclose(
        recipe.probe("stem.0.weight", (8, 3, 3, 3)).ravel()[:2], [-0.09771496, 0.53180556], rtol=1e-6
    )
    assert recipe.sample_idx("stem/feat", 2 * 8 * 112 * 112)[:4].tolist() == [1587, 3099, 3153, 3278]


def test_state_is_the_golden_one(run: Run) -> None:
    assert state_sha256(run.model) == json.loads(str(run.golden["meta_json"]))["sha256_float32_state"]
    if "state_keys" in run.golden:
        state = run.model.state_dict()
        official = {o: state[k] for k, o in to_official(state, run.model.config).items()}
        kept = {key: value for key, value in official.items() if not key.endswith("num_batches_tracked")}
        assert list(kept) == run.golden["state_keys"].tolist()
        sums = np.array([[v.sum().item(), v.abs().sum().item()] for v in kept.values()])
        np.testing.assert_allclose(sums[:, 0], run.golden["state_sum"], atol=TOLERANCE)
        np.testing.assert_allclose(sums[:, 1], run.golden["state_abs_sum"], atol=TOLERANCE)


def test_logits(run: Run) -> None:
    assert error(run.logits, run.golden["logits_224"]) < TOLERANCE
    with torch.no_grad():
        logits = run.model(recipe_image(2, 192, 256, seed=2))
    assert error(logits, run.golden["logits_192x256"]) < TOLERANCE


def test_every_intermediate_quantity(run: Run) -> None:
    compared = set()
    for name, value in run.found.items():
        exact = {name: value.detach().numpy()} if name in run.golden else summarise(name, value)
        for key, array in exact.items():
            if key in run.golden:
                assert array.shape == run.golden[key].shape, key
                assert np.abs(array - run.golden[key]).max() < TOLERANCE, key
                compared.add(key)
    elsewhere = ("state_", "grad_eval/", "param_keys", "logits_", "train/", "meta_json")
    assert compared == {key for key in run.golden if not key.startswith(elsewhere)}


def test_what_crosses_the_border_of_a_block(run: Run) -> None:
    """Without a hook inside, so that a fused block takes its inference form."""
    with torch.no_grad():
        image = recipe_image(2, 224, 224, seed=1)
        tokens = run.model.tokens.repeat(2, 1, 1)
        x = run.model.stem(image)
        for index, block in enumerate(run.model.blocks):
            x, tokens = block(x, tokens)
            assert error(tokens.transpose(0, 1), run.golden[f"block{index}/tokens"]) < TOLERANCE, index
            for key, array in summarise(f"block{index}/feat", x).items():
                assert np.abs(array - run.golden[key]).max() < TOLERANCE, key


def test_gradients_in_evaluation_mode(run: Run) -> None:
    check_gradients(run.gradients, run.golden, "grad_eval")
    if "grad_eval/input_norm" in run.golden:
        assert abs(run.d_image.norm().item() - run.golden["grad_eval/input_norm"]) < TOLERANCE
        for key, array in summarise("grad_eval/input", run.d_image).items():
            assert np.abs(array - run.golden[key]).max() < TOLERANCE, key


@pytest.mark.parametrize("use_fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("variant", ["26m", "96m", "294m"])
def test_training_step(variant: str, use_fused: bool) -> None:
    golden = golden_file(variant)
    model = recipe_model(variant, use_fused=use_fused)
    logits, loss = train_step(model)
    assert error(logits, golden["train/logits"]) < TOLERANCE
    assert abs(loss.item() - golden["train/loss"]) < TOLERANCE
    check_gradients(official_gradients(model), golden, "train/grad")
    buffers = dict(model.named_buffers())
    official = {o: buffers[k] for k, o in to_official(buffers, model.config).items()}
    projections = [
        (official[key].numpy() * recipe.probe(key, official[key].shape)).sum() for key in golden["train/buffer_keys"]
    ]
    assert np.abs(np.array(projections) - golden["train/buffer_proj"]).max() < TOLERANCE
    assert all(int(v) == 1 for k, v in buffers.items() if k.endswith("num_batches_tracked"))


@pytest.mark.parametrize("use_fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("variant", list(SPOT_VALUES))
def test_spot_values_of_all_seven(variant: str, use_fused: bool) -> None:
    first, total, second, loss, sha256 = SPOT_VALUES[variant]
    model = recipe_model(variant, use_fused=use_fused)
    assert state_sha256(model).startswith(sha256)
    with torch.no_grad():
        logits = model(recipe_image(2, 224, 224, seed=1))
        rectangular = model(recipe_image(2, 192, 256, seed=2))
    # Eight decimals are published, six of the sum.
    assert error(logits[0, :4], np.array(first)) < 1e-8
    assert abs(logits.sum().item() - total) < 1e-6
    assert error(rectangular[1, :2], np.array(second)) < 1e-8
    assert abs(train_step(model)[1].item() - loss) < 1e-8


@pytest.mark.parametrize("use_fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("file", ["26m", "96m", "294m", "26m_spatial", "294m_spatial"])
def test_float32_logits(file: str, use_fused: bool) -> None:
    variant, _, mode = file.partition("_")
    model = recipe_model(variant, dtype=torch.float32, use_fused=use_fused, spatial_dynamic_relu=mode == "spatial")
    with torch.no_grad():
        square = model(recipe_image(2, 224, 224, seed=1, dtype=torch.float32))
        rectangular = model(recipe_image(2, 192, 256, seed=2, dtype=torch.float32))
    assert error(square, golden_file(file)["logits_224"]) < 2e-4
    assert error(rectangular, golden_file(file)["logits_192x256"]) < 2e-4


@pytest.mark.parametrize("file", ["26m", "96m", "294m", "26m_spatial", "294m_spatial"])
def test_inference_copy(file: str) -> None:
    """float64 as exact as the model, float32 as asked, bfloat16 within twice the error of eager bfloat16."""
    variant, _, mode = file.partition("_")
    golden = golden_file(file)["logits_224"]
    image = recipe_image(2, 224, 224, seed=1)
    model = recipe_model(variant, spatial_dynamic_relu=mode == "spatial")
    plain = recipe_model(variant, dtype=torch.bfloat16, use_fused=False, spatial_dynamic_relu=mode == "spatial")
    with torch.no_grad():
        assert error(model.to_inference(torch.float64)(image), golden) < TOLERANCE
        assert error(model.to_inference()(image.float()), golden) < 2e-4
        eager = typical_error(plain(image.bfloat16()), golden)
        assert typical_error(model.to_inference(torch.bfloat16)(image), golden) < 2 * eager


def train_step(model: Model) -> tuple[Tensor, Tensor]:
    model.train()
    logits = model(recipe_image(4, 128, 128, seed=3))
    loss = F.cross_entropy(logits, torch.tensor(TRAIN_LABELS))
    loss.backward()
    return logits.detach(), loss.detach()


def check_gradients(gradients: dict[str, Tensor], golden: dict[str, np.ndarray], prefix: str) -> None:
    """Rounding grows with the largest gradient, in the thousands; a bridge's key bias has exactly none."""
    norms, projections = golden[f"{prefix}/norm"], golden[f"{prefix}/proj"]
    tolerance = TOLERANCE + 1e-11 * norms.max()
    keys = golden["param_keys"].tolist()
    assert set(keys) == set(gradients)
    for key, norm, projection in zip(keys, norms, projections, strict=True):
        gradient = gradients[key]
        assert abs(gradient.norm().item() - norm) < tolerance, key
        direction = recipe.probe(key, tuple(gradient.shape))
        assert abs((gradient.numpy() * direction).sum() - projection) < tolerance, key


def typical_error(value: Tensor, golden: np.ndarray) -> float:
    """The root of the mean square: in bfloat16 the largest of 2000 errors is an accident."""
    return float(np.sqrt(np.square(value.double().numpy() - golden).mean()))


def error(value: Tensor, golden: np.ndarray) -> float:
    assert tuple(value.shape) == golden.shape
    return float(np.abs(value.detach().double().numpy() - golden).max())
