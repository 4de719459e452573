"""timm: what its registry makes, its features by stage, its tools for fine-tuning, files in and out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mobileformer.timm  # noqa: F401  isort: skip  (first: it lets timm import torchvision)

import pytest
import timm
import torch
from golden_support import golden_file, recipe_image, recipe_model
from timm.models import group_parameters, load_checkpoint
from timm.models._hub import save_for_hf
from torch import Tensor
from weights_support import states_equal

from mobileformer import (
    VARIANTS,
    load_model,
    official_state_dict,
    read_metadata,
    save_official_checkpoint,
    save_weights,
)
from mobileformer.inference import Engine, fold
from mobileformer.measure.difference import lively_weights_
from mobileformer.pretrained import shipped_weights
from mobileformer.timm import MobileFormer, checkpoint_filter_fn

STRIDES = (4, 8, 16, 32)


def small_model(variant: str = "26m", **kwargs: Any) -> MobileFormer:
    model = timm.create_model(f"mobileformer_{variant}", **{"num_classes": 5, **kwargs})
    assert isinstance(model, MobileFormer)
    lively_weights_(model)
    return model.eval()


def image(batch: int = 2, height: int = 64, width: int = 64, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(3))


# The registry


def test_every_size_is_there_under_both_spellings() -> None:
    names = {f"{family}_{variant}" for variant in VARIANTS for family in ("mobileformer", "mobile_former")}
    assert set(timm.list_models("mobile*former_*")) == names
    assert set(timm.list_models(module="mobileformer")) == names
    pretrained = timm.list_models("mobile*former_*", pretrained=True)
    assert sorted(pretrained) == ["mobile_former_52m.fashion_mnist", "mobileformer_52m.fashion_mnist"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_size_is_the_model_of_that_name(variant: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(f"mobile_former_{variant}")
    assert (model.variant, model.num_classes, model.in_chans, model.use_fused) == (variant, 1000, 3, True)
    assert sum(p.numel() for p in model.parameters()) == VARIANTS[variant].num_parameters


def test_arguments_reach_the_model() -> None:
    model = small_model(in_chans=1, use_fused=False, drop_rate=0.25, drop_path_rate=0.5, spatial_dynamic_relu=True)
    assert model(image(channels=1)).shape == (2, 5)
    assert not model.use_fused
    assert model.spatial_dynamic_relu
    assert model.head.dropout.p == 0.25
    assert model.mobile_to_former.drop_path.rate == 0.5
    assert small_model(dtype=torch.float64).tokens.dtype == torch.float64


@pytest.mark.parametrize("kwargs", [{"num_classes": -1}, {"global_pool": "max"}, {"drop_rate": 1.0}])
def test_arguments_out_of_range_are_refused_by_name(kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        timm.create_model("mobileformer_26m", **kwargs)


def test_its_numbers_are_the_published_ones() -> None:
    model = small_model(num_classes=1000).double()
    model.load_state_dict(recipe_model("26m").state_dict())
    with torch.no_grad():
        logits = model(recipe_image(2, 224, 224, seed=1))
    assert abs(logits.numpy() - golden_file("26m")["logits_224"]).max() < 1e-9


def test_images_are_prepared_as_the_published_code_evaluates() -> None:
    model = small_model()
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"] == (3, 224, 224)
    assert (config["crop_pct"], config["interpolation"]) == (0.875, "bilinear")
    assert (config["mean"], config["std"]) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    first, last = model.default_cfg["first_conv"], model.default_cfg["classifier"]
    assert model.get_submodule(first) is model.stem.conv
    assert model.get_submodule(last) is model.get_classifier()


# Features


@pytest.mark.parametrize("variant", ["26m", "96m", "294m"])
def test_features_are_the_maps_at_four_strides(variant: str) -> None:
    """Of a size that no stride divides: each rounds up."""
    model = small_model(variant)
    backbone = timm.create_model(f"mobileformer_{variant}", features_only=True).eval()
    backbone.model.load_state_dict(model.state_dict(), strict=False)
    seen: dict[str, Tensor] = {}
    for info in model.feature_info:
        model.get_submodule(info["module"]).register_forward_hook(
            lambda module, args, out, name=info["module"]: seen.__setitem__(name, out[0])
        )
    x = image(height=70, width=97)
    with torch.no_grad():
        model(x)
        maps = backbone(x)
    assert backbone.feature_info.reduction() == list(STRIDES)
    assert [m.shape[1] for m in maps] == backbone.feature_info.channels()
    assert [m.shape[2:] for m in maps] == [(-(-70 // stride), -(-97 // stride)) for stride in STRIDES]
    for found, expected in zip(maps, seen.values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_backbone_has_what_its_features_need_and_no_more() -> None:
    """So DistributedDataParallel finds no parameter without a gradient."""
    backbone = timm.create_model("mobileformer_26m", features_only=True, out_indices=(1, 2), in_chans=1)
    assert backbone.feature_info.channels() == [24, 64]
    assert len(backbone.model.blocks) == 7
    sum(m.sum() for m in backbone(image(channels=1))).backward()
    assert [name for name, p in backbone.named_parameters() if p.grad is None] == []


def test_intermediates_with_tokens() -> None:
    model = small_model("96m")
    x = image()
    with torch.no_grad():
        (features, tokens), stages = model.forward_intermediates(x, return_prefix_tokens=True)
        expected = model.forward_features(x)
        logits = model.forward_head((features, tokens))
        assert torch.equal(logits, model(x))
    assert torch.equal(features, expected[0])
    assert torch.equal(tokens, expected[1])
    assert [tuple(t.shape) for _, t in stages] == [(2, 4, 128)] * 4
    assert torch.equal(stages[-1][0], features)
    assert torch.equal(model.mobile_to_former(*stages[-1]), tokens)


@pytest.mark.parametrize(("indices", "strides"), [(None, STRIDES), (2, (16, 32)), ([0, -1], (4, 32)), ((1,), (8,))])
def test_intermediates_by_index(indices: Any, strides: tuple[int, ...]) -> None:
    model = small_model()
    with torch.no_grad():
        maps = model.forward_intermediates(image(), indices=indices, intermediates_only=True)
    assert [m.shape[2] for m in maps] == [64 // stride for stride in strides]


def test_intermediates_that_stop_early() -> None:
    model = small_model()
    calls: list[int] = []
    for index, block in enumerate(model.blocks):
        block.register_forward_hook(lambda module, args, out, index=index: calls.append(index))
    with torch.no_grad():
        (features, tokens), (found,) = model.forward_intermediates(image(), indices=[1], stop_early=True)
        assert calls == list(range(4))
        (_, whole), _ = model.forward_intermediates(image(), indices=[3], stop_early=True)
        assert torch.equal(whole, model.forward_features(image())[1])
    assert torch.equal(features, found)
    assert tokens.shape == (2, 3, 128)


def test_other_formats_and_indices_are_refused() -> None:
    model = small_model()
    with pytest.raises(ValueError, match="output_fmt: expected 'NCHW', got 'NLC'"):
        model.forward_intermediates(image(), output_fmt="NLC")
    with pytest.raises(AssertionError, match="out of range"):
        model.forward_intermediates(image(), indices=[4])


def test_pruning_keeps_the_maps() -> None:
    model, pruned = small_model(), small_model()
    assert pruned.prune_intermediate_layers([0, -2]) == [0, 2]
    assert (pruned.num_features, pruned.head_hidden_size, pruned.num_classes) == (64, 64, 0)
    x = image()
    with torch.no_grad():
        expected = model.forward_intermediates(x, indices=[0, 2], intermediates_only=True)
        found = pruned.forward_intermediates(x, indices=[0, 2], intermediates_only=True)
        assert all(map(torch.equal, found, expected))
        assert torch.equal(pruned(x), expected[1])
        folded = pruned.to_inference(torch.float64)(x.double())
    torch.testing.assert_close(folded, expected[1].double(), rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="the classifier was pruned"):
        pruned.reset_classifier(3)


def test_pruning_the_head_alone() -> None:
    model = small_model()
    expected = model.forward_features(image())
    assert model.prune_intermediate_layers() == [3]
    assert all(map(torch.equal, model.forward_features(image()), expected))
    assert torch.equal(model(image()), expected[0])


# The classifier


def test_a_new_classifier() -> None:
    model = small_model().double()
    before = model.forward_head(model.forward_features(image().double()), pre_logits=True)
    assert before.shape == (2, model.head_hidden_size)
    model.reset_classifier(7, "avg")
    new = model.get_classifier()
    assert (model.num_classes, tuple(new.weight.shape), new.weight.dtype) == (7, (7, 1024), torch.float64)
    assert 0.009 < new.weight.std() < 0.011
    assert not new.bias.any()
    assert model(image().double()).shape == (2, 7)
    model.reset_classifier(0)
    assert torch.equal(model(image().double()), before)
    assert torch.equal(small_model(num_classes=0).double()(image().double()), before)
    with pytest.raises(ValueError, match="num_classes"):
        model.reset_classifier(-1)
    with pytest.raises(ValueError, match="global_pool"):
        model.reset_classifier(3, "")


def test_features_without_tokens_give_no_logits() -> None:
    model = small_model()
    features, tokens = model.forward_features(image())
    assert torch.equal(model.forward_head(features, tokens), model(image()))
    with pytest.raises(TypeError, match="got features alone"):
        model.forward_head(features)


# Groups of parameters


def test_groups_by_depth() -> None:
    model = small_model()
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert {name.split(".")[0] for name, depth in groups.items() if depth == 0} == {"tokens", "stem"}
    assert all(groups[name] == 1 + int(name.split(".")[1]) for name in groups if name.startswith("blocks."))
    last = len(model.blocks)
    assert {groups[name] for name in groups if name.startswith("mobile_to_former")} == {last}
    assert {groups[name] for name in groups if name.startswith("head")} == {last + 1}


def test_groups_by_stage() -> None:
    model = small_model("294m")
    groups = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    stages = [groups[f"blocks.{index}.{'expand' if index == 0 else 'project'}.conv.weight"] for index in range(12)]
    assert stages == [1, 1, 1, 2, 2, 3, 3, 3, 3, 4, 4, 4]
    assert groups["tokens"] == 0
    assert groups["mobile_to_former.gate.weight"] == 4
    assert groups["head.fc.weight"] == 5


# Files


@pytest.mark.parametrize("name", ["mobile_former_26m", "mobileformer_52m"])
@pytest.mark.parametrize("kwargs", [{}, {"features_only": True}])
def test_no_weights_of_imagenet_come_by_name(name: str, kwargs: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match=rf"{name}: .*no weights trained on ImageNet .* checkpoint_path"):
        timm.create_model(name, pretrained=True, **kwargs)
    assert timm.get_pretrained_cfg(name).num_classes == 1000


def test_the_weights_in_the_package_have_a_tag() -> None:
    """Prepared as their file says, and adapted to three channels and other classes like any of timm's."""
    metadata, expected = read_metadata(shipped_weights()), load_model(shipped_weights())
    model = timm.create_model("mobileformer_52m.fashion_mnist", pretrained=True)
    assert states_equal(model, expected)
    assert model.default_cfg["label_names"] == metadata.labels
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"] == (1, metadata.input_size, metadata.input_size)
    assert (config["mean"], config["std"]) == (metadata.mean, metadata.std)
    adapted = timm.create_model("mobileformer_52m.fashion_mnist", pretrained=True, in_chans=3, num_classes=4)
    state, own = adapted.state_dict(), expected.state_dict()
    first = state.pop("stem.conv.weight")  # timm divides in the file's half precision
    torch.testing.assert_close(first.sum(1, keepdim=True), own["stem.conv.weight"], rtol=2e-3, atol=1e-4)
    assert all(torch.equal(state[key], own[key]) for key in state if not key.startswith("head.classifier"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One set of weights as two files: ours and the published kind."""
    folder = tmp_path_factory.mktemp("weights")
    model = recipe_model("26m", dtype=torch.float32)
    save_weights(model, folder / "ours.safetensors")
    save_official_checkpoint(model, folder / "published.pth.tar")
    return folder


@pytest.mark.parametrize("name", ["ours.safetensors", "published.pth.tar"])
def test_a_checkpoint_of_either_kind(files: Path, name: str) -> None:
    expected = recipe_model("26m", dtype=torch.float32)
    model = timm.create_model("mobileformer_26m", checkpoint_path=str(files / name))
    assert states_equal(model, expected)
    later = timm.create_model("mobile_former_26m")
    load_checkpoint(later, str(files / name))
    assert states_equal(later, expected)


def test_a_checkpoint_that_does_not_fit_is_refused(files: Path) -> None:
    with pytest.raises(RuntimeError, match=r"size mismatch for head\.classifier\.weight"):
        timm.create_model("mobileformer_26m", checkpoint_path=str(files / "published.pth.tar"), num_classes=3)
    with pytest.raises(RuntimeError, match=r"Missing key|Unexpected key"):
        timm.create_model("mobileformer_96m", checkpoint_path=str(files / "published.pth.tar"))


@pytest.mark.parametrize("name", ["ours.safetensors", "published.pth.tar"])
def test_a_file_as_pretrained_weights_is_adapted(files: Path, name: str) -> None:
    """Three channels are summed into one, and another number of classes gets a layer of its own."""
    expected = recipe_model("26m", dtype=torch.float32).state_dict()
    overlay = {"file": str(files / name)}
    model = timm.create_model(
        "mobileformer_26m", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=4, in_chans=1
    )
    state = model.state_dict()
    assert torch.equal(state["stem.conv.weight"], expected["stem.conv.weight"].sum(1, keepdim=True))
    adapted = ("stem.conv.weight", "head.classifier.weight", "head.classifier.bias")
    assert all(torch.equal(state[key], expected[key]) for key in state if key not in adapted)
    assert state["head.classifier.weight"].shape == (4, 1024)


def test_the_filter_knows_both_kinds_of_keys() -> None:
    model = small_model()
    ours = model.state_dict()
    assert checkpoint_filter_fn(ours, model) is ours
    renamed = checkpoint_filter_fn(official_state_dict(model) | {"foreign": torch.zeros(1)}, model)
    assert list(renamed) == [*ours, "foreign"]


def test_timms_folder_for_the_hub(tmp_path: Path) -> None:
    model = small_model(in_chans=1, use_fused=False)
    save_for_hf(model, str(tmp_path), safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert (again.variant, again.num_classes, again.in_chans, again.use_fused) == ("26m", 5, 1, False)
    assert states_equal(again, model)


def test_it_is_a_model_of_this_package(tmp_path: Path) -> None:
    """Saved, loaded, folded and run by the engine like any other."""
    model = small_model()
    save_weights(model, tmp_path / "weights.safetensors")
    assert states_equal(load_model(tmp_path / "weights.safetensors"), model)
    with torch.no_grad():
        expected = model(image())
    assert abs(Engine(fold(model))(image().numpy()) - expected.numpy()).max() < 1e-4
    fast = model.to_inference()
    assert fast.engine is not None
    torch.testing.assert_close(fast(image()), expected, rtol=1e-4, atol=1e-4)


def test_a_subclass_that_may_compute_something_else_is_not_folded() -> None:
    class Adapted(MobileFormer):
        pass

    with pytest.raises(ValueError, match="the model is a Adapted"):
        fold(Adapted("26m"))


@pytest.mark.parametrize("setting", ["exportable", "scriptable"])
def test_a_model_that_is_to_be_exported_is_plain(setting: str) -> None:
    assert timm.create_model("mobileformer_26m", **{setting: True}).use_fused is False
    assert timm.create_model("mobileformer_26m").use_fused is True
