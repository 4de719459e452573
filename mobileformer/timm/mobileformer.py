"""The entries in timm's registry: `timm.list_models(module="mobileformer")`."""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg

from mobileformer.config import IMAGENET_MEAN, IMAGENET_STD, MIN_SIZE, VARIANTS
from mobileformer.timm.network import MobileFormer, checkpoint_filter_fn

__all__ = ["default_cfgs"]

# Ours, and what the published code calls them.
NAMES = {f"{family}_{variant}": variant for family in ("mobileformer", "mobile_former") for variant in VARIANTS}


def _cfg() -> dict[str, Any]:
    """How images reach the network: as the published code evaluates, at 224 of 256 pixels."""
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "min_input_size": (3, MIN_SIZE, MIN_SIZE),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
        "first_conv": "stem.conv",
        "classifier": "head.classifier",
        "origin_url": "https://github.com/AAboys/MobileFormer",
        "paper_ids": "arXiv:2108.05895",
        "paper_name": "Mobile-Former: Bridging MobileNet and Transformer",
    }


default_cfgs = generate_default_cfgs({f"{name}.untrained": _cfg() for name in NAMES})


def _create(name: str, pretrained: bool = False, **kwargs: Any) -> MobileFormer:
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
    """Before anything is built: the published weights have no licence, so none can be fetched by name."""
    found = resolve_pretrained_cfg(name, pretrained_cfg=cfg, pretrained_cfg_overlay=overlay)
    if not (found.has_weights or found.state_dict):
        raise RuntimeError(
            f"{name}: pretrained=True, and no pretrained weights come with this package; give those you have as "
            "checkpoint_path=FILE, or as pretrained_cfg_overlay={'file': FILE} to have input and classes adapted"
        )


def _register(name: str) -> None:
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> MobileFormer:
        return _create(name, pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = f"Mobile-Former {NAMES[name]}, arXiv 2108.05895."
    globals()[name] = register_model(entrypoint)


for _name in NAMES:
    _register(_name)
