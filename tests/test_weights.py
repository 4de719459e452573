"""Weights in and out: names, files of every kind, and what must be refused."""

from __future__ import annotations

import argparse
import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from golden_support import published_keys, recipe_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mobileformer
from mobileformer import Model, WeightsError, load_model, load_weights, official_state_dict, read_metadata
from mobileformer import save_official_checkpoint, save_weights
from mobileformer.config import IMAGENET_MEAN, IMAGENET_STD, VARIANTS
from mobileformer.files import replacing
from mobileformer.keys import module_names, to_official, to_ours

SMALL = "26m"


@pytest.fixture(scope="module")
def source() -> Model:
    """A small model whose every tensor differs from a fresh one."""
    return recipe_model(SMALL, dtype=torch.float32)


@pytest.fixture
def target() -> Model:
    torch.manual_seed(0)
    return Model(SMALL).eval()


def states_equal(first: nn.Module, second: nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# Names


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_names_map_onto_the_published_ones_and_back(variant: str) -> None:
    model = Model(variant, use_fused=False)
    published = published_keys(variant)
    state = official_state_dict(model)
    assert [(key, tuple(value.shape)) for key, value in state.items()] == [(k, s) for k, s, _ in published]
    ours = list(model.state_dict())
    forward = to_official(ours, model.config)
    assert list(forward) == ours
    assert to_ours(forward.values(), model.config) == {official: key for key, official in forward.items()}
    # The order of parameters is what a saved optimizer state goes by.
    parameters = to_official(dict(model.named_parameters()), model.config)
    assert list(parameters.values()) == [key for key, _, kind in published if kind == "param"]


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_no_name_means_two_things(variant: str) -> None:
    names = module_names(VARIANTS[variant])
    assert len(set(names.values())) == len(names)
    keys = list(Model(variant, use_fused=False).state_dict())
    assert not set(keys) & {key for key, _, _ in published_keys(variant)}
    assert to_ours(keys, VARIANTS[variant]) == {}
    assert to_official(["blocks.0.nothing.weight", "weight", "tokens.weight"], VARIANTS[variant]) == {}


def test_official_state_dict_shares_the_tensors(source: Model) -> None:
    assert official_state_dict(source)["stem.0.weight"].data_ptr() == source.stem.conv.weight.data_ptr()


# Our own files


def test_our_file_describes_itself(source: Model, target: Model, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    labels = [f"class {i} – ü" for i in range(1000)]
    save_weights(source, path, labels=labels)
    metadata = read_metadata(path)
    assert metadata == mobileformer.Metadata(
        SMALL, 1000, 3, False, tuple(labels), IMAGENET_MEAN, IMAGENET_STD
    )
    load_weights(target, path)
    assert states_equal(source, target)
    built = load_model(path, use_fused=False)
    assert states_equal(source, built)
    assert not built.training
    assert not built.use_fused
    assert os.listdir(tmp_path) == [path.name]


def test_our_file_keeps_an_unusual_model(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    model = Model(SMALL, num_classes=7, in_chans=2, spatial_dynamic_relu=True).to(torch.bfloat16)
    save_weights(model, path)
    metadata = read_metadata(path)
    assert (metadata.num_classes, metadata.in_chans, metadata.spatial_dynamic_relu) == (7, 2, True)
    assert metadata.labels is None
    assert metadata.mean is None
    assert load_file(path)["tokens"].dtype == torch.bfloat16
    built = load_model(path)
    assert built.spatial_dynamic_relu
    assert built.tokens.dtype == torch.float32
    assert states_equal(built, model.float())
    save_weights(model, path, mean=[0.5, 0.25], std=[1.0, 2.0])
    assert read_metadata(path).mean == (0.5, 0.25)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"labels": ["a", "b"]}, "labels: expected 1000"),
        ({"mean": [0.5]}, "mean: expected 3"),
        ({"std": [0.5] * 4}, "std: expected 3"),
    ],
)
def test_saving_checks_lengths(source: Model, tmp_path: Path, argument: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        save_weights(source, tmp_path / "x.safetensors", **argument)
    assert os.listdir(tmp_path) == []


def test_saving_replaces_whole_files_only(source: Model, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"before")
    with pytest.raises(RuntimeError, match="disk full"), replacing(path) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError("disk full")
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == [path.name]
    save_weights(source, path)
    assert read_metadata(path).variant == SMALL
    with pytest.raises(FileNotFoundError, match="nowhere"):
        save_weights(source, tmp_path / "nowhere" / "x.safetensors")


def test_a_file_of_another_variant_is_named(source: Model, tmp_path: Path) -> None:
    save_weights(source, tmp_path / "w.safetensors")
    model = Model("52m")
    with pytest.raises(WeightsError, match="holds the variant 26m, the model is 52m"):
        load_weights(model, tmp_path / "w.safetensors")


def test_other_spatial_mode_warns(source: Model, tmp_path: Path) -> None:
    save_weights(source, tmp_path / "w.safetensors")
    model = Model(SMALL, spatial_dynamic_relu=True)
    with pytest.warns(UserWarning, match="same parameters, other outputs"):
        load_weights(model, tmp_path / "w.safetensors")
    assert states_equal(source, model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": "2"}, "format version 2"),
        ({"format_version": "one"}, "damaged"),
        ({"num_classes": "many"}, "damaged"),
        ({"variant": None}, "damaged"),
        ({"variant": "295m"}, "unknown variant '295m'"),
        ({"labels": json.dumps(["only one"])}, "labels: expected 1000"),
        ({"mean": "[0.1"}, "damaged"),
    ],
)
def test_damaged_metadata(source: Model, tmp_path: Path, changes: dict, message: str) -> None:
    path = tmp_path / "w.safetensors"
    metadata = {
        "format": "mobileformer",
        "format_version": "1",
        "variant": SMALL,
        "num_classes": "1000",
        "in_chans": "3",
        "spatial_dynamic_relu": "false",
    } | changes
    save_file(source.state_dict(), path, metadata={k: v for k, v in metadata.items() if v is not None})
    for read in (read_metadata, load_model):
        with pytest.raises(WeightsError, match=message):
            read(path)


# Published checkpoints


def optimizer_state(model: Model) -> dict:
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    model.zero_grad()
    return optimizer.state_dict()


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
@pytest.mark.parametrize("zip_format", [True, False], ids=["zip", "pickle stream"])
def test_published_checkpoint(
    source: Model, target: Model, tmp_path: Path, prefix: str, zip_format: bool
) -> None:
    path = tmp_path / "mobile-former-26m.pth.tar"
    checkpoint = {
        "epoch": 449,
        "arch": "mobile_former_26m",
        "state_dict": OrderedDict((prefix + k, v) for k, v in official_state_dict(source).items()),
        "optimizer": optimizer_state(Model(SMALL)),
        "args": argparse.Namespace(model="mobile_former_26m", lr=8e-4, mean=None, sizes=[3, 224], amp=False),
        "version": 2,
    }
    torch.save(checkpoint, path, _use_new_zipfile_serialization=zip_format)
    load_weights(target, path)
    assert states_equal(source, target)
    assert read_metadata(path).variant == SMALL
    assert states_equal(source, load_model(path))


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_the_variant_of_a_published_checkpoint_is_read_off_its_shapes(variant: str, tmp_path: Path) -> None:
    model = Model(variant, num_classes=3, in_chans=1)
    path = tmp_path / "checkpoint.pth.tar"
    save_official_checkpoint(model, path)
    assert list(torch.load(path, weights_only=True)["state_dict"]) == [k for k, _, _ in published_keys(variant)]
    metadata = read_metadata(path)
    assert (metadata.variant, metadata.num_classes, metadata.in_chans) == (variant, 3, 1)
    assert states_equal(model, load_model(path))


def test_names_tell_the_kind_of_a_dict(source: Model, target: Model) -> None:
    ours, published = source.state_dict(), official_state_dict(source)
    for state in (
        ours,
        published,
        {"state_dict": published},
        {"state_dict": ours, "epoch": 3},
        {f"module.{key}": value.double() for key, value in published.items()},
    ):
        fresh = Model(SMALL)
        load_weights(fresh, state)
        assert states_equal(source, fresh)


def test_loading_keeps_dtype_and_sharing(source: Model) -> None:
    model = Model(SMALL).double()
    pointer = model.tokens.data_ptr()
    load_weights(model, source.state_dict())
    assert model.tokens.dtype == torch.float64
    assert model.tokens.data_ptr() == pointer
    assert torch.equal(model.tokens, source.tokens.double())


def test_published_names_in_safetensors(source: Model, target: Model, tmp_path: Path) -> None:
    path = tmp_path / "converted.safetensors"
    save_file(official_state_dict(source), path)
    load_weights(target, path)
    assert states_equal(source, target)
    assert states_equal(source, load_model(path))


def test_wrapped_models(source: Model) -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    model = Model(SMALL)
    load_weights(torch.compile(Wrapper(model)), source.state_dict())
    assert states_equal(source, model)
    with pytest.raises(TypeError, match=r"model: expected a mobileformer\.Model, got Linear"):
        load_weights(nn.Linear(1, 1), source.state_dict())
    with pytest.raises(TypeError, match="got InferenceModel"):
        official_state_dict(source.to_inference())


# What must be refused


class Payload:
    """Unpickling this runs a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("kind", ["zip", "stream", "plain pickle"])
def test_code_in_a_checkpoint_is_refused_and_not_run(
    source: Model, target: Model, tmp_path: Path, kind: str
) -> None:
    marker, path = tmp_path / "was-run", tmp_path / "evil.pth.tar"
    checkpoint = {"state_dict": official_state_dict(source), "args": Payload(marker)}
    if kind == "plain pickle":
        path.write_bytes(pickle.dumps(checkpoint))
    else:
        torch.save(checkpoint, path, _use_new_zipfile_serialization=kind == "zip")
    before = snapshot(target)
    for read in (lambda: load_weights(target, path), lambda: load_model(path), lambda: read_metadata(path)):
        with pytest.raises(WeightsError, match=r"evil\.pth\.tar: refused.*nothing in it was run"):
            read()
    assert not marker.exists()
    assert unchanged(target, before)
    if kind == "zip":
        torch.load(path, weights_only=False)
        assert marker.exists()  # the payload does work


def test_the_extra_class_is_allowed_for_one_read_only(source: Model, tmp_path: Path) -> None:
    path = tmp_path / "c.pth.tar"
    torch.save({"state_dict": official_state_dict(source), "args": argparse.Namespace(a=1)}, path)
    load_weights(Model(SMALL), path)
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


@pytest.mark.parametrize("naming", ["ours", "published"])
def test_every_wrong_key_is_named_as_in_the_file(source: Model, target: Model, naming: str) -> None:
    state = dict(source.state_dict() if naming == "ours" else official_state_dict(source))
    fc, query, running = {
        "ours": ("head.fc.weight", "blocks.3.former.query.bias", "stem.norm.running_var"),
        "published": ("classifier.fc.0.weight", "features.3.global_block.q.bias", "stem.1.running_var"),
    }[naming]
    del state[query]
    state["extra.weight"] = torch.zeros(1)
    state[fc] = state[fc][:, :-1]
    state[running] = state[running].clone()
    state[running][1] = float("nan")
    scale = next(key for key in state if key.endswith("norm.weight"))
    state[scale] = state[scale].to(torch.int64)
    before = snapshot(target)
    with pytest.raises(WeightsError) as caught:
        load_weights(target, state)
    message = str(caught.value)
    assert f"missing: {query}" in message
    assert "unexpected: extra.weight" in message
    assert f"wrong shape: {fc} is 1024x703, the model has 1024x704" in message
    assert f"not finite: {running}" in message
    assert f"wrong dtype: {scale}" in message
    assert message.count("\n") == 5
    assert unchanged(target, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(source: Model, target: Model, value: float) -> None:
    state = snapshot(source)
    state["tokens"][2, 5] = value
    with pytest.raises(WeightsError, match="not finite: tokens"):
        load_weights(target, state)


def test_other_classes_only_when_asked(source: Model) -> None:
    model = Model(SMALL, num_classes=10)
    before = snapshot(model)
    with pytest.raises(WeightsError, match=r"classifier\.classifier\.1\.bias is 1000.*allow_new_head=True"):
        load_weights(model, official_state_dict(source))
    assert unchanged(model, before)
    load_weights(model, official_state_dict(source), allow_new_head=True)
    after = model.state_dict()
    for key, value in source.state_dict().items():
        if key.startswith("head.classifier."):
            assert torch.equal(after[key], before[key])
        else:
            assert torch.equal(after[key], value)


def test_allowing_a_new_head_allows_nothing_else(source: Model, target: Model) -> None:
    with pytest.raises(WeightsError, match=r"wrong shape: stem\.conv\.weight is 8x3x3x3, the model has 8x1x3x3"):
        load_weights(Model(SMALL, num_classes=10, in_chans=1), source.state_dict(), allow_new_head=True)
    load_weights(target, source.state_dict(), allow_new_head=True)  # same classes: the head is loaded
    assert states_equal(source, target)


def test_files_that_are_no_weights(target: Model, tmp_path: Path) -> None:
    empty, text, folder = tmp_path / "empty", tmp_path / "text", tmp_path / "folder"
    empty.touch()
    text.write_text("<!DOCTYPE html> a download page instead of the file")
    folder.mkdir()
    for path, message in (
        (empty, "the file is empty"),
        (text, "neither a safetensors file nor a checkpoint"),
        (folder, "expected a file, got a folder"),
    ):
        with pytest.raises(WeightsError, match=message):
            load_weights(target, path)
    with pytest.raises(FileNotFoundError, match="absent"):
        load_weights(target, tmp_path / "absent")
    with pytest.raises(TypeError, match="path_or_state_dict: expected a path or a dict, got int"):
        load_weights(target, 3)


@pytest.mark.parametrize("kind", ["safetensors", "zip", "stream"])
def test_cut_off_files(source: Model, target: Model, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "w"
    if kind == "safetensors":
        save_weights(source, path)
    else:
        torch.save(official_state_dict(source), path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    before = snapshot(target)
    for size in (1, 5, 8, 9, 64, 500, 5000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(WeightsError, match=str(path)):
            load_weights(target, path)
    assert unchanged(target, before)


def test_damaged_pickles_never_end_in_another_error(source: Model, target: Model, tmp_path: Path) -> None:
    path = tmp_path / "w"
    torch.save({"state_dict": {"tokens": torch.zeros(2)}}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        damaged = bytearray(whole)
        for position in torch.randint(1, len(whole), (3,), generator=generator).tolist():
            damaged[position] = int(torch.randint(256, (), generator=generator))
        path.write_bytes(damaged)
        with pytest.raises(WeightsError):
            load_weights(target, path)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "holds no weights"),
        ({"state_dict": {}}, "holds no weights"),
        ({"epoch": 3}, "got int under 'epoch'"),
        ({3: torch.zeros(1)}, "under 3"),
        ({"conv1.weight": torch.zeros(1)}, "no key belongs to a Mobile-Former, it starts with conv1.weight"),
    ],
)
def test_dicts_that_are_no_weights(target: Model, state: dict, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        load_weights(target, state)


def test_a_checkpoint_that_is_no_dict(target: Model, tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(WeightsError, match="expected a dict of tensors, got list"):
        load_weights(target, tmp_path / "list.pth")


def test_shapes_of_no_variant(source: Model, tmp_path: Path) -> None:
    state = dict(official_state_dict(source))
    state["stem.1.weight"] = torch.zeros(9)
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(WeightsError, match="belong to none of 26m, 52m"):
        load_model(tmp_path / "odd.pth")
