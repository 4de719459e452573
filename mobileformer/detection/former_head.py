"""The head of the end-to-end detector: all queries travel over three maps, from coarse to fine.

Legend: B batch, C feature width, H W height and width of a map, L = H*W, Q queries, D their width, S sets of
predictions, K' numbers of the class layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from mobileformer.detection.head_blocks import HEAD_WIDTH, HeadBlock, Place, Read, State, Up, position_code
from mobileformer.detection.products import Linear, pointwise
from mobileformer.network.convolution import ConvNorm

__all__ = ["FormerHead", "Predictions"]

STRIDES = (32, 16, 8)
Sizes = Sequence[tuple[int, int]]


class Predictions(NamedTuple):
    """logits (S,B,Q,K') and boxes (S,B,Q,4) as (cx, cy, w, h) in parts of each image; without S, the last set."""

    logits: Tensor
    boxes: Tensor


class FormerHead(nn.Module):
    """Maps of strides 32, 16 and 8 -> S = sum(depth) + 1 sets of predictions, whose layers they share.

    =============  ====================================================================================================
    argument       meaning
    =============  ====================================================================================================
    in_channels    of the three maps, the coarsest first
    channels       C, a multiple of 32
    width          D, a multiple of 32
    hidden         width inside the feed-forward nets of the queries
    num_queries    Q
    num_outputs    K'
    depth          blocks at each stride. Those of stride 32 have a transformer layer on the map (M-F+), the others a
                   bottleneck of two convolutions (M-F-).
    dropout        of what attention adds and inside the feed-forward nets, in training
    local_init     queries begin spread over the image, each looking around its own point. Else position N(0, 1),
                   Xavier weights, no reference points.
    class_bias     what the bias of the class layer starts with
    use_fused      as `EndToEnd` has it
    =============  ====================================================================================================
    """

    reference: nn.Parameter | None

    def __init__(
        self,
        in_channels: Sequence[int],
        *,
        channels: int,
        width: int,
        hidden: int,
        num_queries: int,
        num_outputs: int,
        depth: Sequence[int],
        dropout: float,
        local_init: bool,
        class_bias: float,
        use_fused: bool,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.use_fused = use_fused
        self.inputs = nn.ModuleList(ConvNorm(own, channels, 1, use_fused=use_fused) for own in in_channels)
        self.ups = nn.ModuleList(Up(channels, use_fused=use_fused) for _ in in_channels[1:])
        last = sum(depth) - 1
        firsts = [sum(depth[:stage]) for stage in range(len(depth))]
        self.stages = nn.ModuleList(
            nn.ModuleList(
                HeadBlock(
                    channels,
                    width,
                    hidden,
                    encodes=stage == 0,
                    adapts=first + index < last,
                    dropout=dropout,
                    use_fused=use_fused,
                )
                for index in range(count)
            )
            for stage, (first, count) in enumerate(zip(firsts, depth, strict=True))
        )
        self.read = Read(channels, width, gated=False, dropout=dropout, use_fused=use_fused)
        self.position = nn.Parameter(torch.empty(num_queries, width))
        self.reference = nn.Parameter(torch.empty(num_queries, 2)) if local_init else None
        self.classes = Linear(width, num_outputs, use_fused=use_fused)
        self.box = nn.Sequential(
            Linear(width, width, use_fused=use_fused),
            nn.ReLU(),
            Linear(width, width, use_fused=use_fused),
            nn.ReLU(),
            Linear(width, 4, use_fused=use_fused),
        )
        self.initialise(class_bias)

    @torch.no_grad()
    def initialise(self, class_bias: float) -> None:
        """Linear layers by Xavier's rule, bias 0; convolutions by He's, with fan-in; then the local start, if any."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.constant_(self.classes.bias, class_bias)
        if self.reference is None:
            nn.init.normal_(self.position)
            return
        points = _grid(len(self.position)).to(self.position)  # (Q,2) as (y,x)
        code = position_code(*points.unbind(1))
        self.position.copy_(code.repeat(1, self.position.shape[1] // HEAD_WIDTH))
        self.reference.copy_(points.flip(1).logit())
        reads = [module.query for module in self.modules() if isinstance(module, Read)]
        for layer in [*reads, *(block.write.key for block in self._blocks())]:
            # The position of a query has one code for each head. So where it is as wide as the map this is 2 I, and
            # where it is wider 2 [I | 0]: a query's score of a position is the product of their two codes.
            columns = torch.arange(layer.out_features, device=points.device) % layer.in_features
            layer.weight.mul_(0.1)
            layer.weight[torch.arange(layer.out_features, device=points.device), columns] += 2
        for block in self._blocks():
            if block.adapt is not None:
                nn.init.zeros_(cast(nn.Linear, block.adapt[-1]).weight)

    @property
    def points(self) -> Tensor:
        """(Q,2) as (x,y), in parts of the image: what a query's box is told from. The middle, if there are none."""
        return (
            self.position.new_full((len(self.position), 2), 0.5) if self.reference is None else self.reference.sigmoid()
        )

    def forward(self, maps: Sequence[Tensor], sizes: Sizes | None, *, every_set: bool) -> Predictions:
        """Maps (B,c,H,W), the coarsest first, and the images' own sizes in pixels, None where they fill the batch.

        -> all sets, or only the last, without S.
        """
        contents: list[Tensor] = []
        state, place = self._travel(maps, sizes, contents)
        content = self.read(state, place)
        return self._predict(torch.stack([*contents, content]) if every_set else content)

    def attention(self, maps: Sequence[Tensor], sizes: Sizes | None) -> tuple[Tensor, Predictions]:
        """Where the last read of every query looks, (B,Q,H,W) over the map of stride 8, and the last set."""
        state, place = self._travel(maps, sizes, [])
        return self.read.weights(state, place), self._predict(self.read(state, place))

    def _travel(self, maps: Sequence[Tensor], sizes: Sizes | None, contents: list[Tensor]) -> tuple[State, Place]:
        """Through all blocks; `contents` gets what the queries hold after each of them."""
        batch = maps[0].shape[0]
        position = self.position.repeat(batch, 1, 1)  # no view of a parameter, on which PyTorch's counter fails
        state, place = State(maps[0], torch.zeros_like(position), position), None
        for index, (stride, given) in enumerate(zip(STRIDES, maps, strict=True)):
            if self.use_fused:  # every layer of the head reads rows, which lie in one piece in this layout
                given = given.contiguous(memory_format=torch.channels_last)
            x = pointwise(cast(ConvNorm, self.inputs[index]), given)
            if index > 0:
                x = x + self.ups[index - 1](state.x, (x.shape[2], x.shape[3]))
            place = self._place(x, stride, sizes)
            if place.valid is not None:
                x = x.masked_fill(~place.valid, 0.0)
            state = state._replace(x=x)
            for block in cast(nn.ModuleList, self.stages[index]):
                state = block(state, place)
                contents.append(state.content)
        assert place is not None
        return state, place

    def _place(self, x: Tensor, stride: int, sizes: Sizes | None) -> Place:
        """The code of every position, as part of its own image's extent, and which positions have an image."""
        height, width = x.shape[2:]
        rows = torch.arange(height, device=x.device)[:, None]
        columns = torch.arange(width, device=x.device)[None]
        own_height: Tensor | int = height
        own_width: Tensor | int = width
        valid = None
        if sizes is not None:
            own = -(-torch.tensor(sizes, device=x.device) // stride)  # (B,2), rounded up
            own_height, own_width = own[:, :, None, None].unbind(1)
            valid = ((rows < own_height) & (columns < own_width)).unsqueeze(1)
        code = position_code((rows + 0.5).to(x) / own_height, (columns + 0.5).to(x) / own_width)
        code = code.repeat(*(1,) * (code.ndim - 1), self.channels // HEAD_WIDTH)  # once a head
        return Place(
            code.unflatten(0, (-1, height)).permute(0, 3, 1, 2) if sizes is None else code.permute(0, 3, 1, 2), valid
        )

    def _predict(self, content: Tensor) -> Predictions:
        """(...,Q,D) -> logits (...,Q,K'), boxes (...,Q,4)."""
        raw = self.box(content)
        if self.reference is not None:
            raw = raw + nn.functional.pad(self.reference, (0, 2))
        return Predictions(self.classes(content), raw.sigmoid())

    def _blocks(self) -> list[HeadBlock]:
        return [module for module in self.modules() if isinstance(module, HeadBlock)]


def _grid(count: int) -> Tensor:
    """(count,2) as (y,x), the middles of cells of a grid that is as wide as the root of their number, rounded up."""
    columns = math.isqrt(count - 1) + 1
    rows = -(-count // columns)
    index = torch.arange(count)
    return torch.stack([(index // columns + 0.5) / rows, (index % columns + 0.5) / columns], 1)
