"""The parts of the model: how they start, what each computes, what training drops."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobileformer import VARIANTS, Model
from mobileformer.network.blocks import DownBlock, SameBlock
from mobileformer.network.convolution import ConvNorm, channel_shuffle
from mobileformer.network.layers import DropPath, DynamicReLU, Former, FormerToMobile, MobileToFormer, hard_sigmoid

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
        torch.einsum("bmc,bchw->bmhw", query[..., part], x[:, part]) * 3**-0.5 for part in (slice(0, 3), slice(3, 6))
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


def test_printing_says_what_is_special() -> None:
    text = repr(Model("26m", drop_path_rate=0.09))
    assert "activation=relu6, shuffle=8" in text
    assert "rate=0.02" in text
