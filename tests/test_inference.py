"""The copy for inference, and calls from several threads."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from golden_support import recipe_image, recipe_model
from torch import Tensor, nn

import mobileformer
import mobileformer.inference
from mobileformer import Model
from mobileformer.inference import InferenceModel
from mobileformer.inference.threads import thread_count

FUSED = pytest.mark.parametrize("use_fused", [False, True], ids=["plain", "fused"])


def predict(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def small_image(batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return recipe_image(batch, 64, 64, seed=4, dtype=dtype)


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
        # Calls that overlap without one being inside the other: the last to leave restores what the first
        # found.
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
        (
            {"dtype": torch.float16},
            "dtype: expected one of torch.float32, torch.bfloat16, torch.float64, got",
        ),
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


def test_importing_the_package_needs_no_torch() -> None:
    code = (
        "import sys, mobileformer, mobileformer.inference, mobileformer.config;"
        "assert 'torch' not in sys.modules and 'mf_kernels' not in sys.modules;"
        "assert mobileformer.VARIANTS['294m'].num_tokens == 6"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(mobileformer.__file__).parents[1])
    with pytest.raises(AttributeError, match="has no attribute 'Motor'"):
        mobileformer.inference.Motor  # noqa: B018
