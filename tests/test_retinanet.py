"""RetinaNet: the published counts, what fused and plain compute, padding, losses against torchvision's, wrong input."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from detection_support import add_small, some_targets, torchvision_ops
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mf_kernels import record_kernels
from mobileformer import Model
from mobileformer.detection import RawPredictions, RetinaNet
from mobileformer.detection.anchors import ANCHORS, BACKGROUND, UNDECIDED, anchors_on, decode, encode, match
from mobileformer.detection.losses import sigmoid_focal_loss
from mobileformer.measure.difference import LOGIT_BOUNDS, difference, lively_weights_

Settings = dict[str, Any]
# As for images of 128 pixels
TINY: Settings = {"width": 96, "head_depth": 2, "levels": 3, "norm": "group", "anchor_scale": 2.0}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    add_small(monkeypatch)


def lively(variant: str, *, double: bool = True, **settings: Any) -> RetinaNet:
    """A detector of 5 classes that every part moves, and whose scores lie on both sides of the threshold."""
    model = RetinaNet(variant, 5, **{"width": 16, "head_depth": 1} | settings)
    lively_weights_(model)
    with torch.no_grad():
        model.class_head.predict.bias.fill_(-2)  # type: ignore[union-attr]
    return model.double().eval() if double else model.eval()


def some_images(*sizes: tuple[int, int], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, *size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


# Counts and construction


@pytest.mark.parametrize(
    ("variant", "millions", "giga"),
    [("151m", 14.39, 160.8), ("214m", 15.22, 162.0), ("294m", 16.09, 163.7), ("508m", 17.97, 168.2)],
)
def test_parameters_and_multiply_adds_are_the_published_ones(variant: str, millions: float, giga: float) -> None:
    with torch.device("meta"):
        model, x = RetinaNet(variant, 80), torch.empty(1, 3, 800, 1344)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        logits, boxes = model.eval().predict_raw(x)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)
    assert counter.get_total_flops() / 2e9 == pytest.approx(giga, abs=0.05)
    assert (logits.shape, boxes.shape) == ((1, 201_600, 80), (1, 201_600, 4))


def test_what_is_built_is_what_was_asked_for() -> None:
    torch.manual_seed(0)
    model = RetinaNet("26m", 7, in_chans=1, spatial_dynamic_relu=True, use_fused=False, **TINY)
    assert (model.variant, model.num_classes, model.in_chans) == ("26m", 7, 1)
    assert (model.spatial_dynamic_relu, model.use_fused, model.strides) == (True, False, (8, 16, 32))
    convolutions = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    assert len([name for name in convolutions if name.startswith("class_head.tower")]) == 2
    heads = torch.cat([module.weight.flatten() for name, module in convolutions.items() if "_head" in name])
    assert heads.std().item() == pytest.approx(0.01, rel=0.01)
    assert {module.num_groups for module in model.modules() if isinstance(module, nn.GroupNorm)} == {12}
    logits, _ = model.eval().predict_raw(torch.randn(1, 1, 64, 64))
    assert logits.sigmoid().mean().item() == pytest.approx(0.01, rel=0.05)  # -log(99)
    assert model.box_head.predict.bias is not None
    assert not model.box_head.predict.bias.any()


def test_a_classifier_s_weights_are_the_backbone_s() -> None:
    classifier, detector = Model("52m", num_classes=3), RetinaNet("52m", 4, **TINY)
    own = detector.backbone.state_dict()
    detector.backbone.load_state_dict({key: value for key, value in classifier.state_dict().items() if key in own})
    assert torch.equal(detector.backbone.tokens, classifier.tokens)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "27m"}, "variant: expected one of 26m"),
        ({"num_classes": 0}, "num_classes: expected an integer of at least 1, got 0"),
        ({"width": 0}, "width: expected an integer of at least 1, got 0"),
        ({"head_depth": 0}, "head_depth: expected an integer"),
        ({"detections": 1.5}, "detections: expected an integer"),
        ({"levels": 4}, r"levels: expected 3 \(P3 to P5\) or 5 \(P3 to P7\), got 4"),
        ({"norm": "batch"}, "norm: expected '' or 'group', got 'batch'"),
        ({"norm": "group", "width": 20}, "width: expected a multiple of 8 with norm 'group', got 20"),
        ({"anchor_scale": 0.0}, "anchor_scale: expected a positive number, got 0.0"),
        ({"score_threshold": 1.0}, r"score_threshold: expected a number in \[0, 1\), got 1.0"),
        ({"nms_threshold": math.nan}, r"nms_threshold: expected a number in \[0, 1\), got nan"),
    ],
)
def test_wrong_settings_are_named(settings: Settings, message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        RetinaNet(**{"variant": "26m", "num_classes": 3} | settings)


# Fused and plain


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("variant", ["26m", "small"])
def test_fused_and_plain_are_the_same_in_float64(variant: str, training: bool) -> None:
    """At an odd size: raw predictions, losses, the gradient of every parameter."""
    images, targets = torch.stack(some_images((70, 99), (70, 99), (70, 99))), some_targets(3, 64, 5)
    results, gradients = [], []
    for use_fused in (True, False):
        model = lively(variant, use_fused=use_fused).train(training)
        with torch.no_grad(), record_kernels() as record:
            raw = model.predict_raw(images)
        assert any(":native" in kernel for kernel in record.counts) == use_fused
        losses = model(images, targets)
        torch.stack(list(losses.values())).sum().backward()
        results.append([*raw, *losses.values()])
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(gradient is not None for gradient in gradients[0].values())
    for fused, plain in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-7, atol=1e-9)


def test_fused_predictions_in_float32_are_within_rounding() -> None:
    (image,) = some_images((96, 128))
    with torch.no_grad():
        exact = lively("52m", use_fused=False).predict_raw(image[None])
        fused = lively("52m", double=False).predict_raw(image[None].float())
    for actual, truth in zip(fused, exact, strict=True):
        assert difference(actual, truth).relative < LOGIT_BOUNDS["inference"][torch.float32]


def with_parameters_of(source: nn.Module, target: nn.Module) -> nn.Module:
    """Both have them in one order."""
    with torch.no_grad():
        for own, given in zip(target.parameters(), source.parameters(), strict=True):
            own.copy_(given)
    return target


def test_pyramid_and_heads_are_torchvision_s() -> None:
    """At sizes that are not halves of each other."""
    ops = torchvision_ops()
    from torchvision.models.detection.retinanet import RetinaNetHead

    model = lively("small", double=False, head_depth=4)
    maps = [torch.randn(2, channels, *size) for channels, size in ((12, (25, 13)), (16, (13, 7)), (24, (7, 4)))]
    levels = model.pyramid(maps)
    pyramid = ops.FeaturePyramidNetwork([12, 16, 24], 16)
    lower = nn.ModuleList([model.pyramid.lateral, model.pyramid.output])
    expected = list(with_parameters_of(lower, pyramid)({str(i): x for i, x in enumerate(maps)}).values())
    for convolution in model.pyramid.coarser:
        expected.append(nn.functional.conv2d(expected[-1], convolution.weight, convolution.bias, 2, 1))
    torch.testing.assert_close(levels, expected)
    assert [tuple(level.shape[2:]) for level in levels] == [(25, 13), (13, 7), (7, 4), (4, 2), (2, 1)]
    heads = nn.ModuleList([model.class_head, model.box_head])
    outputs = with_parameters_of(heads, RetinaNetHead(16, ANCHORS, 5))(levels)
    torch.testing.assert_close(model.class_head(levels), outputs["cls_logits"])
    torch.testing.assert_close(model.box_head(levels), outputs["bbox_regression"])


# Anchors, matching, displacements, losses


@pytest.mark.parametrize("scale", [2.0, 4.0])
def test_anchors_are_torchvision_s_before_it_rounds_them(scale: float) -> None:
    torchvision_ops()
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.image_list import ImageList

    maps = [(8, 12), (4, 6), (2, 3)]
    anchors, centres = anchors_on(maps, (8, 16, 32), scale, like=torch.empty(0))
    sizes = tuple(tuple(stride * scale * 2 ** (i / 3) for i in range(3)) for stride in (8, 16, 32))
    generator = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 3)  # type: ignore[arg-type]
    images = ImageList(torch.zeros(1, 3, 64, 96), [(64, 96)])
    (expected,) = generator(images, [torch.zeros(1, 1, *size) for size in maps])
    middle = centres.repeat(1, 2)
    assert torch.equal((anchors - middle).round() + middle, expected)


def test_an_odd_size_has_its_anchors_at_the_stride() -> None:
    anchors, centres = anchors_on([(3, 2)], (8,), 4.0, like=torch.empty(0, dtype=torch.float64))
    assert (len(anchors), centres.dtype) == (6 * ANCHORS, torch.float64)
    assert centres[::ANCHORS].tolist() == [[0, 0], [8, 0], [0, 8], [8, 8], [0, 16], [8, 16]]
    assert torch.allclose((anchors[:, :2] + anchors[:, 2:]) / 2, centres)
    sides = anchors[:ANCHORS, 2:] - anchors[:ANCHORS, :2]
    expected = [(32 * 2 ** (i / 3)) ** 2 for i in range(3)] * 3
    assert sides.prod(1).tolist() == pytest.approx(expected)
    assert (sides[:, 1] / sides[:, 0]).tolist() == pytest.approx([0.5] * 3 + [1] * 3 + [2] * 3)


def test_what_each_anchor_learns() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60], [200, 200, 210, 210]])
    anchors = torch.tensor(
        [[0.0, 0, 10, 9], [0, 0, 10, 4.5], [0, 0, 10, 3.9], [50, 50, 80, 80], [50, 50, 90, 90], [90, 90, 99, 99]]
    )
    # of the second box the best that there is, 1/9; nothing overlaps the third
    assert match(boxes, anchors).tolist() == [0, UNDECIDED, BACKGROUND, 1, BACKGROUND, BACKGROUND]
    assert match(boxes[:0], anchors).tolist() == [BACKGROUND] * 6


def test_displacements_are_each_other_s_reverse_and_bounded() -> None:
    anchors, _ = anchors_on([(5, 7)], (16,), 4.0, like=torch.empty(0, dtype=torch.float64))
    boxes = anchors.roll(17, 0) * 1.1 + 3
    torch.testing.assert_close(decode(encode(boxes, anchors), anchors), boxes)
    grown = decode(torch.full((1, 4), 50.0), torch.tensor([[0.0, 0, 16, 16]]))
    assert (grown[0, 2:] - grown[0, :2]).tolist() == pytest.approx([1000, 1000])


def test_matching_and_losses_are_torchvision_s() -> None:
    ops = torchvision_ops()
    from torchvision.models.detection._utils import Matcher
    from torchvision.models.detection.retinanet import RetinaNetHead

    images, targets = torch.stack(some_images(*[(96, 128)] * 4)), some_targets(4, 96, 5)
    model = lively("small", levels=3, anchor_scale=2.0)
    logits, displacements, sizes = model._heads(images)
    anchors, _ = anchors_on(sizes, model.strides, 2.0, like=logits)
    matcher = Matcher(0.5, 0.4, allow_low_quality_matches=True)
    truth = [{"boxes": target["boxes"].double(), "labels": target["labels"]} for target in targets]
    matched = [torch.full((len(anchors),), BACKGROUND)]  # torchvision asks for a box before it asks its matcher
    matched += [matcher(ops.box_iou(target["boxes"], anchors)) for target in truth[1:]]
    for target, expected in zip(truth, matched, strict=True):
        assert torch.equal(match(target["boxes"], anchors), expected)
    assert sum((row >= 0).sum() for row in matched) > 20
    head = RetinaNetHead(16, ANCHORS, 5)
    outputs = {"cls_logits": logits, "bbox_regression": displacements}
    expected = head.compute_loss(truth, outputs, [anchors] * 4, matched)  # type: ignore[arg-type]
    losses = model(images, targets)
    torch.testing.assert_close(losses["classification"], expected["classification"])
    torch.testing.assert_close(losses["boxes"], expected["bbox_regression"])


def test_the_focal_loss_is_its_equation_and_finite_far_out() -> None:
    logits = torch.tensor([-3.0, -0.5, 0.7, 4.0], dtype=torch.float64)
    for target in (0.0, 1.0):
        p = torch.where(torch.tensor(target) == 1, logits.sigmoid(), 1 - logits.sigmoid())
        expected = -(0.25 if target else 0.75) * (1 - p) ** 2 * p.log()
        torch.testing.assert_close(sigmoid_focal_loss(logits, torch.full_like(logits, target)), expected)
    far = torch.tensor([1e4, -1e4, 1e4, -1e4], requires_grad=True)
    loss = sigmoid_focal_loss(far, torch.tensor([0.0, 0, 1, 1]))
    loss.sum().backward()
    assert loss.tolist() == [7500, 0, 0, 2500]
    assert far.grad is not None
    assert far.grad.tolist() == [0.75, 0, 0, -0.25]


def test_images_without_boxes_have_finite_losses_and_every_gradient() -> None:
    model = lively("small", double=False).train()
    losses = model(some_images((64, 64), (40, 64), dtype=torch.float32), some_targets(1, 64, 5) * 2)
    assert list(losses) == ["classification", "boxes"]
    assert losses["classification"] > 0
    assert losses["boxes"] == 0
    sum(losses.values()).backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def test_it_learns_a_batch_by_heart() -> None:
    """And answers then what it was taught."""
    torch.manual_seed(0)
    model = RetinaNet("small", 3, **TINY | {"width": 32}).train()
    images = torch.stack(some_images((64, 64), (64, 64), dtype=torch.float32))
    targets = some_targets(3, 64, 3)[1:]
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    first = 0.0
    for _ in range(50):
        loss = sum(model(images, targets).values())
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2 * first
    for module in model.modules():  # the batch's own statistics, which have not settled
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            module.reset_running_stats()
    model(images)
    for answer, target in zip(model.eval()(images), targets, strict=True):
        count = len(target["boxes"])
        assert sorted(answer["labels"][:count].tolist()) == sorted(target["labels"].tolist())
        distance = torch.cdist(answer["boxes"][:count], target["boxes"], p=math.inf).amin(0)
        assert distance.max() < 4
        assert (answer["scores"].diff() <= 0).all()


# Answers and padding


def test_answers_are_in_range_and_as_many_as_wanted() -> None:
    model = lively("small", detections=20)
    images = some_images((200, 328), (203, 331))
    with torch.no_grad():
        for image, answer in zip(images, model(images), strict=True):
            boxes, labels, scores = answer["boxes"], answer["labels"], answer["scores"]
            assert (len(boxes), labels.dtype) == (20, torch.int64)
            assert (boxes >= 0).all()
            assert (boxes[:, 2] <= image.shape[2]).all()
            assert (boxes[:, 3] <= image.shape[1]).all()
            assert (boxes[:, 2:] > boxes[:, :2]).all()
            assert set(labels.tolist()) <= set(range(5))
            assert (scores > 0.05).all()
            assert (scores.diff() <= 0).all()


def test_an_answer_is_the_raw_prediction_with_that_score() -> None:
    model = lively("small", nms_threshold=0.9)
    (image,) = some_images((96, 100))
    with torch.no_grad():
        (answer,) = model([image])
        logits, boxes = model.predict_raw(image[None])
    scores = logits[0].sigmoid()
    for box, label, score in zip(answer["boxes"], answer["labels"], answer["scores"], strict=True):
        anchor = (scores[:, label] - score).abs().argmin()
        assert scores[anchor, label] == score
        inside = boxes[0, anchor].clamp(min=0).minimum(torch.tensor([100, 96, 100, 96]))
        torch.testing.assert_close(box, inside)
    assert answer["scores"][0] == scores.max()


def test_nothing_above_the_threshold_is_an_empty_answer() -> None:
    (answer,) = RetinaNet("small", 5, width=16).eval()(torch.zeros(1, 3, 64, 64))
    assert (answer["boxes"].shape, answer["labels"].shape, answer["scores"].shape) == ((0, 4), (0,), (0,))


def same(actual: list[dict[str, Tensor]], expected: list[dict[str, Tensor]], bound: float) -> None:
    assert sum(len(answer["boxes"]) for answer in expected) > 20
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one["labels"], other["labels"])
        for key in ("boxes", "scores"):
            assert difference(one[key], other[key]).relative < bound


@pytest.mark.parametrize(
    ("variant", "dtype", "bound"),
    [("26m", torch.float64, 1e-9), ("small", torch.float64, 1e-9), ("small", torch.float32, 1e-5)],
)
def test_an_image_has_the_same_answer_in_every_batch(variant: str, dtype: torch.dtype, bound: float) -> None:
    """Alone, in a list with smaller and larger ones, in a batch that somebody padded, whatever the padding holds."""
    model = lively(variant).to(dtype)
    sizes = [(64, 96), (101, 75), (64, 96), (72, 130)]
    images = some_images(*sizes, dtype=dtype)
    padded = torch.full((4, 3, 160, 144), 7, dtype=dtype)
    for place, image in zip(padded, images, strict=True):
        place[:, : image.shape[1], : image.shape[2]] = image
    with torch.no_grad():
        alone = [model([image])[0] for image in images]
        same(model(images), alone, bound)
        same(model(padded, sizes=torch.tensor(sizes)), alone, bound)
        same(model(images[0][None]), alone[:1], bound)


def test_padding_brings_no_anchors_into_the_loss() -> None:
    """Where the padding is, wrong predictions cost nothing, and true boxes find the anchors that they find alone."""
    model = lively("small")
    images, targets = some_images((64, 96)), some_targets(4, 64, 5)[3:]
    padded = torch.zeros(1, 3, 160, 160, dtype=torch.float64)
    padded[0, :, :64, :96] = images[0]
    heads = model._heads

    def constant(x: Tensor) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
        logits, displacements, sizes = heads(x)
        return logits * 0 + 1.5, displacements * 0 + 0.1, sizes

    model._heads = constant  # type: ignore[method-assign]
    alone, batched = model(images, targets), model(padded, targets, torch.tensor([[64, 96]]))
    torch.testing.assert_close(alone, batched)
    whole = model(padded, targets)
    assert whole["classification"] > 1.5 * alone["classification"]


def test_without_targets_training_gives_raw_predictions_and_moves_statistics() -> None:
    model = lively("small", double=False).train()
    before = model.backbone.stem.norm.running_mean.clone()  # type: ignore[union-attr]
    logits, boxes = model(some_images((64, 96), (40, 50), dtype=torch.float32))
    assert logits.shape[0] == boxes.shape[0] == 2
    assert not torch.equal(before, model.backbone.stem.norm.running_mean)  # type: ignore[union-attr,arg-type]


def test_under_autocast_losses_and_answers_are_float32() -> None:
    model = lively("small", double=False)
    images = some_images((64, 64), (64, 64), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(images, some_targets(2, 64, 5))
        (answer, _) = model(images)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert (answer["boxes"].dtype, answer["scores"].dtype) == (torch.float32, torch.float32)
    exact = model(images, some_targets(2, 64, 5))
    assert losses["classification"].item() == pytest.approx(exact["classification"].item(), rel=0.1)


def test_checkpointing_changes_no_loss() -> None:
    model = lively("small").train()
    images, targets = some_images((64, 64), (64, 64)), some_targets(2, 64, 5)
    expected = model(images, targets)
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(images, targets), expected)


# Wrong input

IMAGE = torch.zeros(3, 64, 64)
BOX, LABEL = torch.tensor([[1.0, 2, 30, 40]]), torch.tensor([2])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([],), ValueError, "images: expected a tensor or a list of at least one image, got a list of 0"),
        (({"a": IMAGE},), ValueError, "images: expected a tensor or a list of at least one image, got dict"),
        ((["photo.jpg"],), TypeError, r"images\[0\]: expected a floating tensor, got str"),
        ((IMAGE,), ValueError, r"images: expected shape \(B, 3, H, W\), none of them 0, got \(3, 64, 64\)"),
        (
            (IMAGE[None][:0],),
            ValueError,
            r"images: expected shape \(B, 3, H, W\), none of them 0, got \(0, 3, 64, 64\)",
        ),
        (
            ([IMAGE, IMAGE[:1]],),
            ValueError,
            r"images\[1\]: expected shape \(3, H, W\), none of them 0, got \(1, 64, 64\)",
        ),
        (([IMAGE[:, :20]],), ValueError, r"images\[0\]: expected height and width of at least 32, got 20 x 64"),
        (([IMAGE.byte()],), TypeError, r"images\[0\]: expected a floating tensor, got torch.uint8 of shape"),
        (
            ([IMAGE, IMAGE.double()],),
            TypeError,
            r"images\[1\]: expected torch.float32 on cpu like the first image, got",
        ),
        (([IMAGE], None, torch.tensor([[64, 64]])), ValueError, "sizes: expected None beside a list of images"),
        ((IMAGE[None], None, torch.tensor([64, 64])), ValueError, r"sizes: expected shape \(1, 2\), got \(2,\)"),
        ((IMAGE[None], None, [[64, 64]]), TypeError, "sizes: expected an int64 tensor, got a list of 1"),
        ((IMAGE[None], None, torch.tensor([[64, 65]])), ValueError, r"sizes\[0\]: expected 32 to 64 rows and 32 to 64"),
        ((IMAGE[None] * math.nan,), ValueError, "images: expected what gives finite scores and boxes, got NaN"),
        (([IMAGE], []), ValueError, "targets: expected a list of 1, one for each image, got a list of 0"),
        (([IMAGE], {"boxes": BOX}), ValueError, "targets: expected a list of 1, one for each image, got dict"),
        (
            ([IMAGE], [{"boxes": BOX}]),
            ValueError,
            r"targets\[0\]: expected a dictionary with boxes and labels, got \['b",
        ),
        (([IMAGE], [BOX]), ValueError, r"targets\[0\]: expected a dictionary with boxes and labels, got Tensor"),
        (
            ([IMAGE], [{"boxes": BOX[0], "labels": LABEL}]),
            ValueError,
            r"\['boxes'\]: expected shape \(N, 4\), got \(4,\)",
        ),
        (
            ([IMAGE], [{"boxes": BOX.int(), "labels": LABEL}]),
            TypeError,
            r"\['boxes'\]: expected a floating tensor, got",
        ),
        (
            ([IMAGE], [{"boxes": BOX, "labels": LABEL[:0]}]),
            ValueError,
            r"\['labels'\]: expected shape \(1,\), got \(0,\)",
        ),
        (([IMAGE], [{"boxes": BOX, "labels": LABEL.int()}]), TypeError, r"\['labels'\]: expected an int64 tensor, got"),
        (([IMAGE], [{"boxes": BOX, "labels": LABEL + 3}]), ValueError, r"\['labels'\]\[0\]: expected 0 to 4, got 5"),
        (([IMAGE], [{"boxes": BOX, "labels": LABEL - 3}]), ValueError, r"\['labels'\]\[0\]: expected 0 to 4, got -1"),
        (([IMAGE], [{"boxes": BOX.flip(1), "labels": LABEL}]), ValueError, r"with x1 < x2 and y1 < y2, got \[40.0, 30"),
        (([IMAGE], [{"boxes": BOX * math.nan, "labels": LABEL}]), ValueError, r"expected finite \(x1, y1, x2, y2\)"),
        (
            ([IMAGE], [{"boxes": BOX + torch.tensor([0, 0, math.inf, 0]), "labels": LABEL}]),
            ValueError,
            r"\[0\]\['boxes'\]\[0\]: expected finite",
        ),
    ],
)
def test_wrong_input_is_named(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as told:
        lively("small", double=False)(*arguments)
    assert "\n" not in str(told.value)


def test_the_wrong_box_is_told_by_image_and_place() -> None:
    targets = some_targets(4, 64, 5)
    targets[3]["boxes"][1, 2] = 0
    with pytest.raises(ValueError, match=r"targets\[3\]\['boxes'\]\[1\]: expected finite"):
        lively("small", double=False)([IMAGE] * 4, targets)


def test_boxes_that_are_no_numbers_are_not_left_out_in_silence() -> None:
    model = lively("small", double=False)
    model.box_head.predict.bias.data.fill_(math.nan)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="images: expected what gives finite scores and boxes, got NaN"):
        model([IMAGE])


# Other runtimes


@pytest.mark.filterwarnings("ignore")  # of the exporter itself
def test_raw_predictions_are_those_of_onnx_runtime_and_openvino(tmp_path: Path) -> None:
    """Fused, at an odd size, any batch: what is exported has plain operators alone."""
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    openvino = pytest.importorskip("openvino")
    model, path = lively("small", double=False), str(tmp_path / "detector.onnx")
    x = torch.stack(some_images((72, 100), (72, 100), (72, 100), dtype=torch.float32))
    batch = ({0: torch.export.Dim("batch")},)
    with torch.no_grad():
        torch.onnx.export(
            RawPredictions(model),
            (x[:2],),
            path,
            dynamo=True,
            verbose=False,
            input_names=["images"],
            dynamic_shapes=batch,
        )
        expected = model.predict_raw(x)
    assert {node.domain for node in onnx.load(path).graph.node} == {""}
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.Core().compile_model(path, "CPU", options)
    for given in (session.run(None, {"images": x.numpy()}), compiled([x.numpy()]).to_tuple()):
        for actual, truth in zip(given, expected, strict=True):
            assert difference(torch.from_numpy(actual), truth).relative < LOGIT_BOUNDS["runtime"][torch.float32]
