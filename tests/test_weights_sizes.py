"""Sizes that a file tells of itself are compared with what it holds before memory is taken for them."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from golden_support import recipe_model
from safetensors.torch import load_file, save_file
from tiny_support import tiny_variants
from weights_support import states_equal

import mobileformer.weights.load
from mobileformer import (
    Model,
    WeightsError,
    load_model,
    load_weights,
    read_metadata,
    save_official_checkpoint,
    save_weights,
)
from mobileformer.inference import FoldedNetwork, fold

SMALL = "tiny"
HUGE = "1" + "0" * 15


@pytest.fixture(scope="module", autouse=True)
def variants() -> Iterator[None]:
    """Files are of a small network."""
    with tiny_variants():
        yield


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sizes") / "w.safetensors"
    save_weights(recipe_model(SMALL, dtype=torch.float32), path)
    return path


def retold(source: Path, target: Path, **changes: str) -> Path:
    """The same arrays under another text: the header is written by hand, as any program may."""
    whole = source.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    header["__metadata__"].update(changes)
    text = json.dumps(header).encode()
    target.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + length :])
    return target


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model is made but on the meta device, where a tensor takes no memory."""

    def on_meta(*arguments: object, **keywords: object) -> Model:
        assert torch.empty(0).device.type == "meta", "memory is taken for a file that does not fit"
        return Model(*arguments, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(mobileformer.weights.load, "Model", on_meta)


@pytest.mark.usefixtures("no_memory")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": "1000000"}, r"head\.classifier\.weight is 1000x48, the model has 1000000x48"),
        ({"in_chans": "4000", "mean": None, "std": None}, r"stem\.conv\.weight is 8x3x3x3, the model has 8x4000x3x3"),
        ({"variant": "508m"}, "does not fit the model"),
    ],
)
def test_a_text_that_is_not_its_arrays_takes_no_memory(ours: Path, tmp_path: Path, changes: dict, message: str) -> None:
    path = tmp_path / "told.safetensors"
    changes = {key: json.dumps([0.5] * 4000) if value is None else value for key, value in changes.items()}
    with pytest.raises(WeightsError, match=message):
        load_model(retold(ours, path, **changes))


@pytest.mark.usefixtures("no_memory")
@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(
            (key, value)
            for key in ("num_classes", "in_chans", "input_size")
            for value in (HUGE, "9" * 4000, "9" * 5000)
        ),
        ("num_classes", "-1"),
        ("input_size", "8193"),
        ("mean", "[1e300, 0, 0]"),
        ("mean", "[NaN, 0, 0]"),
        ("std", "[1e-300, 1, 1]"),
        ("std", "[Infinity, 1, 1]"),
        ("std", "[0, 1, 1]"),
        ("crop_fraction", "1e-300"),
        ("crop_fraction", "nan"),
        ("labels", "[" * 100_000),
        ("variant", "x" * 100_000),
        ("format_version", "9" * 5000),
    ],
)
def test_numbers_out_of_range_are_refused_in_a_line(ours: Path, tmp_path: Path, key: str, value: str) -> None:
    path = retold(ours, tmp_path / "w.safetensors", **{key: value})
    for read in (read_metadata, load_model):
        with pytest.raises(WeightsError) as caught:
            read(path)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < len(str(path)) + 400


@pytest.mark.parametrize(("key", "value"), [("num_classes", "1000000"), ("in_chans", HUGE), ("input_size", HUGE)])
def test_of_a_folded_file_too(tmp_path: Path, key: str, value: str) -> None:
    fold(recipe_model(SMALL)).save(tmp_path / "f.safetensors")
    path = retold(tmp_path / "f.safetensors", tmp_path / "told.safetensors", **{key: value})
    with pytest.raises(WeightsError, match=r"told\.safetensors"):
        FoldedNetwork.load(path)


def test_size_and_crop_together(ours: Path, tmp_path: Path) -> None:
    path = retold(ours, tmp_path / "w.safetensors", input_size="8192", crop_fraction="0.01")
    with pytest.raises(WeightsError, match="resized to more than 32768 pixels"):
        read_metadata(path)


def test_a_header_longer_than_the_file(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    for length in (10**6, 2**40, 2**63):
        path.write_bytes(struct.pack("<Q", length) + b"{}" * 20)
        with pytest.raises(WeightsError, match="not a valid safetensors file"):
            load_model(path)


def test_records_that_unpack_to_more_than_the_file(tmp_path: Path) -> None:
    path, bomb = tmp_path / "w.pth", tmp_path / "bomb.pth"
    torch.save({"state_dict": {"tokens": torch.zeros(2_000_000)}}, path)
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in archive.namelist():
            packed.writestr(name, archive.read(name))
    with pytest.raises(WeightsError, match=r"its records unpack to 8\d+ bytes and the file has"):
        load_model(bomb)


@pytest.mark.usefixtures("no_memory")
@pytest.mark.parametrize("zip_format", [True, False], ids=["zip", "stream"])
def test_shapes_that_repeat_a_few_bytes(ours: Path, tmp_path: Path, zip_format: bool) -> None:
    state = load_file(ours)
    state["head.classifier.weight"] = torch.zeros(1, 1).expand(10**6, 48)
    state["head.classifier.bias"] = torch.zeros(1).expand(10**6)
    torch.save(state, tmp_path / "w.pth", _use_new_zipfile_serialization=zip_format)
    with pytest.raises(WeightsError, match=r"head\.classifier\.\w+: its shape takes \d+ bytes"):
        load_model(tmp_path / "w.pth")


def test_nothing_of_torchs_advice_is_passed_on(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"state_dict": {"tokens": torch.nn.Linear(1, 1)}}, path)
    damaged = tmp_path / "d.pth"
    damaged.write_bytes(b"\x80\x02cos\nsystem\n(S'true'\ntR.")
    for bad in (path, damaged):
        with pytest.raises(WeightsError) as caught:
            load_weights(Model(SMALL), bad)
        assert "weights_only" not in str(caught.value)
        assert "\n" not in str(caught.value)


# There and back


def test_the_published_form_keeps_what_ours_says(tmp_path: Path) -> None:
    model = recipe_model(SMALL, dtype=torch.float32)
    model.spatial_dynamic_relu = False
    labels = tuple(f"class {i} – ü" for i in range(1000))
    told = {"labels": labels, "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "input_size": 96, "crop_fraction": 0.9}
    first, between, last = tmp_path / "a.safetensors", tmp_path / "b.pth.tar", tmp_path / "c.safetensors"
    save_weights(model, first, **told)
    save_official_checkpoint(load_model(first), between, **told)
    assert read_metadata(between) == read_metadata(first)
    content = torch.load(between, weights_only=True)
    assert list(content) == ["state_dict", "mobileformer"]
    save_weights(load_model(between), last, **told)
    assert read_metadata(last) == read_metadata(first)
    assert states_equal(load_model(last), load_model(first))
    assert states_equal(load_model(between), model)


def test_what_a_checkpoint_says_has_to_fit_it(tmp_path: Path) -> None:
    path = tmp_path / "b.pth.tar"
    save_official_checkpoint(recipe_model(SMALL, dtype=torch.float32), path)
    content = torch.load(path, weights_only=True)
    content["mobileformer"]["num_classes"] = "1000000"
    torch.save(content, path)
    with pytest.raises(WeightsError, match="the model has 1000000x48"):
        load_model(path)


def test_arrays_of_a_type_that_torch_lacks_are_refused_in_a_line(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"tokens": torch.zeros(8, dtype=torch.uint8)}, path, metadata={"format": "x"})
    path.write_bytes(path.read_bytes().replace(b'"U8"', b'"Q9"'))
    with pytest.raises(WeightsError) as caught:
        load_model(path)
    assert "\n" not in str(caught.value)
