"""The names of parameters: ours beside the published ones, as one table that is read in both directions.

A row names a module; what hangs below it (weight, bias, running_mean, running_var, num_batches_tracked) has
the same name on both sides. Rows stand in the published order, which is also the order of our own state dict.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mobileformer.config import VariantConfig

__all__ = ["module_names", "to_official", "to_ours"]

_Rows = tuple[tuple[str, str], ...]

# Below `blocks.N.` in ours and below `features.N.` in the published names.
_BRIDGES_AND_FORMER: _Rows = (
    ("mobile_to_former.gate", "local_global.alpha.0"),
    ("mobile_to_former.query", "local_global.q"),
    ("mobile_to_former.project", "local_global.proj"),
    ("mobile_to_former.norm", "local_global.layer_norm"),
    ("former.ffn_expand", "global_block.ffn.0"),
    ("former.ffn_project", "global_block.ffn.2"),
    ("former.ffn_norm", "global_block.ffn_norm"),
    ("former.query", "global_block.q"),
    ("former.project", "global_block.channel_mlp"),
    ("former.norm", "global_block.layer_norm"),
    ("former_to_mobile.key", "global_local.k"),
    ("former_to_mobile.value", "global_local.proj"),
)
_BLOCKS: Mapping[str, _Rows] = {
    "lite": (
        ("expand.conv", "conv.0"),
        ("expand.norm", "conv.1"),
        ("project.conv", "conv.4"),
        ("project.norm", "conv.5"),
    ),
    "same": (
        ("expand.conv", "conv1.0"),
        ("expand.norm", "conv1.1"),
        ("expand_relu.reduce", "hyper1.hyper.0"),
        ("expand_relu.expand", "hyper1.hyper.2"),
        ("depthwise.conv", "conv2.0"),
        ("depthwise.norm", "conv2.1"),
        ("depthwise_relu.reduce", "hyper2.hyper.0"),
        ("depthwise_relu.expand", "hyper2.hyper.2"),
        ("project.conv", "conv3.0"),
        ("project.norm", "conv3.1"),
        *_BRIDGES_AND_FORMER,
    ),
    "down": (
        ("down.conv", "conv1.0"),
        ("down.norm", "conv1.1"),
        ("down_relu.reduce", "hyper1.hyper.0"),
        ("down_relu.expand", "hyper1.hyper.2"),
        ("squeeze.conv", "conv2.0"),
        ("squeeze.norm", "conv2.1"),
        ("expand.conv", "conv3.0"),
        ("expand.norm", "conv3.1"),
        ("expand_relu.reduce", "hyper3.hyper.0"),
        ("expand_relu.expand", "hyper3.hyper.2"),
        ("project.conv", "conv4.0"),
        ("project.norm", "conv4.1"),
        *_BRIDGES_AND_FORMER,
    ),
}
_BEFORE_BLOCKS: _Rows = (("stem.conv", "stem.0"), ("stem.norm", "stem.1"))
_AFTER_BLOCKS: _Rows = (
    *((ours, official) for ours, official in _BRIDGES_AND_FORMER if ours.startswith("mobile_to_former.")),
    ("head.expand.conv", "classifier.conv.1"),
    ("head.expand.norm", "classifier.conv.2"),
    ("head.fc", "classifier.fc.0"),
    ("head.norm", "classifier.fc.1"),
    ("head.classifier", "classifier.classifier.1"),
)
_TOKENS = ("tokens", "tokens.weight")  # the one parameter that is no module here and an embedding there


def module_names(config: VariantConfig) -> dict[str, str]:
    """Our module names -> the published ones, for all state but the token table, in the published order."""
    names = dict(_BEFORE_BLOCKS)
    for index, block in enumerate(config.blocks):
        for ours, official in _BLOCKS[block.kind]:
            names[f"blocks.{index}.{ours}"] = f"features.{index}.{official}"
    return names | dict(_AFTER_BLOCKS)


def to_official(keys: Iterable[str], config: VariantConfig) -> dict[str, str]:
    """Each of our keys -> its published one, in the order of `keys`; one that no row covers is left out."""
    return _translate(keys, module_names(config), {_TOKENS[0]: _TOKENS[1]})


def to_ours(keys: Iterable[str], config: VariantConfig) -> dict[str, str]:
    """Each published key -> ours, in the order of `keys`; one that no row covers is left out."""
    reverse = {official: ours for ours, official in module_names(config).items()}
    return _translate(keys, reverse, {_TOKENS[1]: _TOKENS[0]})


def _translate(keys: Iterable[str], modules: Mapping[str, str], whole: Mapping[str, str]) -> dict[str, str]:
    translated = {}
    for key in keys:
        module, _, leaf = key.rpartition(".")
        if key in whole:
            translated[key] = whole[key]
        elif module in modules:
            translated[key] = f"{modules[module]}.{leaf}"
    return translated
