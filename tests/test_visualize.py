"""Attention maps: the numbers that the reference computes with, and nothing changed by looking."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from tiny_support import tiny_variants
from torch import Tensor, nn

import mf_kernels
from mf_kernels import reference
from mobileformer import VARIANTS, Model
from mobileformer.measure.difference import lively_weights_
from mobileformer.network.layers import FormerToMobile, MobileToFormer
from mobileformer.visualize import (
    BlockAttention,
    attention_maps,
    former_to_mobile_attention,
    mobile_to_former_attention,
    token_similarity,
)


@pytest.fixture(scope="module", autouse=True)
def variants() -> Iterator[None]:
    """Small networks, where not every published one is looked into."""
    with tiny_variants():
        yield


def made(variant: str = "tiny", **arguments: object) -> Model:
    model = Model(variant, num_classes=5, **arguments).eval()  # pyright: ignore[reportArgumentType]
    lively_weights_(model, seed=7)
    return model


def image(model: Model, height: int = 64, width: int = 64, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch, model.in_chans, height, width, generator=generator).to(model.tokens.dtype)


def hooks(model: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())


def snapshot(model: Model) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


# The maps


@pytest.mark.parametrize(("channels", "heads", "tokens"), [(8, 2, 3), (12, 4, 6), (6, 1, 1), (10, 2, 12)])
def test_attention_times_the_map_is_what_the_reference_gathers(channels: int, heads: int, tokens: int) -> None:
    x = torch.randn(2, channels, 5, 7, dtype=torch.float64)
    q, v = torch.randn(2, 2, tokens, channels, dtype=torch.float64)
    looks = mobile_to_former_attention(x, q, num_heads=heads)
    assert looks.shape == (2, heads, tokens, 5, 7)
    chunks = x.unflatten(1, (heads, -1))
    gathered = torch.einsum("bnmhw,bnehw->bmne", looks, chunks).flatten(2)
    torch.testing.assert_close(gathered, reference.mobile_to_former(x, q, num_heads=heads), rtol=0, atol=1e-12)
    takes = former_to_mobile_attention(x, q, num_heads=heads)
    given = torch.einsum("bnmhw,bmne->bnehw", takes, v.unflatten(2, (heads, -1))).flatten(1, 2)
    torch.testing.assert_close(x + given, reference.former_to_mobile(x, q, v, num_heads=heads), rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_every_block_of_every_variant(variant: str) -> None:
    model = made(variant)
    config = model.config
    blocks = attention_maps(model, image(model, 65, 47))
    kinds = [block.kind for block in config.blocks]
    assert [block.kind for block in blocks] == [*(kind for kind in kinds if kind != "lite"), "last"]
    assert [block.name for block in blocks] == [
        *(f"block {index}" for index, kind in enumerate(kinds) if kind != "lite"),
        "last bridge",
    ]
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        looks, takes = block.mobile_to_former, block.former_to_mobile
        assert looks.shape[:3] == (1, 2, config.num_tokens)
        assert block.tokens.shape == (1, config.num_tokens, config.token_dim)
        torch.testing.assert_close(looks.sum(dim=(3, 4)), torch.ones(looks.shape[:3]), rtol=0, atol=1e-5)
        if takes is None:
            assert following is None
            continue
        torch.testing.assert_close(takes.sum(dim=2), torch.ones(takes[:, :, 0].shape), rtol=0, atol=1e-5)
        assert following is not None
        assert takes.shape == following.mobile_to_former.shape  # what a block writes is what the next one reads
        height, width = looks.shape[3:]
        down = block.kind == "down"
        assert takes.shape[3:] == ((height + down) // (1 + down), (width + down) // (1 + down))


def recorded(model: Model, x: Tensor) -> dict[str, list[tuple[Tensor, ...]]]:
    """Of every bridge of a plain model what its operator was given and gave: (x, q, gathered) and (x, k, v)."""
    calls: dict[str, list[tuple[Tensor, ...]]] = {"mobile_to_former": [], "former_to_mobile": []}

    def gather(x: Tensor, q: Tensor, *, num_heads: int) -> Tensor:
        y = reference.mobile_to_former(x, q, num_heads=num_heads)
        calls["mobile_to_former"].append((x, q, y))
        return y

    def give(x: Tensor, k: Tensor, v: Tensor, *, num_heads: int) -> Tensor:
        calls["former_to_mobile"].append((x, k, v))
        return reference.former_to_mobile(x, k, v, num_heads=num_heads)

    operators = type(
        "Operators", (), {"mobile_to_former": staticmethod(gather), "former_to_mobile": staticmethod(give)}
    )
    watched = copy.deepcopy(model)
    for part in watched.modules():
        if isinstance(part, MobileToFormer | FormerToMobile):
            part.__class__ = type(part.__class__.__name__, (part.__class__,), {"ops": operators})
    with torch.no_grad():
        watched(x)
    return calls


@pytest.mark.parametrize(("in_chans", "spatial"), [(3, False), (1, True)])
def test_the_maps_are_those_that_the_network_computes_with(in_chans: int, spatial: bool) -> None:
    model = made("tiny_ungrouped", in_chans=in_chans, spatial_dynamic_relu=spatial, use_fused=False).double()
    x = image(model, 49, 64, batch=2)
    blocks, calls = attention_maps(model, x), recorded(model, x)
    assert len(blocks) == len(calls["mobile_to_former"]) == len(calls["former_to_mobile"]) + 1
    for block, (map_in, _, gathered) in zip(blocks, calls["mobile_to_former"], strict=True):
        ours = torch.einsum("bnmhw,bnehw->bmne", block.mobile_to_former, map_in.unflatten(1, (2, -1))).flatten(2)
        torch.testing.assert_close(ours, gathered, rtol=0, atol=1e-12)
    for block, (map_out, key, value) in zip(blocks, calls["former_to_mobile"], strict=False):
        assert block.former_to_mobile is not None
        given = torch.einsum("bnmhw,bmne->bnehw", block.former_to_mobile, value.unflatten(2, (2, -1))).flatten(1, 2)
        expected = reference.former_to_mobile(map_out, key, value)
        torch.testing.assert_close(map_out + given, expected, rtol=0, atol=1e-12)
    with torch.no_grad():
        _, tokens = model.forward_features(x)
    torch.testing.assert_close(blocks[-1].tokens, tokens, rtol=0, atol=0)


@pytest.mark.parametrize("variant", ["tiny", "tiny_ungrouped"])
def test_fused_and_plain_models_look_at_the_same(variant: str) -> None:
    fused, plain = made(variant), made(variant, use_fused=False)
    for a, b in zip(attention_maps(fused, image(fused)), attention_maps(plain, image(plain)), strict=True):
        assert torch.equal(a.mobile_to_former, b.mobile_to_former)
        assert torch.equal(a.tokens, b.tokens)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_maps_of_a_half_precision_model_are_float32(dtype: torch.dtype) -> None:
    x, q = torch.randn(1, 8, 6, 6), torch.randn(1, 3, 8)
    looks = mobile_to_former_attention(x.to(dtype), q.to(dtype))
    assert looks.dtype == torch.float32
    torch.testing.assert_close(looks.sum(dim=(3, 4)), torch.ones(1, 2, 3), rtol=0, atol=1e-6)


def test_similarity_of_tokens() -> None:
    tokens = torch.tensor([[[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]])
    half = 0.5**0.5
    expected = [[1, 0, -1, half, 0], [0, 1, 0, half, 0], [-1, 0, 1, -half, 0], [half, half, -half, 1, 0], [0] * 5]
    torch.testing.assert_close(token_similarity(tokens), torch.tensor([expected], dtype=torch.float32))


# Nothing changes


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("spatial", [False, True])
def test_looking_leaves_the_model_alone(training: bool, spatial: bool) -> None:
    model = made(drop_rate=0.5, spatial_dynamic_relu=spatial).train(training)
    x = image(model, 40, 40, batch=2).requires_grad_()
    state, seed = snapshot(model), torch.get_rng_state()
    copied = copy.deepcopy(model)
    blocks = attention_maps(model, x)
    assert isinstance(blocks[0], BlockAttention)
    assert not blocks[0].mobile_to_former.requires_grad
    assert (model.training, model.use_fused, hooks(model)) == (training, True, 0)
    assert all(part.use_fused for part in model.modules() if hasattr(part, "use_fused"))
    assert torch.equal(torch.get_rng_state(), seed)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    with mf_kernels.record_kernels() as record:
        after = model(x)
    assert record.counts
    torch.set_rng_state(seed)
    assert torch.equal(after, copied(x))


def test_no_kernel_runs() -> None:
    model = made()
    with mf_kernels.record_kernels() as record:
        attention_maps(model, image(model))
    assert record.counts == {}


def test_an_error_leaves_nothing_behind() -> None:
    model = made()

    class Broken(nn.Module):
        def forward(self, *arguments: Tensor) -> Tensor:
            raise RuntimeError("a part of somebody else's")

    model.blocks[2].project = Broken()
    with pytest.raises(RuntimeError, match="somebody else's"):
        attention_maps(model, image(model))
    assert hooks(model) == 0
    assert model.use_fused


def test_hooks_and_parts_of_the_users_own_are_in_it() -> None:
    model, seen = made(), []
    model.blocks[2].register_forward_hook(lambda *arguments: seen.append(1))
    model.blocks[1].former_to_mobile.key = nn.Linear(64, 32)
    nn.init.zeros_(model.blocks[1].former_to_mobile.key.weight)
    nn.init.zeros_(model.blocks[1].former_to_mobile.key.bias)
    blocks = attention_maps(model, image(model))
    assert (seen, hooks(model)) == ([1], 1)
    even = blocks[0].former_to_mobile
    assert even is not None
    torch.testing.assert_close(even, torch.full_like(even, 1 / 3))


def test_what_cannot_be_looked_into_is_refused() -> None:
    model = made()
    with pytest.raises(TypeError, match=r"expected a mobileformer\.Model, got Linear"):
        attention_maps(nn.Linear(1, 1), image(model))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="expected 3 channels, got 1"):
        attention_maps(model, image(model)[:, :1])
