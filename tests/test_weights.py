"""Weights in and out: names, our own files, published checkpoints."""

from __future__ import annotations

import argparse
import json
import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from golden_support import published_keys, recipe_model
from safetensors.torch import load_file, save_file
from tiny_support import tiny_variants
from torch import nn
from weights_support import states_equal

import mobileformer
from mobileformer import (
    Model,
    WeightsError,
    load_model,
    load_weights,
    official_state_dict,
    read_metadata,
    save_official_checkpoint,
    save_weights,
)
from mobileformer.config import IMAGENET_MEAN, IMAGENET_STD, VARIANTS
from mobileformer.files.replacing import replacing
from mobileformer.weights.checkpoint import read_header
from mobileformer.weights.keys import module_names, to_official, to_ours

SMALL = "tiny"


@pytest.fixture(scope="module", autouse=True)
def variants() -> Iterator[None]:
    """Files are of a small network, where they need not be published ones."""
    with tiny_variants():
        yield


@pytest.fixture(scope="module")
def source() -> Model:
    """A small model whose every tensor differs from a fresh one."""
    return recipe_model(SMALL, dtype=torch.float32)


@pytest.fixture
def target() -> Model:
    torch.manual_seed(0)
    return Model(SMALL).eval()


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
    assert metadata == mobileformer.Metadata(SMALL, 1000, 3, False, tuple(labels), IMAGENET_MEAN, IMAGENET_STD)
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


def test_our_file_says_what_it_was_trained_for(source: Model, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_weights(source, path, input_size=96, crop_fraction=1)
    metadata = read_metadata(path)
    assert (metadata.input_size, metadata.crop_fraction) == (96, 1.0)
    save_weights(source, path)
    assert not {"input_size", "crop_fraction"} & set(read_header(path))
    assert (read_metadata(path).input_size, read_metadata(path).crop_fraction) == (None, None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_the_bytes(source: Model, target: Model, tmp_path: Path, dtype: torch.dtype) -> None:
    path, whole = tmp_path / "half.safetensors", tmp_path / "whole.safetensors"
    save_weights(source, path, dtype=dtype)
    save_weights(source, whole)
    assert path.stat().st_size < 0.52 * whole.stat().st_size
    load_weights(target, path)
    for key, value in source.state_dict().items():
        expected = value.to(dtype).float() if value.is_floating_point() else value
        loaded = target.state_dict()[key]
        assert loaded.dtype == value.dtype, key
        assert torch.equal(loaded, expected), key
    assert source.tokens.dtype == torch.float32
    assert states_equal(load_model(path), target)
    save_weights(load_model(path), whole, dtype=dtype)  # rounding is done once
    assert all(torch.equal(value, load_file(path)[key]) for key, value in load_file(whole).items())


def test_what_half_cannot_hold_is_refused(source: Model, tmp_path: Path) -> None:
    model = Model(SMALL)
    load_weights(model, source.state_dict())
    model.blocks[1].down.norm.running_var[3] = 7e4
    for dtype in (None, torch.bfloat16):
        save_weights(model, tmp_path / "fits.safetensors", dtype=dtype)
    with pytest.raises(ValueError, match=r"blocks\.1\.down\.norm\.running_var holds 70000, more than torch\.float16"):
        save_weights(model, tmp_path / "x.safetensors", dtype=torch.float16)
    with pytest.raises(ValueError, match=r"dtype: expected one of torch\.float16, .* got torch\.int8"):
        save_weights(model, tmp_path / "x.safetensors", dtype=torch.int8)
    assert os.listdir(tmp_path) == ["fits.safetensors"]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"labels": ["a", "b"]}, "labels: expected 1000"),
        ({"input_size": 31}, "input_size: expected at least 32 pixels, got 31"),
        ({"crop_fraction": 0.0}, r"crop_fraction: expected a number in \(0, 1\], got 0.0"),
        ({"crop_fraction": float("nan")}, "crop_fraction: expected a number"),
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

    def write_half() -> None:
        with replacing(path) as temporary:
            temporary.write_bytes(b"half")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_half()
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == [path.name]
    save_weights(source, path)
    assert read_metadata(path).variant == SMALL
    with pytest.raises(FileNotFoundError, match="nowhere"):
        save_weights(source, tmp_path / "nowhere" / "x.safetensors")


def test_others_may_read_a_file_as_the_umask_or_the_file_before_allows(source: Model, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    before = os.umask(0o027)
    try:
        save_weights(source, path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640
    path.chmod(0o604)
    save_weights(source, path)
    assert path.stat().st_mode & 0o777 == 0o604


def test_a_file_of_another_variant_is_named(source: Model, tmp_path: Path) -> None:
    save_weights(source, tmp_path / "w.safetensors")
    model = Model("tiny_ungrouped")
    with pytest.raises(WeightsError, match="holds the variant tiny, the model is tiny_ungrouped"):
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
        ({"input_size": "sixty-four"}, "damaged"),
        ({"input_size": "-64"}, "input_size: expected at least 32"),
        ({"crop_fraction": "1.5"}, "crop_fraction: expected a number"),
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
def test_published_checkpoint(source: Model, target: Model, tmp_path: Path, prefix: str, zip_format: bool) -> None:
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
