"""The seven published Mobile-Formers as one table. No torch here: the inference engine reads it too.

Source: the published implementation (paper: arXiv 2108.05895, table "specification of Mobile-Former").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "MIN_SIZE",
    "STEM_STRIDE",
    "VARIANTS",
    "BlockConfig",
    "BlockKind",
    "Stage",
    "VariantConfig",
    "get_variant",
]

MIN_SIZE = 32  # of height and width: the stride of the last map
STEM_STRIDE = 2
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

BlockKind = Literal["lite", "same", "down"]


@dataclass(frozen=True, slots=True)
class BlockConfig:
    """One block. A down block has two expansions: of its input channels, then of its output channels.

    ====  ================================================================  ======  ===========
    kind  convolutions                                                      stride  tokens
    ====  ================================================================  ======  ===========
    lite  depthwise, pointwise                                              1 or 2  passed on
    same  pointwise, depthwise, pointwise                                   1       both ways
    down  depthwise (stride 2), pointwise, depthwise, pointwise             2       both ways
    ====  ================================================================  ======  ===========
    """

    kind: BlockKind
    out_channels: int
    expansion: int
    second_expansion: int = 0
    stride: int = 1


@dataclass(frozen=True, slots=True)
class Stage:
    """The blocks of one resolution, by the last of them: what is built on a network's maps reads that one's.

    ==========  =====================================================
    field       meaning
    ==========  =====================================================
    stride      pixels of the image for one position: 4, 8, 16 or 32
    last_block  index of the last block that works at this stride
    channels    of the map that this block gives
    ==========  =====================================================
    """

    stride: int
    last_block: int
    channels: int


@dataclass(frozen=True, slots=True)
class VariantConfig:
    """One published network.

    ===============  =================================================================================
    field            meaning
    ===============  =================================================================================
    stem_channels    channels after the first convolution, whose stride is 2
    blocks           the blocks in order
    num_tokens       M, global tokens
    token_dim        D, their width
    hidden_features  width between the two linear layers of the classifier
    groups           groups of every pointwise convolution; above 1 with channel shuffles
    num_parameters   exact count with 3 input channels and 1000 classes
    published_madds  multiply-adds in millions, as in the name (`race.published` says by which counter)
    published_top1   ImageNet-1k top-1 in percent at 224 x 224, as the authors' README states
    ===============  =================================================================================
    """

    name: str
    stem_channels: int
    blocks: tuple[BlockConfig, ...]
    num_tokens: int
    token_dim: int
    hidden_features: int
    num_parameters: int
    published_madds: int
    published_top1: float
    groups: int = 1

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Those of strides 4, 8, 16 and 32. What works at stride 2, the stem and a first block, is no stage."""
        last: dict[int, Stage] = {}
        stride = STEM_STRIDE
        for index, block in enumerate(self.blocks):
            stride *= block.stride
            last[stride] = Stage(stride, index, block.out_channels)
        return tuple(stage for stage in last.values() if stage.stride > STEM_STRIDE)

    @property
    def feature_channels(self) -> int:
        """Channels of the last map, C."""
        return self.blocks[-1].out_channels

    @property
    def head_channels(self) -> int:
        """Channels of the pooled vector, 6 C."""
        return 6 * self.feature_channels


def _lite(expansion: int, out_channels: int, stride: int) -> BlockConfig:
    return BlockConfig("lite", out_channels, expansion, stride=stride)


def _same(expansion: int, out_channels: int) -> BlockConfig:
    return BlockConfig("same", out_channels, expansion)


def _down(out_channels: int) -> BlockConfig:
    return BlockConfig("down", out_channels, 6, second_expansion=4, stride=2)


# fmt: off
_BLOCKS_26M = (
    _lite(3, 12, 2), _same(3, 12), _down(24), _same(3, 24), _down(48), _same(4, 48), _same(6, 64),
    _down(96), _same(6, 96),
)
_BLOCKS_96M = (
    _lite(2, 12, 1), _down(16), _down(32), _same(3, 32), _down(64), _same(4, 64), _same(6, 88),
    _down(128), _same(6, 128),
)
_BLOCKS_151M = (
    _lite(2, 12, 1), _down(16), _same(3, 16), _down(32), _same(3, 32), _down(64), _same(4, 64),
    _same(6, 88), _same(6, 88), _down(128), _same(6, 128), _same(6, 128),
)
_BLOCKS_214M = (
    _lite(2, 12, 1), _down(20), _same(3, 20), _down(40), _same(4, 40), _down(80), _same(4, 80),
    _same(6, 112), _same(6, 112), _down(160), _same(6, 160), _same(6, 160),
)
_BLOCKS_294M = (
    _lite(2, 16, 1), _down(24), _same(4, 24), _down(48), _same(4, 48), _down(96), _same(4, 96),
    _same(6, 128), _same(6, 128), _down(192), _same(6, 192), _same(6, 192),
)
_BLOCKS_508M = (
    _lite(2, 24, 1), _down(40), _same(3, 40), _down(72), _same(3, 72), _down(128), _same(4, 128),
    _same(6, 176), _same(6, 176), _down(240), _same(6, 240), _same(6, 240),
)

_TABLE = (  #      stem  blocks      M    D  hidden  parameters  MAdds  top-1
    VariantConfig("26m",  8, _BLOCKS_26M, 3, 128, 1024, 3_232_788, 26, 64.0, groups=4),
    VariantConfig("52m",  8, _BLOCKS_26M, 3, 128, 1024, 3_469_092, 52, 68.7),
    VariantConfig("96m", 12, _BLOCKS_96M, 4, 128, 1280, 4_585_252, 96, 72.8),
    VariantConfig("151m", 12, _BLOCKS_151M, 6, 192, 1280, 7_595_828, 151, 75.2),
    VariantConfig("214m", 12, _BLOCKS_214M, 6, 192, 1600, 9_425_920, 214, 76.7),
    VariantConfig("294m", 16, _BLOCKS_294M, 6, 192, 1920, 11_422_648, 294, 77.9),
    VariantConfig("508m", 24, _BLOCKS_508M, 6, 192, 1920, 13_976_976, 508, 79.3),
)
# fmt: on

VARIANTS: Mapping[str, VariantConfig] = MappingProxyType({config.name: config for config in _TABLE})


def get_variant(name: str) -> VariantConfig:
    """The configuration called `name`. Raises ValueError naming the seven that exist."""
    try:
        return VARIANTS[name]
    except (KeyError, TypeError):
        raise ValueError(f"variant: expected one of {', '.join(VARIANTS)}, got {name!r}") from None
