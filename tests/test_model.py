"""The model's own rules: variants, shapes, errors, initialisation, stochastic depth, spatial slopes."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from golden_support import recipe_image, recipe_model
from torch import Tensor, nn

import mobileformer
from mobileformer import VARIANTS, Model
from mobileformer.blocks import DownBlock, LiteBlock, SameBlock
from mobileformer.config import get_variant
from mobileformer.layers import (
    ConvNorm,
    DropPath,
    DynamicReLU,
    Former,
    FormerToMobile,
    MobileToFormer,
    channel_shuffle,
    hard_sigmoid,
)

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
def test_wrong_shapes(shape: tuple[int, ...], message: str, use_fused: bool) -> None:
    with pytest.raises(ValueError, match=message):
        Model("26m", use_fused=use_fused)(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64, torch.float16, torch.int64])
def test_wrong_dtypes(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"x: expected dtype torch.float32 .*, got {dtype}"):
        Model("26m")(torch.zeros(1, 3, 32, 32, dtype=dtype))


def test_use_fused_is_fixed() -> None:
    with pytest.raises(AttributeError):
        Model("26m").use_fused = False  # type: ignore[misc]


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
@pytest.mark.parametrize("variant", ["26m", "52m"])
def test_other_input_channels(variant: str, in_chans: int) -> None:
    plain = Model(variant, in_chans=in_chans, use_fused=False).double().eval()
    fused = Model(variant, in_chans=in_chans).double().eval()
    fused.load_state_dict(plain.state_dict())
    x = torch.randn(2, in_chans, 40, 40, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), plain(x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("use_fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("spatial", [False, True], ids=["token 0", "spatial"])
@pytest.mark.parametrize("variant", ["26m", "96m"])
def test_an_empty_batch(variant: str, use_fused: bool, spatial: bool) -> None:
    model = Model(variant, use_fused=use_fused, spatial_dynamic_relu=spatial).eval()
    with torch.no_grad():
        assert model(torch.randn(0, 3, 64, 64)).shape == (0, 1000)
        assert model.to_inference()(torch.randn(0, 3, 64, 64)).shape == (0, 1000)


@pytest.mark.parametrize("use_fused", [False, True], ids=["plain", "fused"])
def test_samples_do_not_see_each_other(use_fused: bool) -> None:
    model = recipe_model("96m", use_fused=use_fused)
    x = recipe_image(3, 64, 64, seed=5)
    with torch.no_grad():
        together = model(x)
        torch.testing.assert_close(model(x[1:2]), together[1:2], rtol=0, atol=1e-10)


@pytest.mark.parametrize("use_fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("variant", ["26m", "52m"])
def test_memory_layout_of_the_input_does_not_matter(variant: str, use_fused: bool) -> None:
    model = recipe_model(variant, use_fused=use_fused)
    x = recipe_image(2, 64, 96, seed=5)
    spread = torch.zeros(2, 3, 64, 192, dtype=torch.float64)[..., ::2].copy_(x)
    with torch.no_grad():
        expected = model(x)
        for other in (x.contiguous(memory_format=torch.channels_last), spread, x.mT.contiguous().mT):
            torch.testing.assert_close(model(other), expected, rtol=0, atol=1e-10)


def test_the_input_is_left_alone() -> None:
    x = recipe_image(1, 64, 64, seed=5, dtype=torch.float32)
    before = x.clone()
    for use_fused in (False, True):
        model = recipe_model("26m", dtype=torch.float32, use_fused=use_fused)
        model(x).sum().backward()
        model.to_inference()(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("frozen", [False, True], ids=["training", "frozen norms"])
@pytest.mark.parametrize("variant", ["26m", "96m"])
def test_fused_gradients_equal_plain_ones(variant: str, frozen: bool) -> None:
    """Also where a training model keeps its norms in evaluation mode: there they are folded, with their gradients."""
    gradients = []
    for use_fused in (False, True):
        model = recipe_model(variant, use_fused=use_fused).train()
        if frozen:
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        model(recipe_image(4, 64, 64, seed=9)).square().sum().backward()
        gradients.append({key: p.grad for key, p in model.named_parameters()})
    scale = max(g.abs().max().item() for g in gradients[0].values())
    for key, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], expected, rtol=1e-7, atol=1e-11 * scale, msg=key)


# Initialisation


def test_initialisation_is_the_published_one() -> None:
    torch.manual_seed(0)
    model = Model("294m", use_fused=False)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is None
            std = math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels))
            check_normal(module.weight, std, name)
        elif isinstance(module, nn.Linear):
            check_normal(module.weight, 0.01, name)
            assert not module.bias.any(), name
        elif isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d | nn.LayerNorm):
            assert torch.equal(module.weight, torch.ones_like(module.weight)), name
            assert not module.bias.any(), name
            assert module.eps == 1e-5, name
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            assert module.momentum == 0.1, name
    check_normal(model.tokens, 1.0, "tokens")


def test_initialisation_follows_the_seed() -> None:
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(Model("26m", use_fused=seed == 1).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not torch.equal(states[0]["stem.conv.weight"], states[2]["stem.conv.weight"])


def test_grouped_convolutions_start_with_the_width_of_the_whole() -> None:
    torch.manual_seed(0)
    check_normal(Model("26m").blocks[8].expand.conv.weight, math.sqrt(2 / 576), "grouped")


def check_normal(values: Tensor, std: float, name: str) -> None:
    """Mean and deviation within five standard errors."""
    count = values.numel()
    assert abs(values.mean().item()) < 5 * std / math.sqrt(count), name
    assert abs(values.std().item() / std - 1) < 5 / math.sqrt(2 * (count - 1)), name


# Parts


def test_channel_shuffle_by_its_definition() -> None:
    x = torch.arange(2 * 12 * 3).view(2, 12, 3, 1)
    groups, each = 4, 3
    y = channel_shuffle(x, groups)
    for i in range(groups):
        for j in range(each):
            assert torch.equal(y[:, j * groups + i], x[:, i * each + j])


def test_hard_sigmoid_keeps_its_slope_in_float64() -> None:
    x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    hard_sigmoid(x).backward()
    assert x.grad.item() == 1 / 6
    assert hard_sigmoid(torch.tensor([-4.0, -3.0, 0.0, 3.0, 4.0])).tolist() == [0, 0, 0.5, 1, 1]


@pytest.mark.parametrize("groups", [1, 3])
def test_folded_convolution_equals_convolution_and_norm(groups: int) -> None:
    layer = ConvNorm(3, 6, 3, stride=2, groups=groups, activation="relu6", use_fused=True).double()
    with torch.no_grad():
        for tensor in (layer.norm.weight, layer.norm.bias, layer.norm.running_mean):
            tensor.normal_()
        layer.norm.running_var.uniform_(0.5, 1.5)
    layer.eval()
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), F.relu6(layer.norm(layer.conv(x))), rtol=0, atol=1e-12)


def test_spatial_slopes_are_those_of_token_0_where_it_has_all_the_weight() -> None:
    relu = DynamicReLU(5, 16, use_fused=True).double()
    nn.init.normal_(relu.expand.bias)
    x, tokens = torch.randn(2, 5, 4, 3, dtype=torch.float64), torch.randn(2, 3, 16, dtype=torch.float64)
    mix = torch.zeros(2, 3, 4, 3, dtype=torch.float64)
    mix[:, 0] = 1
    torch.testing.assert_close(relu(x, tokens, mix), relu(x, tokens))


@pytest.mark.parametrize(("height", "width"), [(8, 6), (9, 7)])
def test_token_mix_by_its_definition(height: int, width: int) -> None:
    bridge = MobileToFormer(6, 16, drop_path=0.0, use_fused=False).double()
    nn.init.normal_(bridge.query.weight)
    x = torch.randn(2, 6, height, width, dtype=torch.float64)
    tokens = torch.randn(2, 3, 16, dtype=torch.float64)
    query = bridge.query(tokens)
    heads = [
        torch.einsum("bmc,bchw->bmhw", query[..., part], x[:, part]) * 3**-0.5
        for part in (slice(0, 3), slice(3, 6))
    ]
    size = ((height + 1) // 2, (width + 1) // 2)
    pooled = F.adaptive_avg_pool2d(sum(heads) / 2, size)
    torch.testing.assert_close(bridge.token_mix(x, tokens, size), pooled.softmax(dim=1))


# Dropout and stochastic depth


def test_stochastic_depth_drops_samples_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    drop = DropPath(0.25)
    update = torch.ones(4000, 3, 2)
    out = drop(update)
    kept = out[:, 0, 0] != 0
    assert torch.equal(out, kept[:, None, None] * update / 0.75)
    assert abs(kept.double().mean().item() - 0.75) < 0.035
    assert drop.eval()(update) is update
    assert DropPath(0.0)(update) is update


def test_stochastic_depth_rates_rise_with_depth() -> None:
    model = Model("294m", drop_path_rate=0.24)
    for index, block in enumerate(model.blocks):
        rates = {m.rate for m in block.modules() if isinstance(m, DropPath)}
        assert rates == (set() if index == 0 else {0.24 * (index + 1) / 12})
    assert model.mobile_to_former.drop_path.rate == 0.24


@pytest.mark.parametrize("use_fused", [False, True], ids=["plain", "fused"])
def test_stochastic_depth_acts_where_it_should(use_fused: bool) -> None:
    """With a rate next to 1 every update is gone: what stays is what has none."""
    rate = 1 - 1e-9
    torch.manual_seed(0)
    x, tokens = torch.randn(2, 16, 6, 6), torch.randn(2, 3, 32)
    arguments = {"token_dim": 32, "groups": 1, "spatial_dynamic_relu": False, "use_fused": use_fused}
    bridge = MobileToFormer(16, 32, drop_path=rate, use_fused=use_fused)
    torch.testing.assert_close(bridge(x, tokens), F.layer_norm(tokens, (32,)))
    former = Former(32, drop_path=rate, use_fused=use_fused)
    nn.init.normal_(former.ffn_project.weight)
    normed = F.layer_norm(tokens, (32,))
    expected = F.layer_norm(normed + former.ffn_project(F.gelu(former.ffn_expand(normed))), (32,))
    torch.testing.assert_close(former(tokens), expected)
    outward = FormerToMobile(16, 32, drop_path=rate, use_fused=use_fused)
    torch.testing.assert_close(outward(x, tokens), x)
    same = SameBlock(16, VARIANTS["294m"].blocks[2], drop_path=rate, **arguments)
    assert not same.has_skip  # 16 to 24 channels: nothing to fall back on, so the branch stays
    same_kept = SameBlock(24, VARIANTS["294m"].blocks[2], drop_path=rate, **arguments)
    x24 = torch.randn(2, 24, 6, 6)
    torch.testing.assert_close(same_kept(x24, tokens)[0], x24)
    down = DownBlock(16, VARIANTS["294m"].blocks[1], drop_path=rate, **arguments)
    middle = []
    down.squeeze.register_forward_hook(lambda m, args, out: middle.append(out))
    torch.testing.assert_close(down(x, tokens)[0], middle[0])


@pytest.mark.parametrize("use_fused", [False, True], ids=["plain", "fused"])
def test_training_with_stochastic_depth_and_dropout_runs(use_fused: bool) -> None:
    model = Model("26m", use_fused=use_fused, drop_rate=0.5, drop_path_rate=0.5)
    x = torch.randn(4, 3, 64, 64)
    torch.manual_seed(1)
    first = model(x)
    torch.manual_seed(2)
    assert not torch.equal(first, model(x))
    first.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    model.eval()
    assert torch.equal(model(x), model(x))


def test_dropout_acts_before_the_last_layer() -> None:
    model = Model("26m", drop_rate=0.4)
    features, tokens = model.forward_features(torch.randn(8, 3, 64, 64))
    seen = []
    model.head.classifier.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    model.head(features, tokens)
    share = (seen[0] == 0).double().mean().item()
    assert abs(share - 0.4) < 0.05


def test_get_variant_names_the_seven() -> None:
    with pytest.raises(ValueError, match="expected one of 26m, 52m, 96m, 151m, 214m, 294m, 508m, got ''"):
        get_variant("")
