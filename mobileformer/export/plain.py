"""The folded network in plain PyTorch, written for the runtimes that a file is exported to.

Legend: B batch, C channels, H W height and width, L = H*W, M tokens, D token width, N heads, E = C/N head width,
R = B*M rows.

The same function as the model, other operators. What differs was measured to be faster in ONNX Runtime and OpenVINO:

- tokens are rows, (R, D), so that a linear layer is one matrix product with nothing around it;
- one linear layer for all that reads the same tokens: key and value of a block, query and gate of the next;
- both slopes of a dynamic ReLU from one linear layer and one clamp; scales of attentions, and 1/3 and 1 of hard
  sigmoids, in weights;
- the map is carried in heads from one bridge to the next, one reshape a block;
- query and gate of the first bridge are constants, and the last bridge computes token 0 alone, all that is read;
- attention and dynamic ReLU as in `forms.py`, convolutions as in `convolutions.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobileformer.export.convolutions import Depthwise, Pointwise, as_folded, convolution, shuffled_order
from mobileformer.export.forms import EdgeForm, Form, linear
from mobileformer.inference.folding import folded_copy, parts_of_its_own
from mobileformer.network.blocks import DownBlock, LiteBlock, SameBlock
from mobileformer.network.classifier import Classifier
from mobileformer.network.layers import BRIDGE_HEADS, FORMER_HEADS, DynamicReLU, Former, FormerToMobile, MobileToFormer

__all__ = ["ExportNetwork"]


class ExportNetwork(nn.Module):
    """x (B,in_chans,H,W) -> logits (B,classes), as the model it is made from. Independent of it.

    edge: the form for ExecuTorch (`forms.py`).
    With slopes by position (`spatial_dynamic_relu`) a traced graph has one height and width: how the scores are pooled
    depends on which of them are odd.
    Raises ValueError for a model with parts of its own: an adapter in place of a layer, a norm without running
    statistics.
    """

    tokens: Tensor
    query: Tensor
    gate: Tensor

    def __init__(self, model: Classifier, dtype: torch.dtype = torch.float32, *, edge: bool = False) -> None:
        super().__init__()
        own = parts_of_its_own(model)
        if own is not None:
            raise ValueError(f"model: cannot be exported: {own}")
        source = folded_copy(model).cpu()
        self.form = EdgeForm() if edge else Form()
        self.num_tokens, self.token_dim = source.config.num_tokens, source.config.token_dim
        stem = as_folded(source.stem)
        self.stem = convolution(stem.weight, stem.bias, stride=stem.stride)
        self.lite = nn.Sequential(*(LiteExport(block) for block in source.blocks if isinstance(block, LiteBlock)))
        blocks = [block for block in source.blocks if isinstance(block, SameBlock | DownBlock)]
        bridges = [block.mobile_to_former for block in blocks[1:]] + [source.mobile_to_former]
        self.blocks = nn.ModuleList(
            TokenExport(block, bridge, self.num_tokens, self.form)
            for block, bridge in zip(blocks, bridges, strict=True)
        )
        self.last = Bridge(source.mobile_to_former, self.form)
        first = blocks[0].mobile_to_former
        query = _query(first)(source.tokens)
        self.register_buffer("tokens", source.tokens.detach().clone())
        self.register_buffer("query", self.form.token_heads(query, self.num_tokens, BRIDGE_HEADS).detach().clone())
        self.register_buffer("gate", _gate(first)(source.tokens).detach())
        head = source.head
        reads = torch.argsort(shuffled_order(source.config.feature_channels, head.groups))
        self.expand = Pointwise(as_folded(head.expand), reads)
        self.fc, self.classifier = head.fc, head.classifier
        self.requires_grad_(False).to(dtype).eval()

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        x = self.lite(F.relu6(self.stem(x)))
        flat = self.form.map_heads(x)
        tokens, gate = self.tokens.repeat(batch, 1), self.gate.repeat(batch, 1)
        query = self.form.for_batch(self.query, batch)
        for block in self.blocks:
            x, flat, tokens, query, gate = block(x, flat, tokens, query, gate)
        first, gate = _first_rows(tokens, self.num_tokens), _first_rows(gate, self.num_tokens)
        token = self.last(flat, first, self.form.first_token(query), gate)
        # Kept dimensions, then flattened: XNNPACK takes no other mean.
        pooled = F.hardswish(self.expand(x).mean(dim=(2, 3), keepdim=True).flatten(1))
        return self.classifier(F.hardswish(self.fc(torch.cat([pooled, token], dim=1))))


class LiteExport(nn.Module):
    """Depthwise, pointwise, skip."""

    def __init__(self, source: LiteBlock) -> None:
        super().__init__()
        expand = as_folded(source.expand)
        self.expand = Depthwise(expand, torch.arange(expand.groups))
        self.project = Pointwise(as_folded(source.project), self.expand.order)
        self.has_skip = source.has_skip

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.expand(x))
        return x + y if self.has_skip else y


class TokenExport(nn.Module):
    """A block with tokens, same or down, and the first linear layers of the bridge after it."""

    def __init__(self, source: SameBlock | DownBlock, after: MobileToFormer, num_tokens: int, form: Form) -> None:
        super().__init__()
        self.form = form
        self.num_tokens = num_tokens
        self.spatial = source.spatial_dynamic_relu
        self.bridge = Bridge(source.mobile_to_former, form)
        self.former = FormerExport(source.former, num_tokens, form)
        outward = source.former_to_mobile
        self.joint = form.beside(_key(outward), outward.value, _query(after), _gate(after))
        if isinstance(source, SameBlock):
            expand = as_folded(source.expand)
            self.first = Pointwise(expand, torch.arange(expand.weight.shape[1] * expand.groups))
            self.squeeze = None
            self.second = Depthwise(as_folded(source.depthwise), self.first.order)
            relus = source.expand_relu, source.depthwise_relu
            self.has_skip = source.has_skip
        else:
            down = as_folded(source.down)
            self.first = Depthwise(down, torch.arange(down.groups))
            self.squeeze = Pointwise(as_folded(source.squeeze), self.first.order)
            self.second = Depthwise(as_folded(source.expand), self.squeeze.order)
            relus = source.down_relu, source.expand_relu
            self.has_skip = True
        self.project = Pointwise(as_folded(source.project), self.second.order)
        self.reduce = form.beside(*(relu.reduce for relu in relus), relu=True)
        self.slopes1 = form.slopes(*_slopes(relus[0], self.first.order))
        self.slopes2 = form.slopes(*_slopes(relus[1], self.second.order))

    def forward(
        self, x: Tensor, flat: Tensor, tokens: Tensor, query: Tensor, gate: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x (B,C,H,W), the same in heads, tokens (R,D), query in heads, gate (R,C) -> those of the next block."""
        form, M = self.form, self.num_tokens
        mix = self._mix(x, flat, query) if self.spatial else None
        tokens = self.former(self.bridge(flat, tokens, query, gate))
        key, value, query, gate = self.joint(tokens)
        key, value, query = (form.token_heads(rows, M, BRIDGE_HEADS) for rows in (key, value, query))
        hidden1, hidden2 = self.reduce(tokens if self.spatial else _first_rows(tokens, M))

        y = self._activated(self.first(x), self.slopes1(hidden1), mix)
        skip = x
        if self.squeeze is not None:
            y = skip = self.squeeze(y)
        y = self.project(self._activated(self.second(y), self.slopes2(hidden2), mix))
        if self.has_skip:
            y = skip + y

        flat = form.spread(form.map_heads(y), key, value)
        return flat.reshape(y.shape), flat, tokens, query, gate

    def _activated(self, x: Tensor, slopes: tuple[Tensor, Tensor], mix: Tensor | None) -> Tensor:
        """max(a1 x, a2 x); slopes (B,C,1,1), or (R,C,1,1) to be mixed at every position by mix (B,M,L)."""
        slope1, slope2 = slopes if mix is None else (self._mixed(slope, mix, x) for slope in slopes)
        return torch.maximum(slope1 * x, slope2 * x)

    def _mixed(self, slope: Tensor, mix: Tensor, x: Tensor) -> Tensor:
        """(R,C,1,1), mix (B,M,L) -> the shape of x (B,C,H,W)."""
        columns = slope.reshape(-1, self.num_tokens, x.shape[1]).transpose(1, 2)
        return torch.bmm(columns, mix).reshape(x.shape)

    def _mix(self, x: Tensor, flat: Tensor, query: Tensor) -> Tensor:
        """Weights of the tokens at every position of the block's output, (B,M,L')."""
        scores = self.form.mean_scores(query, flat, self.num_tokens)
        if self.squeeze is not None:
            # What adaptive pooling to half the size, rounded up, comes to: windows of 2 side by side, or, of an odd
            # side, windows of 3 that overlap and are cut off at the border.
            height, width = x.shape[2:]
            window, padding = (2 + height % 2, 2 + width % 2), (height % 2, width % 2)
            scores = scores.reshape(-1, self.num_tokens, height, width)
            scores = F.avg_pool2d(scores, window, 2, padding, count_include_pad=False).flatten(2)
        return self.form.softmax_over_tokens(scores)


class Bridge(nn.Module):
    """Tokens gather from the map, with the outputs of the query's and the gate's linear layer given."""

    def __init__(self, source: MobileToFormer, form: Form) -> None:
        super().__init__()
        self.form = form
        self.project, self.norm = source.project, source.norm

    def forward(self, flat: Tensor, tokens: Tensor, query: Tensor, gate: Tensor) -> Tensor:
        """flat and query in heads, tokens (R,D), gate (R,C) -> (R,D)."""
        return self.norm(tokens + self.project(self.form.attend(query, flat) * gate.clamp(0, 2)))


class FormerExport(nn.Module):
    """The Former on rows, (R,D) -> (R,D)."""

    def __init__(self, source: Former, num_tokens: int, form: Form) -> None:
        super().__init__()
        self.form = form
        self.num_tokens = num_tokens
        self.query = _scaled(source.query, FORMER_HEADS)
        self.project, self.norm = source.project, source.norm
        self.ffn_expand, self.ffn_project, self.ffn_norm = source.ffn_expand, source.ffn_project, source.ffn_norm

    def forward(self, tokens: Tensor) -> Tensor:
        query = self.form.token_heads(self.query(tokens), self.num_tokens, FORMER_HEADS)
        keys = self.form.token_heads(tokens, self.num_tokens, FORMER_HEADS)
        tokens = self.norm(tokens + self.project(self.form.attend_tokens(query, keys)))
        return self.ffn_norm(tokens + self.ffn_project(F.gelu(self.ffn_expand(tokens))))


def _first_rows(rows: Tensor, num_tokens: int) -> Tensor:
    """Token 0 of every sample: (R,C) -> (B,C)."""
    width = rows.shape[1]
    return rows.reshape(-1, num_tokens * width)[:, :width]


def _query(bridge: MobileToFormer) -> nn.Linear:
    return _scaled(bridge.query, BRIDGE_HEADS)


def _key(bridge: FormerToMobile) -> nn.Linear:
    return _scaled(bridge.key, BRIDGE_HEADS)


def _gate(bridge: MobileToFormer) -> nn.Linear:
    """t / 3 + 1: the gate is 2 hsig(t) = clamp(t / 3 + 1, 0, 2)."""
    return linear(bridge.gate.weight / 3, bridge.gate.bias / 3 + 1)


def _scaled(layer: nn.Linear, num_heads: int) -> nn.Linear:
    """With the scale of the attention's scores, E^-0.5."""
    scale = (layer.out_features / num_heads) ** -0.5
    return linear(layer.weight * scale, layer.bias * scale)


def _slopes(relu: DynamicReLU, order: Tensor) -> tuple[nn.Linear, nn.Linear]:
    """What gives t1 / 3 and t2 / 3 of the channels in `order`.

    a1 = 2 hsig(t1) = 1 + clamp(t1 / 3, -1, 1) and a2 = 2 hsig(t2) - 1 = clamp(t2 / 3, -1, 1).
    """
    expand = relu.expand
    rows = order, len(order) + order
    first, second = (linear(expand.weight[index] / 3, expand.bias[index] / 3) for index in rows)
    return first, second
