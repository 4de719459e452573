"""The attention of both bridges, collected block by block on the reference path.

Legend: B batch, C channels, H W height and width, L = H*W positions, M tokens, D token width, N heads, E = C/N
head width. Fused kernels never hold a map of attention in memory, so there is none to be had from them: a copy of the
model in plain PyTorch runs here, and from what enters its bridges the maps are computed again.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mobileformer.network.blocks import TokenBlock
from mobileformer.network.classifier import Classifier, unwrap
from mobileformer.network.convolution import KernelModule
from mobileformer.network.layers import BRIDGE_HEADS, FormerToMobile, MobileToFormer

__all__ = [
    "PATH",
    "BlockAttention",
    "attention_maps",
    "former_to_mobile_attention",
    "mobile_to_former_attention",
    "token_similarity",
]

PATH = "the reference path in plain PyTorch (the fused kernels compute the same and never hold a map of attention)"


@dataclass(frozen=True, eq=False)
class BlockAttention:
    """What the two bridges of one block attend to.

    ================  ============  =====================================================================
    field             shape         meaning
    ================  ============  =====================================================================
    name              text          "block 3", counted from 0 as in the model, or "last bridge"
    kind              text          "down", "same" or "last"
    mobile_to_former  (B,N,M,H,W)   where a token looks: sum 1 over the positions of the block's input map
    former_to_mobile  (B,N,M,h,w)   which token a position takes from: sum 1 over the tokens, at every
                                    position of the block's output map; None for the last bridge, which
                                    has no way back
    tokens            (B,M,D)       as they leave the block
    ================  ============  =====================================================================

    Maps are float32, or float64 where the model is; tokens have the model's dtype.
    """

    name: str
    kind: str
    mobile_to_former: Tensor
    former_to_mobile: Tensor | None
    tokens: Tensor


def attention_maps(model: Classifier, x: Tensor) -> list[BlockAttention]:
    """The attention of every block that has tokens, in order, and of the last bridge.

    ======  ==================================  ==========================================================
    tensor  shape                               dtype, unit
    ======  ==================================  ==========================================================
    x       (B, in_chans, H, W), H and W >= 32  the parameters'; normalised as for the model
    ======  ==================================  ==========================================================

    A copy of the model runs, in evaluation mode, without fused kernels and without gradients: the model itself is not
    touched, and what it computes stays the same. Its hooks, and parts put in place of others, are in the copy too.

    Raises TypeError for anything but a `Model` (or `torch.compile`'s or DistributedDataParallel's wrapper of one), and
    ValueError or TypeError for an x that the model refuses.
    Source: figures of attention in the paper, arXiv 2108.05895.
    """
    network = _plain_copy(unwrap(model))
    into: dict[str, Tensor] = {}
    out_of: dict[str, Tensor] = {}
    tokens: dict[str, Tensor] = {}
    for name, part in network.named_modules():
        block = name.removesuffix(".mobile_to_former").removesuffix(".former_to_mobile")
        if isinstance(part, MobileToFormer):
            part.register_forward_pre_hook(_looking_in(into, block))
        elif isinstance(part, FormerToMobile):
            part.register_forward_pre_hook(_looking_out(out_of, block))
        elif isinstance(part, TokenBlock):
            part.register_forward_hook(_leaving(tokens, block))
    with torch.no_grad():
        _, tokens["mobile_to_former"] = network.forward_features(x)
    return [
        BlockAttention(_title(block), _kind(network, block), attention, out_of.get(block), tokens[block])
        for block, attention in into.items()
    ]


def mobile_to_former_attention(x: Tensor, q: Tensor, *, num_heads: int = BRIDGE_HEADS) -> Tensor:
    """softmax over the positions of q.x E^-0.5: what `mf_kernels.reference.mobile_to_former` multiplies x with.

    ======  ===========  =========================================
    tensor  shape        dtype
    ======  ===========  =========================================
    x       (B,C,H,W)    any floating one
    q       (B,M,C)      that of x
    result  (B,N,M,H,W)  float64 for float64, otherwise float32
    ======  ===========  =========================================
    """
    return _scores(x, q, num_heads).flatten(3).softmax(dim=3).unflatten(3, x.shape[2:])


def former_to_mobile_attention(x: Tensor, k: Tensor, *, num_heads: int = BRIDGE_HEADS) -> Tensor:
    """softmax over the tokens of x.k E^-0.5: what `mf_kernels.reference.former_to_mobile` multiplies v with.

    Shapes and dtypes as in `mobile_to_former_attention`, with k in the place of q.
    """
    return _scores(x, k, num_heads).softmax(dim=2)


def token_similarity(tokens: Tensor) -> Tensor:
    """Cosine of the angle between every two tokens: (B,M,D) -> (B,M,M), in [-1, 1], 0 for a token of zeros."""
    directions = F.normalize(_accurate(tokens), dim=2)
    return (directions @ directions.transpose(1, 2)).clamp(-1, 1)


def _scores(x: Tensor, rows: Tensor, num_heads: int) -> Tensor:
    """x (B,C,H,W), rows (B,M,C) -> (B,N,M,H,W): heads are contiguous chunks of channels."""
    maps = _accurate(x).unflatten(1, (num_heads, -1))
    rows = _accurate(rows).unflatten(2, (num_heads, -1))
    return torch.einsum("bmne,bnehw->bnmhw", rows, maps) * rows.shape[-1] ** -0.5


def _accurate(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _plain_copy(model: Classifier) -> Classifier:
    network = copy.deepcopy(model).eval()
    for part in network.modules():
        if isinstance(part, KernelModule | TokenBlock):
            part.use_fused = False
    network._use_fused = False
    return network


def _looking_in(into: dict[str, Tensor], block: str) -> Any:
    def hook(part: MobileToFormer, arguments: tuple[Tensor, Tensor]) -> None:
        x, tokens = arguments
        into[block] = mobile_to_former_attention(x, part.query(tokens))

    return hook


def _looking_out(out_of: dict[str, Tensor], block: str) -> Any:
    def hook(part: FormerToMobile, arguments: tuple[Tensor, Tensor]) -> None:
        x, tokens = arguments
        out_of[block] = former_to_mobile_attention(x, part.key(tokens))

    return hook


def _leaving(left: dict[str, Tensor], block: str) -> Any:
    def hook(part: TokenBlock, arguments: tuple[Tensor, Tensor], result: tuple[Tensor, Tensor]) -> None:
        left[block] = result[1]

    return hook


def _title(block: str) -> str:
    return block.replace("blocks.", "block ") if block.startswith("blocks.") else "last bridge"


def _kind(network: Classifier, block: str) -> str:
    return network.config.blocks[int(block.removeprefix("blocks."))].kind if block.startswith("blocks.") else "last"
