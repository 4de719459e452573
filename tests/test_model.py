"""The model's own rules: variants, arguments, sizes, layouts, gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from golden_support import recipe_image, recipe_model
from tiny_support import tiny_variants
from torch import nn

import mf_kernels
import mobileformer
from mobileformer import VARIANTS, Model
from mobileformer.config import get_variant
from mobileformer.network.blocks import DownBlock, LiteBlock, SameBlock


@pytest.fixture
def tiny() -> Iterator[None]:
    """A test may make small networks."""
    with tiny_variants():
        yield


SMALL = pytest.mark.usefixtures("tiny")
SIZES = [(32, 32), (33, 47), (64, 35), (97, 61), (32, 161)]


def ceil_div(size: int, stride: int) -> int:
    return -(-size // stride)


# The table


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_parameter_counts_are_exact(variant: str) -> None:
    model = Model(variant)
    assert sum(p.numel() for p in model.parameters()) == VARIANTS[variant].num_parameters


def test_the_table_is_frozen() -> None:
    assert list(VARIANTS) == ["26m", "52m", "96m", "151m", "214m", "294m", "508m"]
    with pytest.raises(TypeError):
        VARIANTS["26m"] = VARIANTS["52m"]  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        VARIANTS["26m"].groups = 1  # type: ignore[misc]


def test_the_default_is_294m_fused() -> None:
    model = Model()
    assert (model.variant, model.use_fused, model.num_classes, model.in_chans) == ("294m", True, 1000, 3)


def test_every_variant_is_the_table_put_to_use() -> None:
    kinds = {"lite": LiteBlock, "same": SameBlock, "down": DownBlock}
    for name, config in VARIANTS.items():
        model = Model(name, use_fused=False)
        assert [type(b) for b in model.blocks] == [kinds[b.kind] for b in config.blocks]
        assert sum(b.stride == 2 for b in config.blocks) == 4


def test_get_variant_names_the_seven() -> None:
    with pytest.raises(ValueError, match="expected one of 26m, 52m, 96m, 151m, 214m, 294m, 508m, got ''"):
        get_variant("")


# Arguments and input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variant": "300m"}, r"variant: expected one of 26m, 52m, .*, got '300m'"),
        ({"variant": None}, "variant: expected one of"),
        ({"variant": ["26m"]}, "variant: expected one of"),
        ({"num_classes": 0}, "num_classes: expected an integer of at least 1, got 0"),
        ({"num_classes": 2.5}, "num_classes: expected an integer"),
        ({"in_chans": -1}, "in_chans: expected an integer of at least 1, got -1"),
        ({"in_chans": True}, "in_chans: expected an integer"),
        ({"drop_rate": 1.0}, r"drop_rate: expected a number in \[0, 1\), got 1.0"),
        ({"drop_path_rate": -0.1}, "drop_path_rate: expected a number"),
        ({"drop_path_rate": float("nan")}, "drop_path_rate: expected a number"),
    ],
)
def test_wrong_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Model(**arguments)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 64, 64), r"x: expected 4 dimensions \(B, 3, H, W\), got shape \(3, 64, 64\)"),
        ((1, 1, 3, 64, 64), "x: expected 4 dimensions"),
        ((1, 1, 64, 64), "x: expected 3 channels, got 1"),
        ((1, 64, 64, 3), "x: expected 3 channels, got 64"),
        ((1, 3, 31, 64), "x: expected height and width of at least 32, got 31 x 64"),
        ((1, 3, 64, 0), "x: expected height and width of at least 32, got 64 x 0"),
    ],
)
@pytest.mark.parametrize("use_fused", [False, True], ids=["plain", "fused"])
@SMALL
def test_wrong_shapes(shape: tuple[int, ...], message: str, use_fused: bool) -> None:
    with pytest.raises(ValueError, match=message):
        Model("tiny", use_fused=use_fused)(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64, torch.float16, torch.int64])
@SMALL
def test_wrong_dtypes(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"x: expected dtype torch.float32 .*, got {dtype}"):
        Model("tiny")(torch.zeros(1, 3, 32, 32, dtype=dtype))


@SMALL
def test_use_fused_is_fixed() -> None:
    with pytest.raises(AttributeError):
        Model("tiny").use_fused = False  # type: ignore[misc]


def test_unknown_names_of_the_package() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Modell'"):
        mobileformer.Modell  # noqa: B018
    assert "load_weights" in dir(mobileformer)


# Shapes, sizes, channels


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_shapes_of_features_tokens_and_head(variant: str) -> None:
    config = VARIANTS[variant]
    model = Model(variant, num_classes=11).eval()
    with torch.no_grad():
        features, tokens = model.forward_features(torch.randn(2, 3, 70, 33))
        assert features.shape == (2, config.feature_channels, ceil_div(70, 32), ceil_div(33, 32))
        assert tokens.shape == (2, config.num_tokens, config.token_dim)
        hidden = model.forward_head(features, tokens, pre_logits=True)
        assert hidden.shape == (2, config.hidden_features)
        logits = model.forward_head(features, tokens)
        assert logits.shape == (2, 11)
        torch.testing.assert_close(model.head.classifier(hidden), logits)


@pytest.mark.parametrize("spatial", [False, True], ids=["token 0", "spatial"])
@pytest.mark.parametrize("variant", ["26m", "96m"])
def test_odd_sizes_are_the_same_fused_and_plain(variant: str, spatial: bool) -> None:
    plain = recipe_model(variant, use_fused=False, spatial_dynamic_relu=spatial)
    fused = recipe_model(variant, use_fused=True, spatial_dynamic_relu=spatial)
    folded = fused.to_inference(torch.float64)
    for height, width in SIZES:
        x = torch.randn(2, 3, height, width, dtype=torch.float64)
        with torch.no_grad():
            expected = plain(x)
            torch.testing.assert_close(fused(x), expected, rtol=0, atol=1e-9)
            torch.testing.assert_close(folded(x), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_every_stage_rounds_up(height: int, width: int) -> None:
    model = Model("96m", use_fused=False).eval()
    sizes = []
    for block in model.blocks:
        block.register_forward_hook(lambda m, args, out: sizes.append(tuple(out[0].shape[2:])))
    with torch.no_grad():
        model(torch.randn(1, 3, height, width))
    stride, expected = 2, []
    for block in model.config.blocks:
        stride *= block.stride
        expected.append((ceil_div(height, stride), ceil_div(width, stride)))
    assert sizes == expected


@pytest.mark.parametrize("in_chans", [1, 4])
@pytest.mark.parametrize("variant", ["tiny", "tiny_ungrouped"])
@SMALL
def test_other_input_channels(variant: str, in_chans: int) -> None:
    plain = Model(variant, in_chans=in_chans, use_fused=False).double().eval()
    fused = Model(variant, in_chans=in_chans).double().eval()
    fused.load_state_dict(plain.state_dict())
    x = torch.randn(2, in_chans, 40, 40, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), plain(x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("use_fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("spatial", [False, True], ids=["token 0", "spatial"])
@pytest.mark.parametrize("variant", ["tiny", "tiny_ungrouped"])
@SMALL
def test_an_empty_batch(variant: str, use_fused: bool, spatial: bool) -> None:
    model = Model(variant, use_fused=use_fused, spatial_dynamic_relu=spatial).eval()
    with torch.no_grad():
        assert model(torch.randn(0, 3, 64, 64)).shape == (0, 1000)
        assert model.to_inference()(torch.randn(0, 3, 64, 64)).shape == (0, 1000)


@pytest.mark.parametrize("use_fused", [False, True], ids=["plain", "fused"])
@SMALL
def test_samples_do_not_see_each_other(use_fused: bool) -> None:
    model = recipe_model("tiny_ungrouped", use_fused=use_fused)
    x = recipe_image(3, 64, 64, seed=5)
    with torch.no_grad():
        together = model(x)
        torch.testing.assert_close(model(x[1:2]), together[1:2], rtol=0, atol=1e-10)


@pytest.mark.parametrize("use_fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("variant", ["tiny", "tiny_ungrouped"])
@SMALL
def test_memory_layout_of_the_input_does_not_matter(variant: str, use_fused: bool) -> None:
    model = recipe_model(variant, use_fused=use_fused)
    x = recipe_image(2, 64, 96, seed=5)
    spread = torch.zeros(2, 3, 64, 192, dtype=torch.float64)[..., ::2].copy_(x)
    with torch.no_grad():
        expected = model(x)
        for other in (x.contiguous(memory_format=torch.channels_last), spread, x.mT.contiguous().mT):
            torch.testing.assert_close(model(other), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize(("variant", "layout"), [("26m", torch.contiguous_format), ("52m", torch.channels_last)])
def test_the_fused_maps_lie_as_their_convolutions_like_it(
    variant: str, layout: torch.memory_format, in_chans: int
) -> None:
    """With one channel too, whose strides alone do not tell: it cost a quarter of the speed of training."""
    model = mobileformer.Model(variant, in_chans=in_chans)
    features, _ = model.forward_features(torch.randn(2, in_chans, 64, 64))
    assert features.is_contiguous(memory_format=layout)


@SMALL
def test_the_input_is_left_alone() -> None:
    x = recipe_image(1, 64, 64, seed=5, dtype=torch.float32)
    before = x.clone()
    for use_fused in (False, True):
        model = recipe_model("tiny", dtype=torch.float32, use_fused=use_fused)
        model(x).sum().backward()
        model.to_inference()(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("frozen", [False, True], ids=["training", "frozen norms"])
@pytest.mark.parametrize("spatial", [False, True], ids=["token 0", "spatial"])
@pytest.mark.parametrize("variant", ["26m", "tiny_ungrouped"])
@SMALL
def test_fused_gradients_equal_plain_ones(variant: str, spatial: bool, frozen: bool) -> None:
    """Also where a model in training keeps its norms frozen: there they are folded, differentiably."""
    gradients = []
    for use_fused in (False, True):
        model = recipe_model(variant, use_fused=use_fused, spatial_dynamic_relu=spatial).train()
        if frozen:
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        model(recipe_image(4, 64, 64, seed=9)).square().sum().backward()
        gradients.append({key: p.grad for key, p in model.named_parameters()})
    scale = max(g.abs().max().item() for g in gradients[0].values())
    for key, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], expected, rtol=1e-7, atol=1e-11 * scale, msg=key)


def test_slopes_by_position_are_fused_in_training_and_in_evaluation() -> None:
    """By the operator that makes them, beside the others and the joined ones of inference; nothing falls back."""
    model, x = Model("52m", num_classes=2, spatial_dynamic_relu=True), torch.randn(2, 3, 32, 32)

    def kernels(record: mf_kernels.KernelRecord) -> dict[str, int]:
        assert all(":native:" in name for name in record.counts)
        return {name.split(":")[0]: count for name, count in record.counts.items()}

    with mf_kernels.record_kernels() as record:
        model(x).sum().backward()
    counts, blocks = kernels(record), 8
    assert counts["spatial_dynamic_relu_fwd"] == counts["spatial_dynamic_relu_bwd"] == 2 * blocks
    with torch.no_grad(), mf_kernels.record_kernels() as record:
        model.eval()(x)
    counts = kernels(record)
    assert counts["spatial_dynamic_relu_fwd"] == 2 * blocks
    assert counts["token_side"] == counts["former_to_mobile_fwd"] == blocks
