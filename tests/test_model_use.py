"""What people do with a model: copy it, move it, compile it, export it, call it from threads, fold it."""

from __future__ import annotations

import copy
import io
import pickle
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from golden_support import recipe_image, recipe_model
from torch import Tensor, nn

from mobileformer import Model
from mobileformer.inference import InferenceModel
from mobileformer.inference.threads import thread_count

FUSED = pytest.mark.parametrize("use_fused", [False, True], ids=["plain", "fused"])
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")


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


# Watching and changing parts: a fused block in evaluation calls few of its modules, unless somebody needs them called


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
    for name in names:
        called = []
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
    """Statistics are refreshed by a pass with only the norms in training mode; a fused model must not fold them then."""
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


# Compiling and exporting


@pytest.mark.parametrize(
    ("use_fused", "spatial"), [(False, False), (True, False), (True, True)], ids=["plain", "fused", "spatial"]
)
def test_compiles_into_one_graph(use_fused: bool, spatial: bool) -> None:
    torch.compiler.reset()
    model = recipe_model("26m", use_fused=use_fused, spatial_dynamic_relu=spatial)
    x = small_image(dtype=torch.float64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(predict(compiled, x), predict(model, x), rtol=0, atol=1e-9)


def test_compiled_training_step() -> None:
    torch.compiler.reset()
    model = recipe_model("26m").train()
    twin = copy.deepcopy(model)
    x = small_image(4, torch.float64)
    model(x).square().mean().backward()
    torch.compile(twin, fullgraph=True, backend="aot_eager")(x).square().mean().backward()
    expected = {key: p.grad for key, p in model.named_parameters()}
    scale = max(g.abs().max().item() for g in expected.values())
    for key, parameter in twin.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[key], rtol=1e-7, atol=1e-11 * scale, msg=key)


def test_compiles_with_any_batch_and_size() -> None:
    torch.compiler.reset()
    model = recipe_model("26m")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    predict(compiled, recipe_image(2, 64, 96, seed=1))
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch, height, width in ((3, 96, 64), (30, 64, 96)):  # tokens of 30 images are more rows than one kernel takes
            x = recipe_image(batch, height, width, seed=2)
            torch.testing.assert_close(predict(compiled, x), predict(model, x), rtol=0, atol=1e-9)


class FirstBlocks(nn.Module):
    """One block of each kind: what a compiler has to know, in a fraction of the network."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.tokens, self.stem, self.blocks = model.tokens, model.stem, model.blocks[:3]

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


@pytest.mark.parametrize("make", [lambda m: m, Model.to_inference], ids=["model", "inference"])
def test_export_with_a_dynamic_batch(make: Callable) -> None:
    model = make(recipe_model("26m", dtype=torch.float32))
    dynamic = {"x": {0: torch.export.Dim("batch", min=1, max=64)}}
    program = torch.export.export(model, (small_image(3),), dynamic_shapes=dynamic, strict=False)
    for batch in (1, 5, 40):
        x = small_image(batch)
        torch.testing.assert_close(program.module()(x), predict(model, x), rtol=1e-4, atol=1e-5)


# Threads


@FUSED
@pytest.mark.parametrize("make", [lambda m: m, lambda m: m.to_inference(threads=1)], ids=["model", "inference"])
def test_two_threads_call_one_model(use_fused: bool, make: Callable) -> None:
    model = make(recipe_model("26m", dtype=torch.float32, use_fused=use_fused))
    images = [recipe_image(1, 64, 64, seed=s, dtype=torch.float32) for s in range(8)]
    expected = [predict(model, x) for x in images]
    start = threading.Barrier(2)

    def work(_: int) -> list[Tensor]:
        start.wait()
        return [predict(model, x) for x in images]

    with ThreadPoolExecutor(2) as pool:
        for logits in pool.map(work, range(2)):
            for got, want in zip(logits, expected, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_the_thread_count_holds_for_the_call_and_is_put_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = Model("26m").eval().to_inference(threads=2)
        seen = []
        model.network.stem.register_forward_pre_hook(lambda m, args: seen.append(torch.get_num_threads()))
        predict(model, small_image())
        assert seen == [2]
        assert torch.get_num_threads() == 1
        with pytest.raises(ValueError, match="x: expected 3 channels"):
            model(torch.zeros(1, 1, 64, 64))
        assert torch.get_num_threads() == 1
        # Calls that overlap without one being inside the other: the last to leave restores what the first found.
        first, second = thread_count(2), thread_count(3)
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert torch.get_num_threads() == 3
        second.__exit__(None, None, None)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


# The copy for inference


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": torch.float16}, "dtype: expected one of torch.float32, torch.bfloat16, torch.float64, got"),
        ({"dtype": "float32"}, "dtype: expected one of"),
        ({"threads": 0}, "threads: expected an integer of at least 1, or None, got 0"),
        ({"threads": 1.5}, "threads: expected an integer"),
    ],
)
def test_inference_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Model("26m").to_inference(**arguments)


@FUSED
def test_the_copy_leaves_the_model_alone(use_fused: bool) -> None:
    model = recipe_model("26m", dtype=torch.float32, use_fused=use_fused, drop_rate=0.5).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    folded = model.to_inference()
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    first = predict(folded, small_image())
    with torch.no_grad():
        model.tokens.zero_()
    assert torch.equal(predict(folded, small_image()), first)
    torch.testing.assert_close(
        first, predict(recipe_model("26m", dtype=torch.float32), small_image()), rtol=1e-3, atol=1e-4
    )


def test_the_copy_is_for_inference_only() -> None:
    folded = Model("26m", drop_rate=0.5).to_inference()
    assert isinstance(folded, InferenceModel)
    assert not folded.training
    assert folded.eval() is folded
    assert not any(module.training for module in folded.modules())
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.modules())
    with pytest.raises(RuntimeError, match="cannot be trained"):
        folded.train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_copy_answers_in_the_dtype_of_its_input(dtype: torch.dtype) -> None:
    folded = recipe_model("26m", dtype=torch.float32).to_inference(dtype)
    assert folded.network.tokens.dtype == dtype
    for given in (torch.float32, torch.float64, torch.bfloat16):
        assert predict(folded, small_image(dtype=given)).dtype == given
    with pytest.raises(TypeError, match=r"x: expected a floating-point dtype, got torch\.uint8"):
        folded(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


def test_gradients_still_reach_the_input_of_the_copy() -> None:
    model = recipe_model("26m")
    gradients = []
    for network in (model, model.to_inference(torch.float64)):
        x = small_image(dtype=torch.float64).requires_grad_()
        network(x).sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-7, atol=1e-9)
