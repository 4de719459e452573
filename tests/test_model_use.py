"""What people do with a model: copy it, move it, train it, watch and change its parts."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
from golden_support import recipe_image, recipe_model
from tiny_support import tiny_variants
from torch import Tensor, nn
from torch.nn.utils import prune

from mobileformer import Model

FUSED = pytest.mark.parametrize("use_fused", [False, True], ids=["plain", "fused"])


@pytest.fixture(scope="module", autouse=True)
def variants() -> Iterator[None]:
    """Most networks are small ones."""
    with tiny_variants():
        yield


def predict(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def small_image(batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return recipe_image(batch, 64, 64, seed=4, dtype=dtype)


# Copies


@FUSED
@pytest.mark.parametrize("make", [lambda m: m, Model.to_inference], ids=["model", "inference"])
def test_deepcopy_is_independent(use_fused: bool, make: Callable) -> None:
    model = make(recipe_model("tiny", dtype=torch.float32, use_fused=use_fused))
    twin = copy.deepcopy(model)
    x = small_image()
    expected = predict(model, x)
    assert torch.equal(predict(twin, x), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.1)
    assert torch.equal(predict(model, x), expected)


@FUSED
@pytest.mark.parametrize("make", [lambda m: m, Model.to_inference], ids=["model", "inference"])
def test_pickle_and_torch_save(use_fused: bool, make: Callable) -> None:
    model = make(recipe_model("tiny", dtype=torch.float32, use_fused=use_fused))
    expected = predict(model, small_image())
    assert torch.equal(predict(pickle.loads(pickle.dumps(model)), small_image()), expected)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(predict(torch.load(buffer, weights_only=False), small_image()), expected)


def test_one_state_dict_for_both_ways() -> None:
    plain, fused = Model("tiny_ungrouped", use_fused=False), Model("tiny_ungrouped", use_fused=True)
    assert list(plain.state_dict()) == list(fused.state_dict())
    fused.load_state_dict(plain.state_dict())
    x = small_image()
    torch.testing.assert_close(predict(fused.eval(), x), predict(plain.eval(), x), rtol=1e-4, atol=1e-6)


# Moving


@FUSED
def test_to_another_dtype_and_back(use_fused: bool) -> None:
    model = recipe_model("tiny", dtype=torch.float32, use_fused=use_fused)
    x = small_image()
    expected = predict(model, x)
    assert predict(model.double(), x.double()).dtype == torch.float64
    assert torch.equal(predict(model.float(), x), expected)
    assert predict(model.bfloat16(), x.bfloat16()).dtype == torch.bfloat16


@FUSED
def test_through_the_meta_device(use_fused: bool) -> None:
    source = recipe_model("tiny", dtype=torch.float32, use_fused=use_fused)
    with torch.device("meta"):
        model = Model("tiny", use_fused=use_fused)
    assert model(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 1000)
    model = model.to_empty(device="cpu").eval()
    model.load_state_dict(source.state_dict())
    assert torch.equal(predict(model, small_image()), predict(source, small_image()))


@FUSED
def test_channels_last_parameters(use_fused: bool) -> None:
    model = recipe_model("tiny", use_fused=use_fused)
    x = small_image(dtype=torch.float64)
    expected = predict(model, x)
    model = model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(predict(model, x), expected, rtol=0, atol=1e-10)


@FUSED
@pytest.mark.parametrize("variant", ["26m", "tiny_ungrouped"])
def test_autocast(variant: str, use_fused: bool) -> None:
    model = recipe_model(variant, dtype=torch.float32, use_fused=use_fused)
    x = small_image()
    expected = predict(model, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = predict(model, x)
        assert logits.dtype == torch.bfloat16
        assert (logits - expected).abs().max() < 0.25 * expected.std()
        assert predict(model, x.bfloat16()).dtype == torch.bfloat16
        model.train()
        loss = model(x).float().square().mean()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert torch.isfinite(parameter.grad).all(), name


@FUSED
def test_training_lowers_the_loss(use_fused: bool) -> None:
    torch.manual_seed(0)
    model = Model("26m", num_classes=4, use_fused=use_fused)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    x, labels = small_image(4), torch.arange(4)
    losses = []
    for _ in range(12):
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_synchronised_norms_fold_too() -> None:
    model = recipe_model("tiny")
    expected = predict(model, small_image(dtype=torch.float64))
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    torch.testing.assert_close(predict(model, small_image(dtype=torch.float64)), expected)
    folded = model.to_inference(torch.float64)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.modules())
    torch.testing.assert_close(predict(folded, small_image(dtype=torch.float64)), expected)


# Watching and changing parts: a fused block in evaluation calls few of its modules, unless somebody needs
# them called


def test_hooks_on_every_part_are_called() -> None:
    """And what they keep is what the part gave, not what a later operator wrote over it."""
    plain, fused = (recipe_model("tiny_ungrouped", use_fused=use_fused) for use_fused in (False, True))
    x = small_image(dtype=torch.float64)
    expected, kept = keep_outputs(plain, x, plain.blocks.named_modules())
    for name in kept:
        if name.endswith("drop_path"):  # passes its input on in evaluation, and is not asked to
            continue
        logits, seen = keep_outputs(fused, x, [(name, fused.blocks.get_submodule(name))])
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)
        torch.testing.assert_close(seen[name], kept[name], rtol=0, atol=1e-9, msg=name)


def keep_outputs(model: Model, x: Tensor, modules: Iterable[tuple[str, nn.Module]]) -> tuple[Tensor, dict[str, Tensor]]:
    """(logits, what every module gave, kept without a copy)."""
    kept: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(lambda m, args, out, name=name: kept.__setitem__(name, out))
        for name, module in modules
    ]
    logits = predict(model, x)
    for handle in handles:
        handle.remove()
    return logits, kept


class Adapter(nn.Module):
    """What low-rank fine-tuning puts around a layer: it has the layer's weight and does something else."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.weight, self.bias = base.weight, base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) * 1.5 + 0.25


@pytest.mark.parametrize(
    "path",
    [
        "blocks.2.former.query",
        "blocks.2.former.norm",
        "blocks.2.expand_relu.reduce",
        "blocks.2.former_to_mobile.value",
        "blocks.2.mobile_to_former.query",
        "blocks.2.expand.conv",
        "blocks.2.depthwise.conv",
        "blocks.1.squeeze.norm",
        "stem.conv",
        "head.expand.norm",
        "head.fc",
    ],
)
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_a_part_put_in_the_place_of_another_is_called(path: str, training: bool) -> None:
    logits = {}
    for use_fused in (False, True):
        model = recipe_model("tiny_ungrouped", use_fused=use_fused).train(training)
        x = small_image(4, torch.float64)
        before = predict(model, x)
        model.set_submodule(path, Adapter(model.get_submodule(path)))
        logits[use_fused] = predict(model, x)
        # In training, the norm behind a convolution takes the change out again.
        assert not torch.equal(logits[use_fused], before)
    torch.testing.assert_close(logits[True], logits[False], rtol=0, atol=1e-9)


def test_pruning_and_other_norms_reach_a_fused_model() -> None:
    """Pruning makes a weight anew in a hook before every call; a group norm has no statistics to fold."""
    logits = {}
    for use_fused in (False, True):
        model = recipe_model("52m", use_fused=use_fused)
        prune.l1_unstructured(model.blocks[3].former.query, "weight", amount=0.5)
        prune.l1_unstructured(model.blocks[3].depthwise.conv, "weight", amount=0.5)
        channels = model.blocks[2].down.norm.num_features
        model.blocks[2].down.norm = nn.GroupNorm(4, channels).double()
        model.blocks[1].project.norm = nn.BatchNorm2d(12, track_running_stats=False).double()
        logits[use_fused] = predict(model, small_image(dtype=torch.float64))
    torch.testing.assert_close(logits[True], logits[False], rtol=0, atol=1e-9)


def test_norms_alone_can_be_in_training() -> None:
    """A pass with only the norms in training refreshes their statistics; they must not be folded then."""
    models = []
    for use_fused in (False, True):
        model = recipe_model("tiny_ungrouped", use_fused=use_fused)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.train()
        predict(model, small_image(4, torch.float64))
        models.append(model)
    plain, fused = (model.state_dict() for model in models)
    for key, value in plain.items():
        torch.testing.assert_close(fused[key], value, rtol=0, atol=1e-9, msg=key)
        if key.endswith("num_batches_tracked") and not key.startswith("head.norm"):
            assert value == 1, key
