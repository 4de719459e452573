"""The end-to-end detector: a Mobile-Former as backbone and another as head, no anchors, no suppression.

Legend: B images, H W height and width, C feature width, Q queries, D their width, S sets of predictions, K classes, K'
numbers of the class layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mobileformer.config import get_variant
from mobileformer.detection.boxes import clip, to_corners
from mobileformer.detection.former_head import FormerHead, Predictions
from mobileformer.detection.head_blocks import HEAD_WIDTH
from mobileformer.detection.inputs import Images, Target, as_batch, check_targets
from mobileformer.detection.on_backbone import OnBackbone, check_finite
from mobileformer.detection.set_loss import get_preset, set_loss
from mobileformer.network.backbone import Backbone, check_at_least_one, check_rate

__all__ = ["EndToEnd"]


class EndToEnd(OnBackbone):
    """Queries read the backbone's maps from coarse to fine and say, each of them, what is where, or that nothing is.

    ====================  ==============================================================================================
    argument              meaning
    ====================  ==============================================================================================
    variant               of the backbone: "26m", "52m", "96m", "151m", "214m", "294m" or "508m"
    num_classes           K, at least 1
    num_queries           Q: the most objects that an image can be told to have
    width                 D of the queries, a multiple of 32
    feature_width         C of the maps in the head, a multiple of 32. None: the channels of the backbone's last map,
                          rounded up to one
    hidden                width inside the feed-forward nets of the queries. None: 4 D
    depth                 blocks of the head at strides 32, 16 and 8, each at least 1
    preset                "detr": softmax with a class for "no object", matched and trained as DETR. "focal": a sigmoid
                          and a focal loss for each class, which short runs need. `set_loss.PRESETS` has the weights.
    dropout               of the head, in [0, 1)
    detections            most answers for an image
    local_init            queries begin on a grid, each looking around its own point, from which its box is told. False:
                          position N(0, 1), and no such point. Where a map is bare, its first reads look there; where
                          it is not, they look where its content draws them too.
    use_fused             True: fused operators, as the table below has them, BatchNorm folded in evaluation mode, maps
                          of the head in channels_last. False: plain PyTorch, the equations layer by layer. The same
                          state dict and numbers either way.
    spatial_dynamic_relu  of the backbone: slopes of dynamic ReLU for every position
    in_chans              channels of the images
    drop_path_rate        stochastic depth of the backbone, in [0, 1)
    ====================  ==============================================================================================

    What serves the head with `use_fused`, in evaluation mode on the CPU. One thread, AMD with AVX-512, images of
    256 x 256: 1.4 times as fast as plain PyTorch with 26m, 294m and 508m.

    ==================================  ================================================================================
    part                                served by
    ==================================  ================================================================================
    M->F, from 256 positions on         `mf_kernels.mobile_to_former`, whose kernel holds 8 tokens in registers: queries
                                        in blocks of 8, the numbers of which do not depend on each other
    M->F of small or padded maps,       PyTorch's scaled_dot_product_attention. F->M is a softmax over all queries,
    F->M, attention among queries and   which `mf_kernels.former_to_mobile` has for up to 8: in blocks it would need
    on the map                          their sums too. A third of the time of the equation on a map of 32 x 32.
    linear layers, 1 x 1 convolutions   oneDNN (`products`): half of the time, where MKL is slow
    depthwise convolutions, their norm  `mf_kernels.depthwise_conv2d`, `mf_kernels.fold_batch_norm`
    ==================================  ================================================================================

    Elsewhere, and where gradients are wanted: scaled_dot_product_attention, PyTorch's linear layers, and what
    `mf_kernels` serves of the convolutions. The reference serves a call of `mf_kernels` where no kernel does.

    What a call gives (`images` and `sizes`, `targets` as `inputs.as_batch` and `inputs.check_targets` have them):

    =======================  ===========================================================================================
    call                     result
    =======================  ===========================================================================================
    with targets             {"class", "box", "giou"}: losses, weighted, over all S sets; their sum is to be minimised
    training, without them   `Predictions` of all sets: logits (S,B,Q,K'), boxes (S,B,Q,4)
    evaluation               for each image {"boxes": (n,4) corners in its pixels, cut at its edges, "labels": (n)
                             int64, "scores": (n), falling}, n = min(detections, Q), or min(detections, Q K) with
                             "focal", where one query may answer for several classes
    =======================  ===========================================================================================

    An image with more objects than queries is trained as DETR does: Q of them are matched, the rest is not seen.

    Padding. In evaluation nothing of it is computed: images are run in groups of one size, without padding, so the
    answers of an image do not depend on what else is in the batch. Give images of one size together where speed
    counts. In training the batch is padded with zeros. The head knows the images' own sizes: positions are parts of
    the own extent, nothing attends to the padding, and maps are zero there where they enter a stage. The backbone does
    not: its tokens and convolutions see the zeros, as those of DETR do.

    Raises ValueError for an argument or a value out of range and for answers that are not finite, TypeError for a wrong
    dtype.
    Source: a re-design. Mobile-Former (CVPR 2022) reports such a detector, and nothing of its head was published.
    """

    def __init__(
        self,
        variant: str = "508m",
        num_classes: int = 91,
        num_queries: int = 100,
        *,
        width: int = 256,
        feature_width: int | None = None,
        hidden: int | None = None,
        depth: Sequence[int] = (5, 2, 2),
        preset: str = "detr",
        dropout: float = 0.1,
        detections: int = 100,
        local_init: bool = True,
        use_fused: bool = True,
        spatial_dynamic_relu: bool = True,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        hidden = 4 * width if hidden is None else hidden
        counts = {"num_classes": num_classes, "num_queries": num_queries, "detections": detections, "hidden": hidden}
        for name, value in counts.items():
            check_at_least_one(name, value)
        check_rate("dropout", dropout)
        stages = [stage for stage in reversed(get_variant(variant).stages) if stage.stride >= 8]
        channels = -(-stages[0].channels // HEAD_WIDTH) * HEAD_WIDTH if feature_width is None else feature_width
        for name, value in (("width", width), ("feature_width", channels)):
            check_at_least_one(name, value)
            if value % HEAD_WIDTH:
                raise ValueError(f"{name}: expected a multiple of {HEAD_WIDTH}, got {value}")
        if len(depth) != len(stages):
            raise ValueError(f"depth: expected {len(stages)} numbers, for strides 32, 16 and 8, got {tuple(depth)}")
        for count in depth:
            check_at_least_one("depth", count)
        self.arguments = {
            "num_queries": num_queries, "width": width, "feature_width": channels, "hidden": hidden,
            "depth": list(depth), "preset": preset, "dropout": dropout, "detections": detections,
            "local_init": local_init,
        }  # fmt: skip
        self.num_classes = num_classes
        self.num_queries = num_queries
        self.detections = detections
        self.preset = preset
        self._preset = get_preset(preset)
        self.backbone = Backbone(
            variant,
            in_chans=in_chans,
            use_fused=use_fused,
            drop_path_rate=drop_path_rate,
            spatial_dynamic_relu=spatial_dynamic_relu,
        )
        self.head = FormerHead(
            [stage.channels for stage in stages],
            channels=channels,
            width=width,
            hidden=hidden,
            num_queries=num_queries,
            num_outputs=self._preset.outputs(num_classes),
            depth=depth,
            dropout=dropout,
            local_init=local_init,
            class_bias=0.0 if self._preset.no_object else -math.log(99.0),  # a sigmoid starts with 1 in 100
            use_fused=use_fused,
        )

    def forward(self, images: Images, targets: Sequence[Target] | None = None, sizes: Tensor | None = None) -> Any:
        """Losses, predictions or answers: the class has the table."""
        x, own = as_batch(images, sizes, self.in_chans)
        if targets is not None:
            check_targets(targets, len(own), self.num_classes)
            return set_loss(*self.predictions(x, own, every_set=True), targets, torch.tensor(own), self._preset)
        if self.training:
            return self.predictions(x, own, every_set=True)
        answers: list[Any] = [None] * len(own)
        for places, group in _groups(x, own):
            for place, answer in zip(places, self._answers(self.predictions(group), own[places[0]]), strict=True):
                answers[place] = answer
        return answers

    def predict_raw(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B,in_chans,H,W) -> logits (B,Q,K'), boxes (B,Q,4) of the last set, (cx, cy, w, h) in parts of the image.

        What `RawPredictions` hands to exporters: in evaluation mode, and with `use_fused=False`, for other runtimes
        know none of `mf_kernels`' operators.
        """
        logits, boxes = self.predictions(x)
        return logits, boxes

    def predictions(
        self, x: Tensor, sizes: Sequence[tuple[int, int]] | None = None, *, every_set: bool = False
    ) -> Predictions:
        """What the queries say, with nothing chosen: logits (B,Q,K'), boxes (B,Q,4) of the last set, or all S sets.

        x (B,in_chans,H,W); `sizes` are B pairs (height, width) of the images in it, None where they fill it. Boxes are
        (cx, cy, w, h) in parts of each image.
        """
        return self.head(*self._read(x, sizes), every_set=every_set)

    @torch.no_grad()
    def attention_points(self, images: Images, sizes: Tensor | None = None) -> list[dict[str, Tensor]]:
        """Where each query looks at the end, for each image; queries in their own order, all of them.

        =========  =======  ==========================================================================
        key        shape    meaning
        =========  =======  ==========================================================================
        attention  (Q,h,w)  shares of sum 1 of the last read over the map of stride 8, mean over heads
        points     (Q,2)    (x, y) in pixels from which the query's box is told; the middle of the image
                            without `local_init`
        boxes      (Q,4)    corners in pixels, cut at the edges
        labels     (Q)      the likeliest class, int64
        scores     (Q)      how sure of it
        =========  =======  ==========================================================================
        """
        x, own = as_batch(images, sizes, self.in_chans)
        found: list[dict[str, Tensor]] = [{} for _ in own]
        for places, group in _groups(x, own):
            height, width = own[places[0]]
            attention, (logits, boxes) = self.head.attention(*self._read(group, None))
            scores, labels = self._preset.scores(logits).max(-1)
            points = self.head.points * self.head.points.new_tensor([width, height])
            for index, place in enumerate(places):
                found[place] = {
                    "attention": attention[index],
                    "points": points,
                    "boxes": _in_pixels(boxes[index], height, width),
                    "labels": labels[index],
                    "scores": scores[index],
                }
        return found

    def _read(
        self, x: Tensor, sizes: Sequence[tuple[int, int]] | None
    ) -> tuple[list[Tensor], Sequence[tuple[int, int]] | None]:
        """The maps, the coarsest first, and the sizes, None where no image has any padding."""
        height, width = x.shape[2:]
        if sizes is not None and all(own == (height, width) for own in sizes):
            sizes = None
        if sizes is not None:  # what lies in the padding of a given tensor is nobody's business
            own = torch.tensor(sizes, device=x.device)[:, :, None, None, None]
            inside = torch.arange(height, device=x.device)[:, None] < own[:, 0]
            x = x.masked_fill(~(inside & (torch.arange(width, device=x.device) < own[:, 1])), 0.0)
        maps, _ = self.backbone.maps(x)
        return maps[:0:-1], sizes

    def _answers(self, predictions: Predictions, size: tuple[int, int]) -> Iterator[dict[str, Tensor]]:
        scores, queries, labels = self._preset.best(predictions.logits, self.detections)
        check_finite(scores, predictions.boxes)
        for score, query, label, boxes in zip(scores, queries, labels, predictions.boxes, strict=True):
            yield {"boxes": _in_pixels(boxes[query], *size), "labels": label, "scores": score}


def _in_pixels(boxes: Tensor, height: int, width: int) -> Tensor:
    """(n,4) of (cx, cy, w, h) in parts -> corners in pixels, cut at the edges."""
    return clip(to_corners(boxes) * boxes.new_tensor([width, height, width, height]), height, width)


def _groups(x: Tensor, own: Sequence[tuple[int, int]]) -> Iterator[tuple[list[int], Tensor]]:
    """The images of each size, by their places in the batch, without padding."""
    for height, width in dict.fromkeys(own):
        places = [place for place, size in enumerate(own) if size == (height, width)]
        yield places, (x if len(places) == len(own) else x[places])[:, :, :height, :width]
