"""The entries in timm's registry: `timm.list_models(module="mobileformer")`."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from timm.layers.config import is_exportable, is_scriptable
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg

from mobileformer.config import IMAGENET_MEAN, IMAGENET_STD, MIN_SIZE, VARIANTS
from mobileformer.data import CROP_FRACTION
from mobileformer.pretrained import shipped_weights
from mobileformer.timm.model import MobileFormer, checkpoint_filter_fn
from mobileformer.weights.load import read_metadata

__all__ = ["default_cfgs"]

# Ours, and what the published code calls them.
NAMES = {f"{family}_{variant}": variant for family in ("mobileformer", "mobile_former") for variant in VARIANTS}


def _cfg(**kwargs: Any) -> dict[str, Any]:
    """How images reach the network: unless told otherwise as the published code evaluates, at 224 of 256 pixels."""
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "min_input_size": (3, MIN_SIZE, MIN_SIZE),
        "pool_size": (7, 7),
        "crop_pct": CROP_FRACTION,
        "interpolation": "bilinear",
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "first_conv": "stem.conv",
        "classifier": "head.classifier",
        "origin_url": "https://github.com/AAboys/MobileFormer",
        "paper_ids": "arXiv:2108.05895",
        "paper_name": "Mobile-Former: Bridging MobileNet and Transformer",
        **kwargs,
    }


def _shipped() -> tuple[str, dict[str, Any]]:
    """(variant, configuration) of the weights in the package, as their file describes itself."""
    path = shipped_weights()
    told = read_metadata(path)
    size = told.input_size or 224
    return told.variant, _cfg(
        file=str(path),
        num_classes=told.num_classes,
        label_names=told.labels,
        input_size=(told.in_chans, size, size),
        min_input_size=(told.in_chans, MIN_SIZE, MIN_SIZE),
        pool_size=(math.ceil(size / 32),) * 2,
        crop_pct=told.crop_fraction or CROP_FRACTION,
        mean=told.mean,
        std=told.std,
        origin_url=None,
    )


def _all_cfgs() -> dict[str, Any]:
    """By "name.tag". timm's default is what is marked by a star, and it stands last or weights take its place."""
    variant, shipped = _shipped()
    trained: dict[str, Any] = {f"{name}.fashion_mnist": shipped for name in NAMES if NAMES[name] == variant}
    return trained | {f"{name}.untrained*": _cfg() for name in NAMES}


default_cfgs = generate_default_cfgs(_all_cfgs())


def _create(name: str, pretrained: bool = False, **kwargs: Any) -> MobileFormer:
    if is_exportable() or is_scriptable():  # asked of `timm.create_model`: plain PyTorch, which any exporter knows
        kwargs.setdefault("use_fused", False)
    if pretrained:
        _check_source(name, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
    return build_model_with_cfg(
        partial(MobileFormer, NAMES[name]),
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **kwargs,
    )


def _check_source(name: str, cfg: Any, overlay: dict[str, Any] | None) -> None:
    """Before anything is built: the published weights have no licence, so they cannot be had by name."""
    found = resolve_pretrained_cfg(name, pretrained_cfg=cfg, pretrained_cfg_overlay=overlay)
    if not (found.has_weights or found.state_dict):
        raise RuntimeError(
            f"{name}: pretrained=True, and no weights trained on ImageNet come with this package; give those you have "
            "as checkpoint_path=FILE, or as pretrained_cfg_overlay={'file': FILE} to have input and classes adapted"
        )


def _register(name: str) -> None:
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> MobileFormer:
        return _create(name, pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = f"Mobile-Former {NAMES[name]}, arXiv 2108.05895."
    globals()[name] = register_model(entrypoint)


for _name in NAMES:
    _register(_name)
