"""The end-to-end detector: its size and equations, what padding may change, what it learns from, what it answers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mobileformer.config
from mf_kernels import record_kernels, reference
from mobileformer import VARIANTS
from mobileformer.config import BlockConfig
from mobileformer.detection.boxes import to_corners
from mobileformer.detection.end_to_end import EndToEnd
from mobileformer.detection.former_head import Predictions
from mobileformer.detection.head_blocks import HeadBlock, MapBottleneck, MapEncoder, Place, Read, State, position_code
from mobileformer.detection.set_loss import get_preset, set_loss
from mobileformer.measure.difference import difference, lively_weights_

# Without the compiled library the model runs on the reference and says so; the numbers are the same.
pytestmark = pytest.mark.filterwarnings("ignore::mf_kernels.KernelFallbackWarning")

SMALL: dict[str, Any] = {"num_queries": 20, "width": 64, "feature_width": 64, "depth": (1, 1, 1), "dropout": 0.0}
PRESETS = ["detr", "focal"]

# Parameters, and multiply-adds in units of 1e9 to the digits of the design: 800 x 1344 with slopes by position
TABLE = {
    "508m": (26_619_888, 40.56),
    "294m": (20_542_008, 24.93),
    "214m": (17_944_256, 18.66),
    "151m": (15_622_196, 13.37),
    "96m": (12_718_308, 12.26),
    "52m": (11_084_900, 8.01),
    "26m": (10_890_068, 7.50),
}
# Elsewhere: images of 800 x 1088, slopes from token 0
MORE = [("508m", 1088, True, 32.61), ("26m", 1088, True, 6.08), ("508m", 1344, False, 39.54)]


def small(variant: str = "26m", *, lively: bool = True, **kwargs: Any) -> EndToEnd:
    torch.manual_seed(0)
    model = EndToEnd(variant, 7, **SMALL | kwargs).eval()
    if lively:
        lively_weights_(model, seed=1)
    return model


def pair(dtype: torch.dtype, **kwargs: Any) -> tuple[EndToEnd, EndToEnd]:
    """The same weights, fused and plain."""
    fused = small(use_fused=True, **kwargs).to(dtype)
    plain = small(use_fused=False, **kwargs).to(dtype)
    plain.load_state_dict(fused.state_dict())
    return fused, plain


def images(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def target(*boxes: tuple[float, ...], labels: Sequence[int] = ()) -> dict[str, Tensor]:
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
    }


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def scores_again(variant: str, height: int, width: int) -> int:
    """Multiply-adds of `network.layers.token_mix`, which makes the bridge's scores anew; the design has them once."""
    config, stride, channels, products = VARIANTS[variant], 2, VARIANTS[variant].stem_channels, 0
    for block in config.blocks:
        if block.kind != "lite":
            products += config.num_tokens * channels * math.ceil(height / stride) * math.ceil(width / stride)
        stride, channels = stride * block.stride, block.out_channels
    return products


def on_meta(variant: str, **kwargs: Any) -> EndToEnd:
    with torch.device("meta"):
        return EndToEnd(variant, 91, use_fused=False, **kwargs).eval()


@pytest.mark.parametrize(
    ("variant", "width", "spatial", "expected"), [(name, 1344, True, row[1]) for name, row in TABLE.items()] + MORE
)
def test_parameters_and_multiply_adds(variant: str, width: int, spatial: bool, expected: float) -> None:
    counter = pytest.importorskip("torch.utils.flop_counter")
    model = on_meta(variant, spatial_dynamic_relu=spatial)
    assert count(model) == TABLE[variant][0]
    with torch.no_grad(), counter.FlopCounterMode(display=False) as counted:
        model.predictions(torch.empty(1, 3, 800, width, device="meta"))
    products = counted.get_total_flops() // 2 - (scores_again(variant, 800, width) if spatial else 0)
    assert round(products / 1e9, 2) == expected


def test_parameters_by_part() -> None:
    model = on_meta("508m")
    head = model.head
    coarse, middle, fine = (cast(list[HeadBlock], list(cast(nn.ModuleList, stage))) for stage in head.stages)
    assert [len(coarse), len(middle), len(fine)] == [5, 2, 2]
    assert count(model.backbone) == 8_429_000
    assert (count(head.inputs), count(head.ups)) == (126_464, 137_728)
    assert {count(block) for block in coarse} == {2_434_304}
    assert [count(block) for block in (*middle, *fine)] == [1_393_152] * 3 + [1_393_152 - 131_584]
    block = coarse[0]
    parts = [block.read, block.former, block.mobile, block.write, block.adapt, middle[0].mobile]
    assert [count(cast(nn.Module, part)) for part in parts] == [197_888, 658_176, 1_315_072, 131_584, 131_584, 273_920]
    assert [count(part) for part in (head.read, head.classes, head.box)] == [132_096, 23_644, 132_612]
    assert head.position.numel() == 25_600
    assert head.reference is not None
    assert head.reference.numel() == 200


def test_the_tiny_setting_has_three_and_a_half_million_parameters() -> None:
    tiny = EndToEnd("26m", 10, 30, width=128, hidden=1024, depth=(2, 1, 1), dropout=0.0, preset="focal")
    assert (tiny.head.channels, round(count(tiny) / 1e6, 2)) == (96, 3.52)


def test_the_position_code() -> None:
    """32 numbers at row 3 of 7 and column 1 of 4, as the equation has them."""
    code = position_code(torch.tensor((3 + 0.5) / 7, dtype=torch.float64), torch.tensor(1.5 / 4, dtype=torch.float64))
    waves = [math.pi * 2 ** (4 * k / 7) for k in range(8)]
    y, x = 3.5 / 7, 1.5 / 4
    expected = [wave(angle * w) for angle in (y, x) for wave in (math.sin, math.cos) for w in waves]
    np.testing.assert_allclose(code.numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("encodes", [True, False])
def test_a_block_is_its_equations(encodes: bool) -> None:
    """Against the reference of the bridges, PyTorch's own multi-head attention and layers called one by one."""
    model = small(use_fused=False).double()
    block = cast(HeadBlock, model.head.stages[0 if encodes else 1][0])  # pyright: ignore[reportIndexIssue]
    x, f, p, code = (images(2, *shape, dtype=torch.float64) for shape in [(64, 5, 6), (20, 64), (20, 64), (64, 5, 6)])
    with torch.no_grad():
        out = block(State(x, f, p), Place(code, None))

        read, former, mobile, write = block.read, block.former, block.mobile, block.write
        z = f + p
        gathered = reference.mobile_to_former(x + code, read.query(z), num_heads=2)
        gate = 2 * (cast(nn.Linear, read.gate)(z) + 3).clamp(0, 6) / 6
        f = read.norm(f + read.project(gathered * gate))

        def attention(query: Tensor, key: Tensor, value: Tensor, project: nn.Linear) -> Tensor:
            width, one = query.shape[2], torch.eye(query.shape[2], dtype=query.dtype)
            inputs = (query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), width, width // 32)
            given = F.multi_head_attention_forward(
                *inputs,
                in_proj_weight=None,
                in_proj_bias=None,
                bias_k=None,
                bias_v=None,
                add_zero_attn=False,
                dropout_p=0.0,
                out_proj_weight=project.weight,
                out_proj_bias=project.bias,
                need_weights=False,
                use_separate_proj_weight=True,
                q_proj_weight=one,
                k_proj_weight=one,
                v_proj_weight=one,
            )
            return given[0].transpose(0, 1)

        def feed_forward(layers: Any, y: Tensor) -> Tensor:
            inner = F.gelu(F.linear(y, layers.expand.weight, layers.expand.bias))
            return layers.norm(y + layers.contract(inner))

        f = former.norm(f + attention(former.query(f + p), f + p, f, former.project))
        f = feed_forward(former.feed_forward, f)
        if encodes:
            assert isinstance(mobile, MapEncoder)
            flat, placed = (t.flatten(2).transpose(1, 2) for t in (x, x + code))
            given = attention(mobile.query(placed), mobile.key(placed), mobile.value(flat), mobile.project)
            x = feed_forward(mobile.feed_forward, mobile.norm(flat + given)).transpose(1, 2).reshape(x.shape)
        else:
            assert isinstance(mobile, MapBottleneck)
            inner = F.conv2d(x, mobile.expand.conv.weight, padding=1, groups=64)
            inner = F.relu6(mobile.expand.norm(inner))
            x = x + mobile.contract.norm(F.conv2d(inner, mobile.contract.conv.weight))
        x = reference.former_to_mobile(x + code, write.key(f + p), write.value(f), num_heads=2) - code
        adapt = cast(nn.Sequential, block.adapt)
        p = p + cast(nn.Linear, adapt[2])(F.relu(adapt[0](f)))
    for ours, equation in zip(out, (x, f, p), strict=True):
        assert difference(ours, equation).relative < 1e-12


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_fused_is_plain_in_evaluation(dtype: torch.dtype, bound: float) -> None:
    """Odd sizes; a map of 25 x 41 goes through the bridge's kernel by blocks of eight queries."""
    fused, plain = pair(dtype)
    x = images(2, 3, 200, 328, dtype=dtype)
    with torch.no_grad():
        for sizes in (None, [(200, 328), (167, 250)]):
            ours, theirs = fused.predictions(x, sizes), plain.predictions(x, sizes)
            assert ours.logits.shape == (2, 20, 8)
            for a, b in zip(ours, theirs, strict=True):
                assert difference(a, b).relative < bound
        maps, _ = fused.backbone.maps(x)
        with record_kernels() as record:
            fused.head(maps[:0:-1], None, every_set=False)
    # The blocks of strides 16 and 8 and the last read, each with 20 queries: 8 + 8 + 4
    served = {name.partition(":")[0]: number for name, number in record.counts.items()}
    assert served.get("mobile_to_former_fwd", served.get("mobile_to_former")) == 9


def test_fused_is_plain_in_training() -> None:
    """Losses of both presets and every gradient, of a batch with padding."""
    for preset in PRESETS:
        fused, plain = pair(torch.float64, preset=preset)
        x = [images(3, 96, 96, dtype=torch.float64), images(3, 65, 80, seed=1, dtype=torch.float64)]
        targets = [target((10, 10, 40, 50), (5, 20, 90, 60), labels=[1, 6]), target((0, 0, 30, 30), labels=[0])]
        losses = [model.train()(x, targets) for model in (fused, plain)]
        for name, ours in losses[0].items():
            assert difference(ours, losses[1][name]).relative < 1e-9
        for loss in losses:
            sum(loss.values()).backward()
        for (name, ours), theirs in zip(fused.named_parameters(), plain.parameters(), strict=True):
            assert ours.grad is not None, name
            scale = max(1.0, float(cast(Tensor, theirs.grad).abs().max()))
            assert difference(ours.grad, cast(Tensor, theirs.grad)).largest < 1e-8 * scale, name


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


@pytest.mark.parametrize("variant", ["26m", "508m"])
def test_the_local_start(variant: str) -> None:
    """With nothing in the map yet, the first read of every scale and the last one look where their query lies."""
    torch.manual_seed(1)
    model = EndToEnd(variant, 3, 30 if variant == "26m" else 100, depth=(1, 1, 1), use_fused=False)
    points, head = model.head.points, model.head
    content = torch.zeros_like(head.position)[None]
    for read, size in [(b.read, s) for b, s in zip(head._blocks(), [(7, 9), (14, 18), (28, 36)], strict=True)] + [
        (head.read, (25, 42))
    ]:
        x = torch.zeros(1, head.channels, *size)
        with torch.no_grad():
            shares = read.weights(State(x, content, head.position[None]), head._place(x, 8, None))
        place = shares[0].flatten(1).argmax(1)
        found = torch.stack([place % size[1], place // size[1]], 1)
        assert ((found + 0.5 - points * torch.tensor([size[1], size[0]])).abs() <= 1).all()
    # and what a box is told from is that point: with a zero net it is where the query lies
    last = cast(nn.Linear, head.box[-1])
    nn.init.zeros_(last.weight)
    torch.testing.assert_close(head._predict(content).boxes[0, :, :2], points)
    assert not cast(nn.Linear, cast(nn.Sequential, head._blocks()[0].adapt)[-1]).weight.any()


def test_the_plain_start() -> None:
    model = small(lively=False, local_init=False)
    assert "head.reference" not in model.state_dict()
    assert abs(float(model.head.position.detach().std()) - 1) < 0.1
    assert all(float(m.query.weight.detach().abs().max()) < 1 for m in model.modules() if isinstance(m, Read))
    assert count(small(lively=False)) - count(model) == 2 * 20


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
    with pytest.raises(ValueError, match=r"^targets: expected None in evaluation mode"):
        model(x, [target()])
    model.train()
    for wrong, message in [
        ([target((1, 2, 3, 4), labels=[7])], r"targets\[0\]\['labels'\]\[0\]: expected 0 to 6, got 7"),
        ([target((5, 2, 3, 4), labels=[0])], r"targets\[0\]\['boxes'\]\[0\]: expected finite"),
        ([target(), target()], "targets: expected a list of 1"),
    ]:
        with pytest.raises(ValueError, match=f"^{message}"):
            model(x, wrong)


def test_onnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In both runtimes, of the least backbone that has the three maps: exporters take a second for each block."""
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name)
    onnxruntime = pytest.importorskip("onnxruntime")
    openvino = pytest.importorskip("openvino")
    from mobileformer.export.job import quietly

    blocks = (
        BlockConfig("lite", 8, 2, stride=2),
        *[BlockConfig("down", c, 2, second_expansion=2, stride=2) for c in (8, 12, 16)],
    )
    least = dataclasses.replace(VARIANTS["26m"], name="least", blocks=blocks, token_dim=16, groups=2)
    monkeypatch.setattr(mobileformer.config, "VARIANTS", MappingProxyType(VARIANTS | {"least": least}))
    model = small("least", use_fused=False, width=32, feature_width=32, num_queries=5)
    x = images(1, 3, 64, 72)
    path = str(tmp_path / "detector.onnx")
    with torch.no_grad():
        expected = [part.numpy() for part in model.predictions(x)]
        with quietly():
            program = torch.onnx.export(
                model.for_export(),
                (x,),
                dynamo=True,
                verbose=False,
                input_names=["images"],
                output_names=["logits", "boxes"],
            )
        assert program is not None
        program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for found in (session.run(None, {"images": x.numpy()}), list(compiled([x.numpy()]).values())):
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
