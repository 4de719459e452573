"""DETR as transformers has it, beside ours: its size, the pairs that its matcher finds, the parts of its loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mobileformer._torchvision import ensure_torchvision
from mobileformer.detection.matching import match
from mobileformer.detection.set_loss import get_preset, set_loss

pytestmark = pytest.mark.filterwarnings("ignore")  # of its own imports

SIZES = torch.tensor([(80, 100), (64, 48), (50, 50)])
CLASSES = 7


@pytest.fixture(scope="module")
def peer() -> object:
    """transformers' module of DETR's loss. It imports torchvision, which must have been made to load before."""
    pytest.importorskip("transformers")
    ensure_torchvision()
    from transformers.loss import loss_for_object_detection

    return loss_for_object_detection


def predictions(queries: int) -> tuple[Tensor, Tensor, list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Two sets of predictions for three images, the last without an object; targets as we and as they have them."""
    generator = torch.Generator().manual_seed(queries)
    logits = torch.randn(2, 3, queries, CLASSES + 1, generator=generator)
    boxes = torch.rand(2, 3, queries, 4, generator=generator) * 0.5 + 0.2
    ours, theirs = [], []
    for objects, (height, width) in zip((5, 3, 0), SIZES.tolist(), strict=True):
        centres = torch.rand(objects, 4, generator=generator) * 0.4 + 0.2
        labels = torch.randint(CLASSES, (objects,), generator=generator)
        low, high = centres[:, :2] - centres[:, 2:] / 2, centres[:, :2] + centres[:, 2:] / 2
        corners = torch.cat([low, high], 1) * torch.tensor([width, height, width, height])
        ours.append({"boxes": corners, "labels": labels})
        theirs.append({"boxes": centres, "class_labels": labels})
    return logits, boxes, ours, theirs


@pytest.mark.parametrize("queries", [20, 4])  # 4 are fewer than the objects of an image
def test_the_same_pairs_and_the_same_loss(peer: object, queries: int) -> None:
    logits, boxes, targets, their_targets = predictions(queries)
    matcher = peer.HungarianMatcher(class_cost=1, bbox_cost=5, giou_cost=2)  # type: ignore[attr-defined]
    preset = get_preset("detr")
    found = match(
        preset.matching(logits),
        boxes,
        [target["class_labels"] for target in their_targets],
        [target["boxes"] for target in their_targets],
        class_weight=preset.class_cost,
    )
    pairs = {tuple(row) for row in torch.stack(found, 1).tolist()}
    expected = {
        (index, image, int(query), int(thing))
        for index in range(2)
        for image, (rows, columns) in enumerate(
            matcher({"logits": logits[index], "pred_boxes": boxes[index]}, their_targets)
        )
        for query, thing in zip(rows, columns, strict=True)
    }
    assert pairs == expected
    assert len(pairs) == 2 * (min(queries, 5) + 3)

    criterion = peer.ImageLoss(matcher, CLASSES, 0.1, ["labels", "boxes"])  # type: ignore[attr-defined]
    outputs = [{"logits": logits[i], "pred_boxes": boxes[i]} for i in range(2)]
    theirs = criterion({**outputs[1], "auxiliary_outputs": outputs[:1]}, their_targets)
    ours = set_loss(logits, boxes, targets, SIZES, preset)
    for name, their_name, weight in (("class", "loss_ce", 1), ("box", "loss_bbox", 5), ("giou", "loss_giou", 2)):
        torch.testing.assert_close(ours[name], weight * (theirs[their_name] + theirs[f"{their_name}_0"]))


def test_the_same_focal_loss(peer: object) -> None:
    """Theirs is a mean over the queries, and is multiplied by their number where it is used."""
    logits, boxes, targets, their_targets = predictions(20)
    logits = logits[..., :CLASSES]
    preset = get_preset("focal")
    cost = preset.matching(logits)
    found = match(
        cost,
        boxes,
        [target["class_labels"] for target in their_targets],
        [target["boxes"] for target in their_targets],
        class_weight=2,
    )
    wanted = torch.zeros_like(logits)
    for index, image, query, thing in torch.stack(found, 1).tolist():
        wanted[index, image, query, their_targets[image]["class_labels"][thing]] = 1
    theirs = sum(
        peer.sigmoid_focal_loss(given, true, num_boxes=8) * 20  # type: ignore[attr-defined]
        for given, true in zip(logits, wanted, strict=True)
    )
    torch.testing.assert_close(set_loss(logits, boxes, targets, SIZES, preset)["class"], 2 * theirs)
    one = torch.tensor(0.3)
    positive, negative = (
        peer.sigmoid_focal_loss(one.view(1, 1), true.view(1, 1), 1) for true in torch.tensor([1.0, 0])
    )  # type: ignore[attr-defined]
    torch.testing.assert_close(preset.matching(one), positive - negative)


def test_the_size_of_detr(peer: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Published: 41.3 to 41.5 M parameters, 86 G multiply-adds as a mean over images; here by the counter of ours."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import DetrConfig, DetrForObjectDetection
    from transformers.models.detr import modeling_detr

    # Without padding there is no mask; whether there is any cannot be asked of a tensor without values.
    monkeypatch.setattr(modeling_detr, "create_bidirectional_mask", lambda **_: None)
    config = DetrConfig(use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, num_labels=91)
    with torch.device("meta"):
        model = DetrForObjectDetection(config).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == 41_524_768
    counted = {}
    for width in (1088, 1344):
        with torch.no_grad(), FlopCounterMode(display=False) as count:
            model(torch.empty(1, 3, 800, width, device="meta"))
        counted[width] = round(count.get_total_flops() / 2e9, 1)
    assert counted == {1088: 82.1, 1344: 101.8}
