"""A network folded for inference: plain arrays by name, and what they are. No torch here.

Names are those of the state dict, without the norms that went into a convolution or a linear layer: `stem.conv.weight`
and the four arrays of `stem.norm` are `stem.weight` and `stem.bias`, `head.norm` is in `head.fc`. The scales of the
attentions are in their queries and keys:

    *mobile_to_former.query    times (C/2)^-0.5, C channels of the map that it reads
    blocks.N.former.query      times (D/4)^-0.5, D width of the tokens
    *former_to_mobile.key      times (C/2)^-0.5, C channels of the map that it writes

Channels stand in the order of the model. Nothing here depends on a processor: what an instruction set wants packed in
another order is packed when an engine opens the network.

Arrays are float32. A weight of two or more dimensions may be held as integers instead, int8 or int16, with a float32
array `<name>.scale` of one number for each of its output channels n beside it:

    weight[n, ...] = scale[n] * integers[n, ...]     scale > 0; integers from -127 to 127, or from -32767 to 32767

The range is symmetric, so that a kernel may move signs between the factors of a product.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mobileformer.config import VariantConfig, get_variant
from mobileformer.files.metadata import Metadata, WeightsError, decode, encode
from mobileformer.files.replacing import replacing
from mobileformer.files.safetensors import read_safetensors
from mobileformer.layout import TOKENS, layers

__all__ = ["FORMAT", "FoldedNetwork", "array_shapes"]

FORMAT = "mobileformer-folded"
FORMAT_VERSION = 2  # 1 has float32 arrays alone; a file says the lowest one that reads it
_LARGEST_INTEGER = {np.dtype(np.int8): 127, np.dtype(np.int16): 32767}


@dataclass(frozen=True, eq=False)
class FoldedNetwork:
    """What `fold` makes of a model and `Engine` runs.

    ========  ==========================================================================================
    field     meaning
    ========  ==========================================================================================
    metadata  variant, classes, channels, labels, mean and std, size and crop of the input
    arrays    name -> array; exactly the names and shapes that `array_shapes(metadata)` lists, float32, or
              int8 or int16 for a weight of two or more dimensions with `<name>.scale` (channels,) beside it
    ========  ==========================================================================================

    Raises ValueError that names every array that is missing, unexpected, of another shape or dtype, not finite or out
    of range.
    """

    metadata: Metadata
    arrays: Mapping[str, np.ndarray]

    def __post_init__(self) -> None:
        problems = _problems(self.arrays, array_shapes(self.metadata))
        if problems:
            told = f"{self.metadata.variant}, {self.metadata.num_classes} classes, {self.metadata.in_chans} channels"
            raise ValueError(f"arrays: not a folded network ({told})\n  " + "\n  ".join(problems))

    @property
    def config(self) -> VariantConfig:
        """The variant's configuration."""
        return get_variant(self.metadata.variant)

    @property
    def integers(self) -> tuple[str, ...]:
        """Names of the weights that are held as integers."""
        return tuple(name for name, array in self.arrays.items() if array.dtype in _LARGEST_INTEGER)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file that describes itself. It appears whole or not at all."""
        from safetensors.numpy import save_file

        header = encode(self.metadata, form=FORMAT, version=FORMAT_VERSION if self.integers else 1)
        with replacing(path) as temporary:
            save_file({name: np.ascontiguousarray(array) for name, array in self.arrays.items()}, temporary, header)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FoldedNetwork:
        """Read what `save` wrote. numpy is all it takes, and nothing in the file is run.

        Raises OSError, and WeightsError (a ValueError) for a file that is damaged, cut off, of another kind or of a
        later version, that lacks an array or holds one with another shape, NaN or infinity.
        """
        arrays, header = read_safetensors(path, form=FORMAT)
        metadata = decode(header, str(path), form=FORMAT, version=FORMAT_VERSION)
        assert metadata is not None  # the reader has seen to the format
        try:
            return cls(metadata, arrays)
        except ValueError as error:
            raise WeightsError(f"{path}: {str(error).removeprefix('arrays: ')}") from None


def array_shapes(metadata: Metadata) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every array, in the order of the model's state dict."""
    config = get_variant(metadata.variant)
    shapes: dict[str, tuple[int, ...]] = {TOKENS: (config.num_tokens, config.token_dim)}
    for layer in layers(config, num_classes=metadata.num_classes, in_chans=metadata.in_chans):
        if layer.kind == "batch_norm":
            continue  # in the layer before it, which has the bias
        name = layer.name.removesuffix(".conv")
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = layer.shape, layer.shape[:1]
    return shapes


def _problems(arrays: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """One line for everything wrong."""
    quantised = [name for name in shapes if _largest_integer(arrays.get(name)) and _may_be_integers(name, shapes[name])]
    scales = {f"{name}.scale": shapes[name][:1] for name in quantised}
    expected = {**shapes, **scales}
    lines = [f"missing: {name}" for name in expected if name not in arrays]
    lines += [f"unexpected: {name:.100}" for name in arrays if name not in expected]
    for name, shape in expected.items():
        array = arrays.get(name)
        if array is None:
            continue
        if name not in quantised and not (isinstance(array, np.ndarray) and array.dtype == np.float32):
            kinds = "float32, int8 or int16" if _may_be_integers(name, shape) else "float32"
            found = getattr(array, "dtype", type(array))
            lines.append(f"wrong dtype: {name}: expected a {kinds} array, got {found}")
        elif array.shape != shape:
            lines.append(f"wrong shape: {name} is {_shape(array.shape)}, expected {_shape(shape)}")
        elif not np.isfinite(array).all():
            lines.append(f"not finite: {name} holds NaN or infinity")
        elif name in scales and not (array > 0).all():
            lines.append(f"out of range: {name}: expected positive numbers, got {array.min():g}")
        elif name in scales and not _stays_finite(array, arrays[name.removesuffix(".scale")]):
            lines.append(f"out of range: {name}: times the largest integer, {array.max():g} is no float32")
        elif name in quantised and array.size and array.min() < -_largest_integer(array):
            lines.append(f"out of range: {name}: expected integers from {-_largest_integer(array)}, got {array.min()}")
    return lines


def _may_be_integers(name: str, shape: tuple[int, ...]) -> bool:
    return name.endswith(".weight") and len(shape) >= 2


def _largest_integer(array: Any) -> int:
    """The largest number that an array of integers may hold, 0 for another array."""
    return _LARGEST_INTEGER.get(array.dtype, 0) if isinstance(array, np.ndarray) else 0


def _stays_finite(scale: np.ndarray, integers: np.ndarray) -> bool:
    return bool(scale.max(initial=0.0) <= np.finfo(np.float32).max / _largest_integer(integers))


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a scalar"
