"""RetinaNet: the backbone, a feature pyramid, and two heads that say of every anchor what it holds and where.

Legend: B images, H W height and width of the batch, F width of pyramid and heads, A anchors of all levels, K classes,
N boxes of one image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobileformer.detection.anchors import ANCHORS, BACKGROUND, UNDECIDED, anchors_on, decode, encode, match
from mobileformer.detection.boxes import clip, non_maximum_suppression
from mobileformer.detection.inputs import Images, Target, as_batch, check_targets
from mobileformer.detection.losses import sigmoid_focal_loss
from mobileformer.detection.on_backbone import OnBackbone, check_finite
from mobileformer.detection.pyramid import FeaturePyramid
from mobileformer.network.backbone import Backbone, check_at_least_one

__all__ = ["RetinaNet"]

_STRIDES = (8, 16, 32, 64, 128)  # of P3 to P7
_FROM_BACKBONE = 3  # of them are the backbone's maps
_GROUP = 8  # channels that GroupNorm takes together: the published 32 groups of 256 channels
_RARE = 0.01  # what every class of every anchor is given at first: most hold nothing
_CANDIDATES = 1000  # of one level that non-maximum suppression looks at


class RetinaNet(OnBackbone):
    """RetinaNet on a Mobile-Former backbone.

    ====================  =================================================================================
    argument              meaning
    ====================  =================================================================================
    variant               "26m" to "508m", of the backbone
    num_classes           K, at least 1
    in_chans              channels of the images
    width                 F, channels of pyramid and heads
    head_depth            convolutions of each head before its last
    levels                5: P3 to P7, strides 8 to 128; or 3: P3 to P5, for small images
    norm                  "": none in the heads, as published; "group": GroupNorm over 8 channels each behind
                          their convolutions, which then train faster from nothing
    anchor_scale          side of the smallest anchor over the stride: 4 for COCO, 2 for images of 128 pixels
    score_threshold       what scores less is no answer
    nms_threshold         of two boxes of one class with a larger IoU the one with the higher score is answered
    detections            answers for one image at most
    use_fused,            as `mobileformer.Model` has them, for the backbone
    drop_path_rate,
    spatial_dynamic_relu
    ====================  =================================================================================

    `model.backbone` is the Backbone, whose parameters have the names that a classifier's have: its state dict is the
    beginning of a classifier's. `model.arguments` has what the file of its weights tells besides variant, classes,
    channels and `spatial_dynamic_relu`.

    ==============================  =====================================================================
    call                            gives
    ==============================  =====================================================================
    model(images, targets)          {"classification", "boxes"}: losses to be added, in either mode
    model.eval()(images)            for each image {"boxes" (n,4) in its pixels, "labels" (n) int64,
                                    "scores" (n) falling, above score_threshold}
    model.train()(images)           `predict_raw` of the padded batch, by which running statistics are estimated
    model.predict_raw(x)            x (B,in_chans,H,W) -> logits (B,A,K), boxes (B,A,4), in either mode
    ==============================  =====================================================================

    `images` and `sizes` are those of `as_batch`, `targets` those of `check_targets`, both in
    `mobileformer.detection.inputs`. Predictions and losses are float32 at least, whatever autocast does inside.

    **Padding.** The tokens of the backbone read the whole map, so padding would change every number of an image, not
    those at its edge alone. Evaluation therefore never pads: images of one size are run together, those of another
    after them, each cut out of the batch to its own size. What is found in an image does not depend on what it was
    batched with (but for the rounding of another batch), nor on how it was padded. On a GPU, batches of one size are
    faster. In training a batch is one tensor, as BatchNorm wants it; anchors whose centres lie in the padding take no
    part in the loss, so that an image has the same anchors in every batch.

    **Loss**, of each image over its number of anchors that learn a box (at least 1), then the mean over images:
    sigmoid focal loss (alpha 0.25, gamma 2) of all anchors but the undecided ones, and the absolute error of the
    displacements of those that learn a box. Which anchor learns which box: `mobileformer.detection.anchors.match`.

    **Answers**: of each level the 1000 highest scores above the threshold, anchor by class; boxes are cut at the edge
    of the image, and those with nothing inside dropped; non-maximum suppression within each class.

    Initialisation: the heads' convolutions N(0, 0.01) with bias 0, and -log(99) for the classes, with which every
    score is 0.01; pyramid and backbone have their own.

    Raises ValueError or TypeError, in one line, for arguments out of range and for images or targets that do not fit;
    ValueError where scores or boxes are not finite (an image, or a weight, was not).
    Source: Lin et al., Focal Loss for Dense Object Detection, ICCV 2017; details as in torchvision's.
    """

    def __init__(
        self,
        variant: str,
        num_classes: int,
        *,
        in_chans: int = 3,
        width: int = 256,
        head_depth: int = 4,
        levels: int = 5,
        norm: str = "",
        anchor_scale: float = 4.0,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        detections: int = 100,
        use_fused: bool = True,
        drop_path_rate: float = 0.0,
        spatial_dynamic_relu: bool = False,
    ) -> None:
        super().__init__()
        check_at_least_one("num_classes", num_classes)
        check_at_least_one("width", width)
        check_at_least_one("head_depth", head_depth)
        check_at_least_one("detections", detections)
        if levels not in (_FROM_BACKBONE, len(_STRIDES)):
            raise ValueError(f"levels: expected 3 (P3 to P5) or 5 (P3 to P7), got {levels!r}")
        if norm not in ("", "group"):
            raise ValueError(f"norm: expected '' or 'group', got {norm!r}")
        if norm and width % _GROUP:
            raise ValueError(f"width: expected a multiple of {_GROUP} with norm 'group', got {width}")
        if not 0 < anchor_scale < math.inf:
            raise ValueError(f"anchor_scale: expected a positive number, got {anchor_scale!r}")
        _check_share("score_threshold", score_threshold)
        _check_share("nms_threshold", nms_threshold)
        self.arguments = {
            "width": width, "head_depth": head_depth, "levels": levels, "norm": norm, "anchor_scale": anchor_scale,
            "score_threshold": score_threshold, "nms_threshold": nms_threshold, "detections": detections,
        }  # fmt: skip
        self.num_classes = num_classes
        self.anchor_scale = anchor_scale
        self.score_threshold = score_threshold
        self.nms_threshold = nms_threshold
        self.detections = detections
        self.strides = _STRIDES[:levels]

        self.backbone = Backbone(
            variant,
            in_chans=in_chans,
            use_fused=use_fused,
            drop_path_rate=drop_path_rate,
            spatial_dynamic_relu=spatial_dynamic_relu,
        )
        channels = [stage.channels for stage in self.backbone.config.stages if stage.stride in _STRIDES]
        self.pyramid = FeaturePyramid(channels, width, levels - _FROM_BACKBONE)
        self.class_head = Head(width, head_depth, num_classes, norm, bias=-math.log((1 - _RARE) / _RARE))
        self.box_head = Head(width, head_depth, 4, norm, bias=0.0)

    def forward(
        self, images: Images, targets: Sequence[Target] | None = None, sizes: Tensor | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]] | tuple[Tensor, Tensor]:
        batch, own = as_batch(images, sizes, self.in_chans)
        if targets is not None:
            check_targets(targets, len(own), self.num_classes)
            return self._losses(batch, own, targets)
        return self.predict_raw(batch) if self.training else self._detect(batch, own)

    def predict_raw(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of every anchor the logits of the classes and the corners of the box, before anything is left out.

        x (B,in_chans,H,W) -> logits (B,A,K), boxes (B,A,4) in pixels, not cut at the edges. Levels come one after
        another, the finest first; in each, anchors as `anchors_on` has them.
        """
        logits, displacements, sizes = self._heads(x)
        anchors, _ = anchors_on(sizes, self.strides, self.anchor_scale, like=displacements)
        return logits, decode(displacements, anchors)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
        """Logits (B,A,K), displacements (B,A,4), height and width of each level."""
        maps, _ = self.backbone.maps(x)
        levels = self.pyramid(maps[-_FROM_BACKBONE:])
        logits, displacements = self.class_head(levels), self.box_head(levels)
        return _wide(logits), _wide(displacements), [(level.shape[2], level.shape[3]) for level in levels]

    def _losses(self, batch: Tensor, own: Sequence[tuple[int, int]], targets: Sequence[Target]) -> dict[str, Tensor]:
        logits, displacements, sizes = self._heads(batch)
        anchors, centres = anchors_on(sizes, self.strides, self.anchor_scale, like=displacements)
        classification, boxes = [], []
        for index, ((height, width), target) in enumerate(zip(own, targets, strict=True)):
            inside = (centres < centres.new_tensor([width, height])).all(1)
            true = target["boxes"].to(anchors)
            matched = torch.full_like(inside, UNDECIDED, dtype=torch.int64)
            matched[inside] = match(true, anchors[inside])
            learns = matched > BACKGROUND
            box = matched[learns]
            count = learns.sum().clamp(min=1)

            wanted = torch.zeros_like(logits[index])
            wanted[learns, target["labels"].to(box)[box]] = 1
            decided = matched != UNDECIDED
            classification.append(sigmoid_focal_loss(logits[index][decided], wanted[decided]).sum() / count)
            wanted = encode(true[box], anchors[learns])
            boxes.append(F.l1_loss(displacements[index][learns], wanted, reduction="sum") / count)
        return {"classification": torch.stack(classification).mean(), "boxes": torch.stack(boxes).mean()}

    def _detect(self, batch: Tensor, own: Sequence[tuple[int, int]]) -> list[dict[str, Tensor]]:
        answers: dict[int, dict[str, Tensor]] = {}
        for height, width in dict.fromkeys(own):
            members = [index for index, size in enumerate(own) if size == (height, width)]
            x = batch[members, :, :height, :width]
            logits, displacements, sizes = self._heads(x)
            anchors, _ = anchors_on(sizes, self.strides, self.anchor_scale, like=displacements)
            counts = [ANCHORS * rows * columns for rows, columns in sizes]
            for place, index in enumerate(members):
                answers[index] = self._select(logits[place].split(counts), displacements[place], anchors, height, width)
        return [answers[index] for index in range(len(own))]

    def _select(
        self, logits: Sequence[Tensor], displacements: Tensor, anchors: Tensor, height: int, width: int
    ) -> dict[str, Tensor]:
        """The answers for one image: logits of each level (A_level,K), displacements (A,4), anchors (A,4)."""
        scores, places, first = [], [], 0
        for level in logits:
            score = level.flatten().sigmoid()
            (place,) = (~(score <= self.score_threshold)).nonzero(as_tuple=True)  # NaN is among them
            score, best = score[place].topk(min(_CANDIDATES, len(place)))
            scores.append(score)
            places.append(place[best] + first)
            first += len(level) * self.num_classes
        score, place = torch.cat(scores), torch.cat(places)
        anchor, label = place // self.num_classes, place % self.num_classes
        boxes = decode(displacements[anchor], anchors[anchor])
        check_finite(score, boxes)
        boxes = clip(boxes, height, width)
        full = (boxes[:, 2:] > boxes[:, :2]).all(1)
        boxes, score, label = boxes[full], score[full], label[full]
        stays = non_maximum_suppression(boxes, score, label, self.nms_threshold)[: self.detections]
        return {"boxes": boxes[stays], "labels": label[stays], "scores": score[stays]}


class Head(nn.Module):
    """Convolutions and ReLU, shared by all levels: maps (B,F,H,W) each -> (B,A,outputs)."""

    def __init__(self, width: int, depth: int, outputs: int, norm: str, *, bias: float) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(depth):
            layers.append(nn.Conv2d(width, width, 3, padding=1, bias=not norm))
            if norm:
                layers.append(nn.GroupNorm(width // _GROUP, width))
            layers.append(nn.ReLU(inplace=True))
        self.tower = nn.Sequential(*layers)
        self.predict = nn.Conv2d(width, ANCHORS * outputs, 3, padding=1)
        self.outputs = outputs
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.predict.bias is not None:
            nn.init.constant_(self.predict.bias, bias)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        found = [self.predict(self.tower(level)).permute(0, 2, 3, 1) for level in levels]
        return torch.cat([y.reshape(y.shape[0], -1, self.outputs) for y in found], 1)


def _wide(x: Tensor) -> Tensor:
    """In float32 at least: pixels and logarithms of small probabilities need it."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _check_share(name: str, value: float) -> None:
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name}: expected a number in [0, 1), got {value!r}")
