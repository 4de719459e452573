"""What is no weights for this model must be refused by name, run nothing and change nothing."""

from __future__ import annotations

import argparse
import os
import pickle
from pathlib import Path

import pytest
import torch
from golden_support import recipe_model
from weights_support import snapshot, states_equal, unchanged

from mobileformer import (
    Model,
    WeightsError,
    load_model,
    load_weights,
    official_state_dict,
    read_metadata,
    save_weights,
)

SMALL = "26m"


@pytest.fixture(scope="module")
def source() -> Model:
    """A small model whose every tensor differs from a fresh one."""
    return recipe_model(SMALL, dtype=torch.float32)


@pytest.fixture
def target() -> Model:
    torch.manual_seed(0)
    return Model(SMALL).eval()


class Payload:
    """Unpickling this runs a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("kind", ["zip", "stream", "plain pickle"])
def test_code_in_a_checkpoint_is_refused_and_not_run(source: Model, target: Model, tmp_path: Path, kind: str) -> None:
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
