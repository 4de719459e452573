"""What the tests of the inference engine share: folded networks with the recipe's weights, and the truth by stages."""

from __future__ import annotations

import functools
import importlib.util

import numpy as np
import pytest
import torch
from golden_support import recipe_model
from torch import Tensor, nn

from mobileformer import Model
from mobileformer.config import BlockConfig
from mobileformer.inference import FoldedNetwork, fold, library
from mobileformer.layout import convolutions
from mobileformer.network.layers import DynamicReLU, hard_sigmoid

# Only where it was not built: one that does not load has to fail.
needs_engine = pytest.mark.skipif(
    importlib.util.find_spec("mobileformer._engine") is None, reason="mobileformer._engine was not built"
)


def isas() -> list[str]:
    """The instruction sets to test, worst first; one that is no set where there is no engine, so that a test skips."""
    return library.status()["runnable"] or ["none"]


@functools.cache
def exact_model(variant: str, spatial: bool = False) -> Model:
    """In float64, part by part."""
    return recipe_model(variant, use_fused=False, spatial_dynamic_relu=spatial)


@functools.cache
def folded(variant: str, spatial: bool = False) -> FoldedNetwork:
    return fold(exact_model(variant, spatial))


def exact_logits(variant: str, x: np.ndarray, spatial: bool = False) -> np.ndarray:
    with torch.inference_mode():
        return exact_model(variant, spatial)(torch.from_numpy(x).double()).numpy()


def image(batch: int, height: int, width: int, seed: int = 0, channels: int = 3) -> np.ndarray:
    """Coarse structure and noise, of any size: (B,C,H,W) float32."""
    random = np.random.default_rng(seed)
    coarse = random.standard_normal((batch, channels, -(-height // 16), -(-width // 16)))
    fine = np.kron(coarse, np.ones((16, 16)))[:, :, :height, :width]
    return (fine + 0.5 * random.standard_normal((batch, channels, height, width))).astype(np.float32)


def largest(actual: np.ndarray, exact: np.ndarray) -> float:
    """The largest difference; NaN counts as infinite."""
    assert actual.shape == exact.shape
    difference = np.abs(actual.astype(np.float64) - exact).max(initial=0.0)
    return float(difference) if np.isfinite(difference) else float("inf")


def typical(actual: np.ndarray, exact: np.ndarray) -> float:
    """The root of the mean square difference."""
    assert actual.shape == exact.shape
    return float(np.sqrt(np.square(actual.astype(np.float64) - exact).mean()))


def stages_of(model: Model, x: Tensor) -> dict[str, np.ndarray]:
    """The stages of `Engine.stages`, by hooks on a model that runs part by part."""
    found: dict[str, Tensor] = {}
    handles = []

    def keep(part: nn.Module, name: str, pick=lambda output: output) -> None:
        handles.append(part.register_forward_hook(lambda m, args, out: found.__setitem__(name, pick(out))))

    def keep_input(part: nn.Module, name: str) -> None:
        handles.append(part.register_forward_pre_hook(lambda m, args: found.__setitem__(name, args[0])))

    def keep_coefficients(part: DynamicReLU, name: str) -> None:
        def hook(m: DynamicReLU, args: tuple) -> None:
            tokens = args[1] if len(args) > 2 and args[2] is not None else args[1][:, 0]
            found[name] = hard_sigmoid(m.logits(tokens))

        handles.append(part.register_forward_pre_hook(hook))

    def keep_block(block: nn.Module, config: BlockConfig, name: str) -> None:
        for conv in (row.name for row in convolutions(config, 1, 1)):  # names alone, whatever the channels
            relu = getattr(block, f"{conv}_relu", None)
            keep(getattr(block, conv) if relu is None else relu, f"{name}.{conv}")
            if relu is not None:
                keep_coefficients(relu, f"{name}.{conv}_relu")
        if config.kind != "lite":
            keep(block.mobile_to_former, f"{name}.mobile_to_former")
            keep(block, f"{name}.tokens", lambda out: out[1])
            keep_input(block.former_to_mobile, f"{name}.project")  # with the skip
        keep(block, name, lambda out: out[0])

    keep(model.stem, "stem")
    for index, (block, config) in enumerate(zip(model.blocks, model.config.blocks, strict=True)):
        keep_block(block, config, f"blocks.{index}")
    keep(model.mobile_to_former, "tokens")
    handles.append(model.head.fc.register_forward_pre_hook(lambda m, args: found.__setitem__("joint", args[0])))
    keep_input(model.head.dropout, "hidden")
    keep(model.head, "logits")
    try:
        with torch.inference_mode():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    found["pooled"] = found.pop("joint")[:, : model.config.head_channels]
    return {name: value.double().numpy() for name, value in found.items()}
