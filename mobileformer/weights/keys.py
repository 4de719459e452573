"""The names of parameters: ours beside the published ones, as one table that is read in both directions.

A name is a module's; what hangs below it (weight, bias, running_mean, running_var, num_batches_tracked) is called the
same on both sides. Which modules there are, and their order, the published one, `mobileformer.layout` says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mobileformer.config import BlockKind, VariantConfig
from mobileformer.layout import TOKENS, layers

__all__ = ["module_names", "to_official", "to_ours"]

_Names = Mapping[str, Mapping[str, str]]  # part -> layer of it -> published name


def _convolution(published: str, first: int = 0) -> dict[str, str]:
    return {"conv": f"{published}.{first}", "norm": f"{published}.{first + 1}"}


def _dynamic_relu(published: str) -> dict[str, str]:
    return {"reduce": f"{published}.hyper.0", "expand": f"{published}.hyper.2"}


_BRIDGE_IN = {
    "gate": "local_global.alpha.0",
    "query": "local_global.q",
    "project": "local_global.proj",
    "norm": "local_global.layer_norm",
}
_TOKEN_SIDE: _Names = {
    "mobile_to_former": _BRIDGE_IN,
    "former": {
        "ffn_expand": "global_block.ffn.0",
        "ffn_project": "global_block.ffn.2",
        "ffn_norm": "global_block.ffn_norm",
        "query": "global_block.q",
        "project": "global_block.channel_mlp",
        "norm": "global_block.layer_norm",
    },
    "former_to_mobile": {"key": "global_local.k", "value": "global_local.proj"},
}
# Below `blocks.N.` in ours and below `features.N.` in the published names.
_BLOCKS: Mapping[BlockKind, _Names] = {
    "lite": {"expand": _convolution("conv"), "project": _convolution("conv", 4)},
    "same": {
        "expand": _convolution("conv1"),
        "expand_relu": _dynamic_relu("hyper1"),
        "depthwise": _convolution("conv2"),
        "depthwise_relu": _dynamic_relu("hyper2"),
        "project": _convolution("conv3"),
        **_TOKEN_SIDE,
    },
    "down": {
        "down": _convolution("conv1"),
        "down_relu": _dynamic_relu("hyper1"),
        "squeeze": _convolution("conv2"),
        "expand": _convolution("conv3"),
        "expand_relu": _dynamic_relu("hyper3"),
        "project": _convolution("conv4"),
        **_TOKEN_SIDE,
    },
}
_AROUND_BLOCKS: _Names = {
    "stem": _convolution("stem"),
    "mobile_to_former": _BRIDGE_IN,
    "head.expand": _convolution("classifier.conv", 1),
    "head": {"fc": "classifier.fc.0", "norm": "classifier.fc.1", "classifier": "classifier.classifier.1"},
}
_PUBLISHED_TOKENS = "tokens.weight"  # a parameter of the model here and an embedding there


def module_names(config: VariantConfig) -> dict[str, str]:
    """Our module names -> the published ones, for all state but the token table, in the published order."""
    table = layers(config, num_classes=1, in_chans=1)
    return {layer.name: _published(layer.name, config) for layer in table}


def _published(name: str, config: VariantConfig) -> str:
    part, _, layer = name.rpartition(".")
    if not name.startswith("blocks."):
        return _AROUND_BLOCKS[part][layer]
    _, index, part = part.split(".")
    return f"features.{index}.{_BLOCKS[config.blocks[int(index)].kind][part][layer]}"


def to_official(keys: Iterable[str], config: VariantConfig) -> dict[str, str]:
    """Each of our keys -> its published one, in the order of `keys`; one that no row covers is left out."""
    return _translate(keys, module_names(config), {TOKENS: _PUBLISHED_TOKENS})


def to_ours(keys: Iterable[str], config: VariantConfig) -> dict[str, str]:
    """Each published key -> ours, in the order of `keys`; one that no row covers is left out."""
    reverse = {official: ours for ours, official in module_names(config).items()}
    return _translate(keys, reverse, {_PUBLISHED_TOKENS: TOKENS})


def _translate(keys: Iterable[str], modules: Mapping[str, str], whole: Mapping[str, str]) -> dict[str, str]:
    translated = {}
    for key in keys:
        module, _, leaf = key.rpartition(".")
        if key in whole:
            translated[key] = whole[key]
        elif module in modules:
            translated[key] = f"{modules[module]}.{leaf}"
    return translated
