"""What people do with a model: copy it, move it, train it, watch and change its parts."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from golden_support import recipe_image, recipe_model
from torch import Tensor, nn

from mobileformer import Model

FUSED = pytest.mark.parametrize("use_fused", [False, True], ids=["plain", "fused"])


def predict(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def small_image(batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return recipe_image(batch, 64, 64, seed=4, dtype=dtype)


# Copies


@FUSED
@pytest.mark.parametrize("make", [lambda m: m, Model.to_inference], ids=["model", "inference"])
def test_deepcopy_is_independent(use_fused: bool, make: Callable) -> None:
    model = make(recipe_model("26m", dtype=torch.float32, use_fused=use_fused))
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
    model = make(recipe_model("26m", dtype=torch.float32, use_fused=use_fused))
    expected = predict(model, small_image())
    assert torch.equal(predict(pickle.loads(pickle.dumps(model)), small_image()), expected)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(predict(torch.load(buffer, weights_only=False), small_image()), expected)


def test_one_state_dict_for_both_ways() -> None:
    plain, fused = Model("96m", use_fused=False), Model("96m", use_fused=True)
    assert list(plain.state_dict()) == list(fused.state_dict())
    fused.load_state_dict(plain.state_dict())
    x = small_image()
    torch.testing.assert_close(predict(fused.eval(), x), predict(plain.eval(), x), rtol=1e-4, atol=1e-6)


# Moving


@FUSED
def test_to_another_dtype_and_back(use_fused: bool) -> None:
    model = recipe_model("26m", dtype=torch.float32, use_fused=use_fused)
    x = small_image()
    expected = predict(model, x)
    assert predict(model.double(), x.double()).dtype == torch.float64
    assert torch.equal(predict(model.float(), x), expected)
    assert predict(model.bfloat16(), x.bfloat16()).dtype == torch.bfloat16


@FUSED
def test_through_the_meta_device(use_fused: bool) -> None:
    source = recipe_model("26m", dtype=torch.float32, use_fused=use_fused)
    with torch.device("meta"):
        model = Model("26m", use_fused=use_fused)
    assert model(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 1000)
    model = model.to_empty(device="cpu").eval()
    model.load_state_dict(source.state_dict())
    assert torch.equal(predict(model, small_image()), predict(source, small_image()))


@FUSED
def test_channels_last_parameters(use_fused: bool) -> None:
    model = recipe_model("26m", use_fused=use_fused)
    x = small_image(dtype=torch.float64)
    expected = predict(model, x)
    model = model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(predict(model, x), expected, rtol=0, atol=1e-10)


@FUSED
@pytest.mark.parametrize("variant", ["26m", "96m"])
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
    model = recipe_model("26m")
    expected = predict(model, small_image(dtype=torch.float64))
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    torch.testing.assert_close(predict(model, small_image(dtype=torch.float64)), expected)
    folded = model.to_inference(torch.float64)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.modules())
    torch.testing.assert_close(predict(folded, small_image(dtype=torch.float64)), expected)


# Watching and changing parts: a fused block in evaluation calls few of its modules, unless somebody needs
# them called


def test_hooks_on_every_part_are_called() -> None:
    model = recipe_model("96m")
    x = small_image(dtype=torch.float64)
    expected = predict(model, x)
    inside_convolutions = (nn.Conv2d, nn.BatchNorm2d, nn.Identity, nn.Dropout)
    names = [
        name
        for name, module in model.blocks.named_modules()
        if not isinstance(module, inside_convolutions) and name and not name.endswith("drop_path")
    ]
    called = []
    for name in names:
        called.clear()
        handle = model.blocks.get_submodule(name).register_forward_hook(lambda m, a, out: called.append(out))
        torch.testing.assert_close(predict(model, x), expected, rtol=0, atol=1e-9)
        handle.remove()
        assert called, name


@FUSED
def test_a_layer_of_another_class_is_called(use_fused: bool) -> None:
    """An adapter around a linear layer, as low-rank fine-tuning puts in, must not be passed over."""

    class Adapter(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base = base
            self.weight, self.bias = base.weight, base.bias

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + 1

    model = recipe_model("26m", use_fused=use_fused)
    before = predict(model, small_image(dtype=torch.float64))
    model.blocks[3].former.query = Adapter(model.blocks[3].former.query)
    after = predict(model, small_image(dtype=torch.float64))
    assert (after - before).abs().max() > 1e-3
    plain = recipe_model("26m", use_fused=False)
    plain.blocks[3].former.query = Adapter(plain.blocks[3].former.query)
    torch.testing.assert_close(after, predict(plain, small_image(dtype=torch.float64)), rtol=0, atol=1e-9)


def test_norms_alone_can_be_in_training() -> None:
    """A pass with only the norms in training refreshes their statistics; they must not be folded then."""
    models = []
    for use_fused in (False, True):
        model = recipe_model("96m", use_fused=use_fused)
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
