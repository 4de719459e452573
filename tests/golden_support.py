"""What tests share about the golden files: models with the recipe's weights, quantities under golden names.

The files hold sampled values, statistics and full vectors of the published implementation in float64, for
weights and images that `golden/recipe.py` makes from nothing but names and seeds.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from golden import recipe
from torch import Tensor, nn

from mobileformer import Model
from mobileformer.layout import convolutions
from mobileformer.network.layers import DynamicReLU
from mobileformer.weights.keys import to_official

# Small models in a shared machine: waiting for a second thread costs more than it gives.
torch.set_num_threads(1)

GOLDEN = Path(__file__).parent / "golden"


@functools.cache
def golden_file(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"golden_{name}.npz") as file:
        return {key: file[key] for key in file.files}


def published_keys(variant: str) -> list[tuple[str, tuple[int, ...], str]]:
    """(key, shape, "param" or "buffer") of the published state dict, in its order."""
    rows = []
    for line in (GOLDEN / "keys" / f"{variant}.txt").read_text().splitlines():
        if not line.startswith("#"):
            key, shape, kind = line.split("\t")
            rows.append((key, () if shape == "scalar" else tuple(map(int, shape.split("x"))), kind))
    return rows


def recipe_model(variant: str, *, dtype: torch.dtype = torch.float64, **kwargs) -> Model:
    """A model with the recipe's weights, in evaluation mode."""
    model = Model(variant, **kwargs)
    state = model.state_dict()
    for key, values in _recipe_state(variant, tuple(state["stem.conv.weight"].shape), model.num_classes).items():
        state[key].copy_(values)
    return model.to(dtype).eval()


@functools.lru_cache(maxsize=8)
def _recipe_state(variant: str, stem: tuple[int, ...], num_classes: int) -> dict[str, Tensor]:
    """The recipe's values in float32 for a model of so many classes, whose first convolution has this shape."""
    with torch.device("meta"):
        model = Model(variant, num_classes=num_classes, in_chans=stem[1], use_fused=False)
    state = model.state_dict()
    found = {}
    for ours, official in to_official(state, model.config).items():
        values = recipe.tensor(official, tuple(state[ours].shape))
        if values is not None:
            found[ours] = torch.from_numpy(values).float()
    return found


def recipe_image(batch: int, height: int, width: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.from_numpy(recipe.image(batch, height, width, seed)).to(dtype)


def state_sha256(model: Model) -> str:
    digest = hashlib.sha256()
    for key, value in model.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            digest.update(value.float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def capture(model: Model, x: Tensor) -> dict[str, Tensor]:
    """Every quantity of one forward pass under its golden name."""
    found: dict[str, Tensor] = {}
    handles = []

    def keep(module: nn.Module, name: str, pick: Callable = lambda output: output) -> None:
        handles.append(module.register_forward_hook(lambda m, args, out: found.__setitem__(name, pick(out))))

    def keep_theta(module: DynamicReLU, name: str) -> None:
        def hook(m: DynamicReLU, args: tuple) -> None:
            found[name] = m.theta(*args[1:])

        handles.append(module.register_forward_pre_hook(hook))

    keep(model.stem, "stem/feat")
    channels = model.config.stem_channels
    for index, (block, config) in enumerate(zip(model.blocks, model.config.blocks, strict=True)):
        rows, channels = convolutions(config, channels, model.config.groups), config.out_channels
        keep(block, f"block{index}/feat", lambda out: out[0])
        keep(block, f"block{index}/tokens", lambda out: out[1].transpose(0, 1))
        if config.kind != "lite":
            for number, row in enumerate(rows, start=1):  # the golden files have numbers where we have names
                keep(getattr(block, row.name), f"block{index}/conv{number}")
                if row.dynamic_relu:
                    keep_theta(getattr(block, f"{row.name}_relu"), f"block{index}/theta_hyper{number}")
            keep(block.mobile_to_former, f"block{index}/l2g_tokens", lambda out: out.transpose(0, 1))
    keep(model.mobile_to_former, "final_tokens", lambda out: out.transpose(0, 1))
    try:
        features, tokens = model.forward_features(x)
        found["pooled"] = model.head.pool(features)[:, :, None, None]
        found["penult"] = model.forward_head(features, tokens, pre_logits=True)
        return found
    finally:
        for handle in handles:
            handle.remove()


def summarise(name: str, value: Tensor) -> dict[str, np.ndarray]:
    """How the golden files keep a map: shape, mean, standard deviation, largest magnitude, 64 samples."""
    array = value.detach().contiguous().numpy()
    flat = array.reshape(-1)
    return {
        f"{name}/shape": np.array(array.shape),
        f"{name}/stats": np.array([flat.mean(), flat.std(), np.abs(flat).max()]),
        f"{name}/sample": flat[recipe.sample_idx(name, flat.size)],
    }
