"""The trunk that every network stands on: tokens and stem, then the blocks, whose maps and tokens it hands on.

Legend: B batch, C channels, H W height and width, M tokens, D token width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from mf_kernels.environment import is_transformed
from mobileformer.config import MIN_SIZE, STEM_STRIDE, BlockConfig, get_variant
from mobileformer.network.blocks import DownBlock, LiteBlock, SameBlock
from mobileformer.network.convolution import ConvNorm
from mobileformer.network.recompute import recomputed

__all__ = ["Backbone", "check_at_least_one", "check_rate"]


class Backbone(nn.Module):
    """Tokens, stem and blocks of a variant. What a task adds either subclasses it or holds one.

    ====================  ==============================================================================
    argument              meaning
    ====================  ==============================================================================
    variant, in_chans,    as `mobileformer.Model` has them
    use_fused, spatial_
    dynamic_relu,
    drop_path_rate
    initialise            False: a subclass calls `initialise` itself, once it has added its own parts,
                          so that the same seed gives the same weights whatever the subclass adds
    ====================  ==============================================================================

    Parameters are `tokens`, `stem.*` and `blocks.N.*`, first in every state dict and under the same names in all
    networks: a classifier's weights are a detector's too.

    Raises ValueError for an argument out of range.
    """

    _grad_checkpointing = False

    def __init__(
        self,
        variant: str = "294m",
        *,
        in_chans: int = 3,
        use_fused: bool = True,
        drop_path_rate: float = 0.0,
        spatial_dynamic_relu: bool = False,
        initialise: bool = True,
    ) -> None:
        super().__init__()
        config = get_variant(variant)
        check_at_least_one("in_chans", in_chans)
        check_rate("drop_path_rate", drop_path_rate)
        self.config = config
        self.in_chans = in_chans
        self.spatial_dynamic_relu = spatial_dynamic_relu
        self._use_fused = use_fused

        self.tokens = nn.Parameter(torch.empty(config.num_tokens, config.token_dim))
        self.stem = ConvNorm(
            in_chans, config.stem_channels, 3, stride=STEM_STRIDE, activation="relu6", use_fused=use_fused
        )
        self.blocks = nn.ModuleList()
        channels = config.stem_channels
        for index, block in enumerate(config.blocks):
            drop_path = drop_path_rate * (index + 1) / len(config.blocks)
            self.blocks.append(self._make_block(channels, block, drop_path))
            channels = block.out_channels
        if initialise:
            self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Draw tokens from N(0, 1) and the weights of all linear layers from N(0, 0.01); biases are 0.

        Convolutions drew theirs when they were made, and norms are 1 and 0.
        """
        nn.init.normal_(self.tokens)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    @property
    def variant(self) -> str:
        """Name of the variant, for instance "294m"."""
        return self.config.name

    @property
    def use_fused(self) -> bool:
        """Whether the model was built on the fused operators. Fixed: build another model to change it."""
        return self._use_fused

    def maps(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """What a detector reads: the map that the last block of each stage gives, and the last block's tokens.

        ======  ================================  ==========================================================
        tensor  shape                             which
        ======  ================================  ==========================================================
        x       (B,in_chans,H,W), H and W >= 32   the images, normalised
        maps    (B,C,ceil(H/s),ceil(W/s)) each    for s of 4, 8, 16, 32: of block `stage.last_block`, with
                                                  `stage.channels` channels, for `stage` in `config.stages`;
                                                  after that block's Former-to-Mobile, with no norm behind it
        tokens  (B,M,D)                           after the last block's Former. The classifier's last bridge
                                                  reads the last map into them once more, and is not in here.
        ======  ================================  ==========================================================

        The 26m and 52m begin stride 4 with a lite block, the others at stride 2, whose map is in no stage.
        Raises ValueError for a shape out of range, TypeError for a wrong dtype.
        """
        ends = {stage.last_block for stage in self.config.stages}
        maps: list[Tensor] = []
        x, tokens = self._enter(x)
        for index, block in enumerate(self.blocks):
            x, tokens = self._through(block, x, tokens)
            if index in ends:
                maps.append(x)
        return maps, tokens

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether blocks are run again in the backward pass instead of keeping what they computed.

        The memory that a training step takes for activations falls to the maps between blocks and one block's inside;
        it costs a second forward pass. Logits, gradients and running statistics stay the same. It is not part of the
        state dict, and without a gradient nothing changes.
        """
        self._grad_checkpointing = enable

    def _enter(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B,in_chans,H,W) -> map (B,stem,ceil(H/2),ceil(W/2)), tokens (B,M,D): what the first block gets."""
        self._check_input(x)
        if self._use_fused and not is_transformed():
            # Once, here: every operator and convolution after it keeps the layout of its input. Grouped
            # convolutions are several times slower in channels_last, so the variant that has them stays with
            # planes.
            planes = self.config.groups > 1
            x = x.contiguous(memory_format=torch.contiguous_format if planes else torch.channels_last)
            if self.in_chans == 1 and not planes:
                # One channel lies the same in both layouts, and its strides say planes: these say channels_last.
                x = x.reshape(x.shape[0], x.shape[2], x.shape[3], 1).permute(0, 3, 1, 2)
        return self.stem(x), self.tokens.repeat(x.shape[0], 1, 1)

    def _through(self, block: nn.Module, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """One block's map and tokens."""
        if self._grad_checkpointing and torch.is_grad_enabled():
            return recomputed(block, x, tokens)
        return block(x, tokens)

    def _make_block(self, in_channels: int, block: BlockConfig, drop_path: float) -> nn.Module:
        groups = self.config.groups
        if block.kind == "lite":
            return LiteBlock(in_channels, block, groups=groups, use_fused=self._use_fused)
        kind = SameBlock if block.kind == "same" else DownBlock
        return kind(
            in_channels,
            block,
            token_dim=self.config.token_dim,
            groups=groups,
            spatial_dynamic_relu=self.spatial_dynamic_relu,
            drop_path=drop_path,
            use_fused=self._use_fused,
        )

    def _check_input(self, x: Tensor) -> None:
        if isinstance(x, Proxy):  # of torch.fx.symbolic_trace: the graph is for any shape
            return
        if x.ndim != 4:
            raise ValueError(f"x: expected 4 dimensions (B, {self.in_chans}, H, W), got shape {tuple(x.shape)}")
        if x.shape[1] != self.in_chans:
            raise ValueError(f"x: expected {self.in_chans} channels, got {x.shape[1]} (shape {tuple(x.shape)})")
        if x.shape[2] < MIN_SIZE or x.shape[3] < MIN_SIZE:
            raise ValueError(f"x: expected height and width of at least {MIN_SIZE}, got {x.shape[2]} x {x.shape[3]}")
        expected = self.tokens.dtype
        if x.dtype != expected and not (x.is_floating_point() and torch.is_autocast_enabled(x.device.type)):
            raise TypeError(f"x: expected dtype {expected} like the model's parameters, got {x.dtype}")


def check_at_least_one(name: str, value: int) -> None:
    """Raise ValueError unless `value` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")


def check_rate(name: str, value: float) -> None:
    """Raise ValueError unless `value` is in [0, 1)."""
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name}: expected a number in [0, 1), got {value!r}")
