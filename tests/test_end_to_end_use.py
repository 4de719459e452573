"""The end-to-end detector in use: what padding may change, what it answers and what it learns from."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from end_to_end_support import PRESETS, images, small, target

from mobileformer.detection.boxes import to_corners
from mobileformer.detection.end_to_end import EndToEnd
from mobileformer.detection.former_head import Predictions
from mobileformer.detection.set_loss import get_preset, set_loss

# Without the compiled library the model runs on the reference and says so; the numbers are the same.
pytestmark = pytest.mark.filterwarnings("ignore::mf_kernels.KernelFallbackWarning")


def test_answers_do_not_depend_on_padding() -> None:
    """Alone, in a list with larger ones, in a padded tensor with anything in the padding."""
    model = small()
    given = [images(3, 96, 128, seed=1), images(3, 67, 90, seed=2), images(3, 96, 128, seed=3)]
    with torch.no_grad():
        alone = [model([image])[0] for image in given]
        together = model(given)
        padded = torch.full((3, 3, 131, 150), 9.0)
        for image, room in zip(given, padded, strict=True):
            room[:, : image.shape[1], : image.shape[2]] = image
        in_tensor = model(padded, sizes=torch.tensor([image.shape[1:] for image in given]))
    for expected, *others in zip(alone, together, in_tensor, strict=True):
        for other in others:
            for key in expected:
                torch.testing.assert_close(other[key], expected[key], rtol=0, atol=1e-4 if key == "boxes" else 1e-5)


def test_predictions_of_a_padded_batch() -> None:
    """Those of an image depend on the size that it is padded to, not on what else is there nor on what pads it."""
    model = small()
    x, sizes = images(2, 3, 96, 128), [(96, 128), (70, 50)]
    filled = x.clone()
    filled[1, :, 70:], filled[1, :, :, 50:] = math.nan, math.nan
    with torch.no_grad():
        both = model.predictions(filled, sizes)
        for index, size in enumerate(sizes):
            for ours, alone in zip(both, model.predictions(x[index : index + 1], [size]), strict=True):
                torch.testing.assert_close(ours[index], alone[0], rtol=0, atol=1e-5)
        assert (model.predictions(x[1:]).logits - both.logits[1]).abs().max() > 1e-2  # as if it were larger
        attention, _ = model.head.attention(*model._read(filled, sizes))
    rows, columns = math.ceil(70 / 8), math.ceil(50 / 8)
    assert attention[1, :, rows:].abs().max() == attention[1, :, :, columns:].abs().max() == 0
    torch.testing.assert_close(attention.sum((2, 3)), torch.ones(2, 20))


@pytest.mark.parametrize("preset", PRESETS)
def test_answers(preset: str) -> None:
    model = small(preset=preset, detections=15)
    x = images(2, 3, 64, 96)
    with torch.no_grad():
        answers, (logits, boxes) = model(x), model.predictions(x)
        more = small(preset=preset)(x)
    # A softmax gives each of the 20 queries one class, sigmoids each of 7 classes to any of them
    assert [len(answer["scores"]) for answer in more] == [20 if preset == "detr" else 100] * 2
    for index, answer in enumerate(answers):
        scores = logits[index].softmax(-1)[:, :-1] if preset == "detr" else logits[index].sigmoid()
        ranked = scores.max(-1).values if preset == "detr" else scores.flatten()
        torch.testing.assert_close(answer["scores"], ranked.sort(descending=True).values[:15])
        query = (scores == answer["scores"][0]).nonzero()[0]
        assert answer["labels"][0] == query[1]
        in_pixels = to_corners(boxes[index, query[0]]) * torch.tensor([96.0, 64, 96, 64])
        limits = torch.tensor([96.0, 64, 96, 64])
        torch.testing.assert_close(answer["boxes"][0], in_pixels.clamp(min=torch.zeros(4), max=limits))
        assert (answer["boxes"] >= 0).all()
        assert (answer["boxes"] <= limits).all()
        assert (answer["boxes"].shape, answer["labels"].dtype) == ((15, 4), torch.int64)


def test_where_queries_look() -> None:
    model = small()
    given = [images(3, 64, 96), images(3, 70, 64, seed=1)]
    for image, seen in zip(given, model.attention_points(given), strict=True):
        rows, columns = (math.ceil(side / 8) for side in image.shape[1:])
        assert seen["attention"].shape == (20, rows, columns)
        torch.testing.assert_close(seen["attention"].sum((1, 2)), torch.ones(20))
        assert seen["points"].shape == (20, 2)
        assert (seen["points"] <= torch.tensor([image.shape[2], image.shape[1]])).all()
        with torch.no_grad():
            (answer,) = model([image])
        order = seen["scores"].argsort(descending=True)
        torch.testing.assert_close(seen["scores"][order], answer["scores"])
        torch.testing.assert_close(seen["boxes"][order], answer["boxes"])


@pytest.mark.parametrize("preset", PRESETS)
def test_a_few_steps_lower_the_loss(preset: str) -> None:
    model = small(lively=False, preset=preset).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x = images(2, 3, 64, 64)
    targets = [target((8, 8, 40, 30), labels=[2]), target((20, 30, 60, 60), (1, 1, 20, 20), labels=[0, 6])]
    totals = []
    for _ in range(8):
        losses = model(x, targets)
        assert set(losses) == {"class", "box", "giou"}
        total = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < 0.9 * totals[0]
    raw = model(x)
    assert (raw.logits.shape, raw.boxes.shape) == ((4, 2, 20, 8 if preset == "detr" else 7), (4, 2, 20, 4))


@pytest.mark.parametrize("preset", PRESETS)
def test_losses_without_objects_and_with_too_many(preset: str) -> None:
    model = small(lively=False, preset=preset).train()
    x = images(2, 3, 64, 64)
    losses = model(x, [target(), target()])
    assert all(bool(loss.isfinite()) for loss in losses.values())
    assert losses["box"] == losses["giou"] == 0 < losses["class"]
    sum(losses.values()).backward()
    # More than there are queries: all queries are matched, the rest finds none
    many = target(*[(i, i, i + 20.0, i + 9.0) for i in range(33)], labels=[i % 7 for i in range(33)])
    losses = model(x, [many, target()])
    assert all(bool(loss.isfinite()) for loss in losses.values())


def test_the_losses_are_sums_over_the_sets_and_means_over_the_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 2, 20, 8, generator=generator)
    boxes = torch.rand(3, 2, 20, 4, generator=generator)
    targets = [target((10, 20, 60, 70), (1, 2, 30, 9), labels=[3, 4]), target((0, 0, 9, 9), labels=[0])]
    sizes = torch.tensor([(80, 100), (40, 40)])
    for name in PRESETS:
        preset = get_preset(name)
        kinds = logits[..., : preset.outputs(7)]
        whole = set_loss(kinds, boxes, targets, sizes, preset)
        parts = [set_loss(kinds[i : i + 1], boxes[i : i + 1], targets, sizes, preset) for i in range(3)]
        for key, loss in whole.items():
            torch.testing.assert_close(loss, sum(part[key] for part in parts))
        twice = set_loss(kinds.repeat(1, 2, 1, 1), boxes.repeat(1, 2, 1, 1), targets * 2, sizes.repeat(2, 1), preset)
        torch.testing.assert_close(twice, whole)  # of twice as many objects
        # Another process has seven objects: the mean is five
        with monkeypatch.context() as patch:
            patch.setattr(torch.distributed, "is_initialized", lambda: True)
            patch.setattr(torch.distributed, "get_world_size", lambda: 2)
            patch.setattr(torch.distributed, "all_reduce", lambda count: count.add_(7))
            among = set_loss(kinds, boxes, targets, sizes, preset)
        torch.testing.assert_close(among["box"], whole["box"] * 3 / 5)
        torch.testing.assert_close(among["class"], whole["class"] * (1 if name == "detr" else 3 / 5))


def test_a_diverged_network_gives_a_loss_that_says_so() -> None:
    nothing = Predictions(torch.full((1, 1, 20, 8), math.nan), torch.full((1, 1, 20, 4), math.nan))
    losses = set_loss(*nothing, [target((1, 1, 9, 9), labels=[0])], torch.tensor([(9, 9)]), get_preset("detr"))
    assert all(bool(loss.isnan()) for loss in losses.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "yolo"}, "preset: expected one of detr, focal, got 'yolo'"),
        ({"width": 100}, "width: expected a multiple of 32, got 100"),
        ({"feature_width": 80}, "feature_width: expected a multiple of 32, got 80"),
        ({"depth": (1, 1)}, r"depth: expected 3 numbers, for strides 32, 16 and 8, got \(1, 1\)"),
        ({"depth": (1, 0, 1)}, "depth: expected an integer of at least 1, got 0"),
        ({"num_queries": 0}, "num_queries: expected an integer of at least 1, got 0"),
        ({"dropout": 1.0}, r"dropout: expected a number in \[0, 1\), got 1.0"),
        ({"variant": "27m"}, "variant: expected one of 26m"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        EndToEnd(**{"variant": "26m", "num_classes": 3} | arguments)


def test_wrong_targets() -> None:
    model = small()
    x = images(1, 3, 64, 64)
    model.train()
    for wrong, message in [
        ([target((1, 2, 3, 4), labels=[7])], r"targets\[0\]\['labels'\]\[0\]: expected 0 to 6, got 7"),
        ([target((5, 2, 3, 4), labels=[0])], r"targets\[0\]\['boxes'\]\[0\]: expected finite"),
        ([target(), target()], "targets: expected a list of 1"),
    ]:
        with pytest.raises(ValueError, match=f"^{message}"):
            model(x, wrong)


def test_without_scipy_training_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    model = small().train()
    with pytest.raises(ImportError, match=r"^scipy is not installed: pip install 'mobileformer\[detection\]'$"):
        model(images(1, 3, 64, 64), [target((1, 1, 9, 9), labels=[0])])


def test_an_image_that_is_not_finite_has_no_answer() -> None:
    model = small()
    with pytest.raises(ValueError, match=r"^images: expected what gives finite scores and boxes, got NaN"):
        model(torch.full((1, 3, 64, 64), torch.nan))
