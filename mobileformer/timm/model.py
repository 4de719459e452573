"""The model with what timm asks of one: features by stage, a classifier to exchange, groups of parameters.

Legend: B batch, C channels, H W height and width, M tokens, D token width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from mobileformer.models import Model
from mobileformer.weights.keys import to_official, to_ours

__all__ = ["MobileFormer", "checkpoint_filter_fn"]


class MobileFormer(Model):
    """`mobileformer.Model` as timm's scripts and its tools for features and fine-tuning call a model.

    Arguments are the model's, and besides:

    =============  ===================================================================================
    argument       meaning
    =============  ===================================================================================
    num_classes    0 leaves the last layer out: the model gives the vector before it
    global_pool    "avg": the published classifier knows no other pooling
    device, dtype  of the parameters
    =============  ===================================================================================

    A stage is what has one resolution: strides 4, 8, 16 and 32. `feature_info` lists the last block of each.
    """

    same_numbers = True

    def __init__(
        self,
        variant: str = "294m",
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        use_fused: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        spatial_dynamic_relu: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            variant,
            num_classes=num_classes if num_classes != 0 else 1,
            in_chans=in_chans,
            use_fused=use_fused,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            spatial_dynamic_relu=spatial_dynamic_relu,
        )
        self.stage_ends = tuple(stage.last_block for stage in self.config.stages)
        self.feature_info: list[dict[str, Any]] = [  # what timm's `FeatureInfo` asks for
            {"num_chs": stage.channels, "reduction": stage.stride, "module": f"blocks.{stage.last_block}"}
            for stage in self.config.stages
        ]
        self.num_features = self.config.feature_channels
        self.head_hidden_size = self.config.hidden_features
        self.global_pool = _check_pool(global_pool)
        if num_classes == 0:
            self.reset_classifier(0)
        self.to(device=device, dtype=dtype)

    def forward_head(
        self, features: Tensor | tuple[Tensor, Tensor], tokens: Tensor | None = None, pre_logits: bool = False
    ) -> Tensor:
        """As the model's, and also with what `forward_features` gave in one argument, as timm calls it."""
        if isinstance(features, tuple):
            features, tokens = features
        if tokens is None:
            raise TypeError("tokens: expected a tensor, or features and tokens in one tuple, got features alone")
        return self.head(features, tokens, pre_logits)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """What the stages give, and what `forward_features` gives: ((features, tokens), [intermediate, ...]).

        ====================  ===========================================================================
        argument              meaning
        ====================  ===========================================================================
        indices               of the stages (0 is stride 4, 3 and -1 stride 32), the last so many, or all
        return_prefix_tokens  an intermediate is (map, tokens), as that stage's last block left them
        norm                  has no effect: no norm follows the blocks
        stop_early            run no block after the last stage asked for. Before the end of the network
                              there is no bridge for that map: then tokens are the block's own.
        output_fmt            "NCHW"
        intermediates_only    the list alone
        ====================  ===========================================================================

        Maps are (B,C,H/stride,W/stride), rounded up, tokens (B,M,D). Raises ValueError for another format.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt: expected 'NCHW', got {str(output_fmt)!r}")
        taken, last = feature_take_indices(len(self.stage_ends), _as_list(indices))
        wanted = {self.stage_ends[stage] for stage in taken}
        end = self.stage_ends[last] if stop_early else len(self.blocks) - 1
        intermediates: list[Any] = []
        x, tokens = self._enter(x)
        for index, block in enumerate(self.blocks):
            x, tokens = self._through(block, x, tokens)
            if index in wanted:
                intermediates.append((x, tokens) if return_prefix_tokens else x)
            if index == end:
                break
        if intermediates_only:
            return intermediates
        if end == len(self.blocks) - 1:
            tokens = self.mobile_to_former(x, tokens)
        return (x, tokens), intermediates

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the stages at `indices` do not need, and return these as numbers from 0.

        `prune_norm` drops the last bridge, which is where other networks have their last norm. The classifier reads
        its tokens, and goes with it; calling the model gives the last map then.
        """
        taken, last = feature_take_indices(len(self.stage_ends), _as_list(indices))
        shortened = last < len(self.stage_ends) - 1
        if shortened:
            self.stage_ends = self.stage_ends[: last + 1]
            self.blocks = self.blocks[: self.stage_ends[last] + 1]
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if shortened or prune_norm:
            self.register_module("mobile_to_former", _NoBridge())
        if shortened or prune_norm or prune_head:
            self.register_module("head", _NoHead())
            self.num_classes = 0
        return list(taken)

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new last layer, initialised as published; 0 classes: none. Raises ValueError, RuntimeError if pruned."""
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 0:
            raise ValueError(f"num_classes: expected an integer of at least 0, got {num_classes!r}")
        if global_pool is not None:
            self.global_pool = _check_pool(global_pool)
        if isinstance(self.head, _NoHead):
            raise RuntimeError("reset_classifier: the classifier was pruned with the layers that it reads")
        classifier: nn.Module = nn.Identity()
        if num_classes > 0:
            like = self.head.fc.weight
            classifier = nn.Linear(like.shape[0], num_classes, device=like.device, dtype=like.dtype)
            nn.init.normal_(classifier.weight, std=0.01)
            nn.init.zeros_(classifier.bias)
        self.head.register_module("classifier", classifier.train(self.training))
        self.num_classes = num_classes

    def no_weight_decay(self) -> set[str]:
        """No parameter by name.

        The published recipes decay the token table, and leave out what has one dimension or is a bias. timm does the
        latter by itself. A token table in this set would be another recipe.
        """
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Names of parameters by depth, for layer-wise learning rates: stem and tokens, each block, the classifier.

        `coarse`: each stage instead of each block. The last bridge belongs to the last of them.
        """
        blocks: list[tuple[str, tuple[int, ...] | None]] = [(r"^blocks\.(\d+)", None)]
        if coarse:
            begins = [0, *(end + 1 for end in self.stage_ends)]
            spans = [range(begin, end + 1) for begin, end in zip(begins, self.stage_ends, strict=False)]
            blocks = [(rf"^blocks\.(?:{'|'.join(map(str, span))})\.", (stage,)) for stage, span in enumerate(spans)]
        return {"stem": r"^(?:stem|tokens)", "blocks": [*blocks, (r"^mobile_to_former", (99999,))]}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As of every module, and also under the published names: timm's `checkpoint_path` filters nothing."""
        return super().load_state_dict(checkpoint_filter_fn(state_dict, self), strict, assign)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: Model) -> Mapping[str, Any]:
    """The same weights under the model's names, from a state dict under these or under the published ones.

    Keys that belong to neither stay, for whoever loads the result to complain of.
    """
    names = to_ours(state_dict, model.config)
    if len(to_official(state_dict, model.config)) >= len(names):
        return state_dict
    return {names.get(key, key): value for key, value in state_dict.items()}


class _NoBridge(nn.Module):
    """In place of the last bridge of a pruned network."""

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        return tokens


class _NoHead(nn.Module):
    """In place of a pruned network's classifier: the map itself."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Identity()

    def forward(self, features: Tensor, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        return features


def _as_list(indices: int | Sequence[int] | None) -> int | list[int] | None:
    return indices if indices is None or isinstance(indices, int) else list(indices)


def _check_pool(global_pool: str) -> str:
    if global_pool != "avg":
        raise ValueError(f"global_pool: expected 'avg', got {global_pool!r}")
    return global_pool
