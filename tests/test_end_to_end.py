"""The end-to-end detector: its size, its equations, how it starts, and that other runtimes compute the same."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from end_to_end_support import PRESETS, count, images, pair, small, target
from torch import Tensor, nn

import mobileformer.config
from mf_kernels import record_kernels, reference
from mobileformer import VARIANTS
from mobileformer.config import BlockConfig
from mobileformer.detection.end_to_end import EndToEnd
from mobileformer.detection.head_blocks import HeadBlock, MapBottleneck, MapEncoder, Place, Read, State, position_code
from mobileformer.detection.raw import RawPredictions
from mobileformer.measure.difference import difference

# Without the compiled library the model runs on the reference and says so; the numbers are the same.
pytestmark = pytest.mark.filterwarnings("ignore::mf_kernels.KernelFallbackWarning")

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


@pytest.mark.parametrize("variant", ["26m", "508m"])
def test_the_local_start(variant: str) -> None:
    """With nothing in the map yet, the first read of every scale and the last one look where their query lies."""
    torch.manual_seed(1)
    model = EndToEnd(variant, 3, 30 if variant == "26m" else 100, depth=(1, 1, 1), use_fused=False)
    points, head = model.head.points, model.head
    # A grid as wide as the root of their number, rounded up: 6 x 5 points, 10 x 10 points, row by row
    columns, rows = (6, 5) if variant == "26m" else (10, 10)
    grid = [((i % columns + 0.5) / columns, (i // columns + 0.5) / rows) for i in range(columns * rows)]
    torch.testing.assert_close(points.detach(), torch.tensor(grid))
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
                RawPredictions(model),
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
