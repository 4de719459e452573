"""Folded networks: what folding gives, and a reader of files that meets anything with a clean error."""

from __future__ import annotations

import copy
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from engine_support import exact_model, folded, needs_engine
from golden_support import recipe_model
from torch import nn

from mobileformer import Metadata, Model, WeightsError, load_model, save_weights
from mobileformer.config import VARIANTS
from mobileformer.files.safetensors import read_safetensors
from mobileformer.inference import Engine, FoldedNetwork, fold
from mobileformer.inference.folded import array_shapes
from mobileformer.measure.difference import lively_weights_

Rows = dict[str, dict]


# Folding


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_names_and_shapes_are_those_of_the_state_dict(variant: str) -> None:
    """Written down apart from the model, for an environment that has none."""
    model = Model(variant, num_classes=7, in_chans=2)
    network = fold(model, labels=list("abcdefg"))
    shapes = array_shapes(network.metadata)
    assert list(network.arrays) == list(shapes)
    assert {name: array.shape for name, array in network.arrays.items()} == shapes
    norms = [name for name, part in model.named_modules() if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d)]
    left = [key for key in model.state_dict() if key.rpartition(".")[0] not in norms]
    assert {key.replace(".conv.", ".") for key in left} == {
        name for name in shapes if not (f"{name.rpartition('.')[0]}.conv.weight" in left and name.endswith("bias"))
    }


@pytest.mark.parametrize("spatial", [False, True])
def test_folded_values(spatial: bool) -> None:
    """A norm after its convolution, the scales of three attentions, the rest as it was; rounded once from float64."""
    model = exact_model("26m", spatial)
    network = fold(model)
    assert network.metadata.spatial_dynamic_relu == spatial
    state = {key: value.numpy() for key, value in model.state_dict().items()}

    def check(name: str, value: np.ndarray) -> None:
        array = network.arrays[name]
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, value, rtol=6.1e-8, atol=1e-30)  # half an ulp

    for conv in ("stem", "blocks.1.expand", "blocks.2.down", "head.expand"):
        scale = state[f"{conv}.norm.weight"] / np.sqrt(state[f"{conv}.norm.running_var"] + 1e-5)
        check(f"{conv}.weight", state[f"{conv}.conv.weight"] * scale[:, None, None, None])
        check(f"{conv}.bias", state[f"{conv}.norm.bias"] - state[f"{conv}.norm.running_mean"] * scale)
    scale = state["head.norm.weight"] / np.sqrt(state["head.norm.running_var"] + 1e-5)
    check("head.fc.weight", state["head.fc.weight"] * scale[:, None])
    check("head.fc.bias", (state["head.fc.bias"] - state["head.norm.running_mean"]) * scale + state["head.norm.bias"])
    for leaf in ("weight", "bias"):
        for layer, width in (
            ("blocks.1.mobile_to_former.query", 12 / 2),
            ("mobile_to_former.query", 96 / 2),
            ("blocks.2.former.query", 128 / 4),
            ("blocks.2.former_to_mobile.key", 24 / 2),
        ):
            check(f"{layer}.{leaf}", state[f"{layer}.{leaf}"] * width**-0.5)
        for layer in ("blocks.1.mobile_to_former.gate", "blocks.1.former.project", "head.classifier"):
            check(f"{layer}.{leaf}", state[f"{layer}.{leaf}"])
    check("tokens", state["tokens"])


def test_folding_leaves_the_model_alone() -> None:
    model = recipe_model("26m", dtype=torch.bfloat16).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    network = fold(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    kept = network.arrays["tokens"].copy()
    with torch.no_grad():
        model.tokens.zero_()
    np.testing.assert_array_equal(network.arrays["tokens"], kept)
    assert fold(torch.compile(model, backend="eager")).metadata == network.metadata
    with torch.inference_mode():
        assert fold(model).metadata == network.metadata


class Adapter(nn.Linear):
    """A linear layer with more to it."""


def put_adapter(model: Model) -> None:
    model.blocks[1].former.project = Adapter(128, 128)


def prune(model: Model) -> None:
    from torch.nn.utils import prune

    prune.l1_unstructured(model.head.classifier, "weight", 0.5)


def parametrize(model: Model) -> None:
    torch.nn.utils.parametrizations.weight_norm(model.head.classifier)


def hook(model: Model) -> None:
    model.blocks[2].register_forward_hook(lambda *args: None)


def no_statistics(model: Model) -> None:
    model.head.norm = nn.BatchNorm1d(1024, track_running_stats=False)


def other_eps(model: Model) -> None:
    model.mobile_to_former.norm.eps = 1e-3


def not_finite(model: Model) -> None:
    model.blocks[1].expand.norm.running_var[3] = float("nan")


def more_than_float32(model: Model) -> None:
    model.double().head.classifier.bias.data[0] = 1e300


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put_adapter, r"cannot be folded: blocks\.1\.former\.project is a Adapter"),
        (prune, r"cannot be folded: head\.classifier has a weight_orig, expected none"),
        (parametrize, r"cannot be folded: head\.classifier is a Parametrized"),
        (hook, r"cannot be folded: blocks\.2 has a hook"),
        (no_statistics, r"cannot be folded: head\.norm keeps no running statistics"),
        (other_eps, r"cannot be folded: mobile_to_former\.norm has eps 0\.001"),
        (not_finite, r"not finite: blocks\.1\.expand\.weight"),
        (more_than_float32, r"not finite: head\.classifier\.bias"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_cannot_be_folded_is_told(change: Callable[[Model], None], message: str) -> None:
    model = Model("26m")
    change(model)
    with pytest.raises(ValueError, match=message):
        fold(model)


def test_synchronised_norms_are_folded_like_others() -> None:
    model = recipe_model("26m")
    expected = fold(model)
    for name, array in fold(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))).arrays.items():
        np.testing.assert_array_equal(array, expected.arrays[name])


def test_a_model_of_another_class_is_refused() -> None:
    class Mine(Model):
        pass

    with pytest.raises(ValueError, match="cannot be folded: the model is a Mine"):
        fold(Mine("26m"))
    with pytest.raises(TypeError, match=r"model: expected a mobileformer\.Model, got Linear"):
        fold(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="labels: expected 1000, one for each of the classes, got 2"):
        fold(Model("26m"), labels=["a", "b"])
    for wrong in ([1.0, 0.0, 1.0], [1.0, -1.0, 1.0], [1.0, float("inf"), 1.0]):
        with pytest.raises(ValueError, match="std: expected positive numbers"):
            fold(Model("26m"), std=wrong)
    with pytest.raises(ValueError, match="mean: expected finite numbers"):
        fold(Model("26m"), mean=[0.0, 0.0, float("nan")])


def test_a_network_made_by_hand_is_checked() -> None:
    network = folded("26m")
    arrays = dict(network.arrays)
    del arrays["tokens"]
    arrays["stem.weight"] = arrays["stem.weight"].astype(np.float64)
    arrays["head.fc.bias"] = arrays["head.fc.bias"][:-1]
    arrays["more"] = np.zeros(3, np.float32)
    arrays["head.classifier.weight"] = torch.zeros(1000, 1024)
    with pytest.raises(ValueError, match="arrays: not a folded network") as caught:
        FoldedNetwork(network.metadata, arrays)
    for line in (
        "missing: tokens",
        "unexpected: more",
        "wrong dtype: stem.weight: expected a float32, int8 or int16 array, got float64",
        "wrong shape: head.fc.bias is 1023, expected 1024",
        "wrong dtype: head.classifier.weight: expected a float32, int8 or int16 array, got torch.float32",
    ):
        assert line in str(caught.value)


# Files


@pytest.fixture(scope="module")
def small() -> FoldedNetwork:
    model = Model("26m", num_classes=2).eval()
    lively_weights_(model)
    told = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": 64, "crop_fraction": 0.95}
    return fold(model, labels=["cat", "Hündin 🐕"], **told)


def test_a_file_holds_everything(small: FoldedNetwork, tmp_path: Path) -> None:
    path = tmp_path / "network.safetensors"
    small.save(path)
    again = FoldedNetwork.load(path)
    assert again.metadata == small.metadata
    assert again.metadata == Metadata(
        "26m",
        2,
        3,
        labels=("cat", "Hündin 🐕"),
        mean=(0.1, 0.2, 0.3),
        std=(0.4, 0.5, 0.6),
        input_size=64,
        crop_fraction=0.95,
    )
    assert again.config is VARIANTS["26m"]
    assert again.arrays.keys() == small.arrays.keys()
    for name, array in safetensors.numpy.load_file(path).items():  # somebody else's reader sees the same
        np.testing.assert_array_equal(array, small.arrays[name])
        np.testing.assert_array_equal(array, again.arrays[name])
    small.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["network.safetensors"]


def test_a_file_appears_whole_or_not_at_all(
    small: FoldedNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "network.safetensors"
    path.write_text("precious")

    def fail(arrays: dict, target: Path, metadata: dict) -> None:
        target.write_text("half of it")
        raise OSError("no space left")

    monkeypatch.setattr(safetensors.numpy, "save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        small.save(path)
    assert path.read_text() == "precious"
    assert [p.name for p in tmp_path.iterdir()] == ["network.safetensors"]


def test_files_of_both_kinds_are_told_apart(small: FoldedNetwork, tmp_path: Path) -> None:
    small.save(tmp_path / "folded.safetensors")
    save_weights(Model("26m"), tmp_path / "weights.safetensors")
    with pytest.raises(WeightsError, match=r"folded\.safetensors: holds a network folded for inference.*Engine"):
        load_model(tmp_path / "folded.safetensors")
    with pytest.raises(WeightsError, match=r"weights\.safetensors: not a folded network but"):
        FoldedNetwork.load(tmp_path / "weights.safetensors")
    safetensors.numpy.save_file({"a": np.zeros(2, np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(
        WeightsError, match=r"other\.safetensors: not a folded network but .*`mobileformer convert --fold"
    ):
        FoldedNetwork.load(tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError):
        FoldedNetwork.load(tmp_path / "none.safetensors")
    with pytest.raises(WeightsError, match="expected a file, got a folder"):
        FoldedNetwork.load(tmp_path)


def write(path: Path, header: object, size: int, *, length: int | None = None) -> Path:
    """A file with that header and `size` bytes of zeros."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(size))
    return path


def row(begin: int, end: int, *shape: int, dtype: object = "F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_what_a_header_may_be(tmp_path: Path) -> None:
    path = write(tmp_path / "a", {"b": row(8, 8, 0, 5), "a": row(0, 8, 2), "s": row(8, 12)}, 12)
    arrays, metadata = read_safetensors(path)
    assert {name: array.shape for name, array in arrays.items()} == {"a": (2,), "b": (0, 5), "s": ()}
    assert metadata == {}
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.float32)}
    path = write(tmp_path / "b", b'{"__metadata__": {"x": "y"}}   ', 0)
    assert read_safetensors(path) == ({}, {"x": "y"})


@pytest.mark.parametrize(
    ("header", "size", "message"),
    [
        ({"a": row(0, 8, 2)}, 4, "cut off: its header tells of 8 bytes of arrays, the file has 4"),
        ({"a": row(0, 8, 2)}, 9, "something follows the arrays: its header tells of 8 bytes of arrays"),
        ({"a": row(4, 8, 1)}, 8, "a: begins at byte 4, the array before ends at 0"),
        ({"a": row(0, 8, 2), "b": row(4, 12, 2)}, 12, "b: begins at byte 4, the array before ends at 8"),
        ({"a": row(0, 8, 2), "b": row(12, 16, 1)}, 16, "b: begins at byte 12, the array before ends at 8"),
        ({"a": row(0, 8, 2), "b": row(0, 8, 2)}, 8, "b: begins at byte 0, the array before ends at 8"),
        ({"a": row(8, 0, 2)}, 8, "a: -8 bytes for the shape"),
        ({"a": row(0, 8, 3)}, 8, "a: 8 bytes for the shape"),
        ({"a": row(0, 8, -2)}, 8, "a: expected lists of whole numbers"),
        ({"a": row(-4, 4, 2)}, 8, "a: expected lists of whole numbers"),
        ({"a": row(0, 8, 2.0)}, 8, "a: expected lists of whole numbers"),
        ({"a": row(0, 8, True, 2)}, 8, "a: expected lists of whole numbers"),
        ({"a": row(0, 8, 2**62, 4, 2)}, 8, "a: 8 bytes for the shape"),
        ({"a": row(0, 0, 2**70, 0)}, 0, "a: 0 bytes for the shape"),
        ({"a": row(0, 4, *[1] * 70)}, 4, "a: 4 bytes for the shape"),
        ({"a": row(0, 2**64, 2**62)}, 8, "cut off: its header tells of 18446744073709551616 bytes"),
        ({"a": row(0, 4, 2, dtype="F16")}, 4, "a: expected dtype F32, I8 or I16, got 'F16'"),
        ({"a": row(0, 4, 2, dtype="U8")}, 4, "a: expected dtype F32, I8 or I16, got 'U8'"),
        ({"a": row(0, 4, 2, dtype="I32")}, 4, "a: expected dtype F32, I8 or I16, got 'I32'"),
        ({"a": row(0, 4, 2, dtype="i8")}, 4, "a: expected dtype F32, I8 or I16, got 'i8'"),
        ({"a": row(0, 4, 1, dtype="I8")}, 4, "a: 4 bytes for the shape"),
        ({"a": row(0, 3, 2, dtype="I16")}, 3, "a: 3 bytes for the shape"),
        ({"a": row(0, 3, 3, dtype="I8"), "b": row(4, 8, 1)}, 8, "b: begins at byte 4, the array before ends at 3"),
        ({"a": row(0, 8, 2, dtype=["F32"])}, 8, "a: expected dtype F32, I8 or I16, got"),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, "a: expected dtype, shape and data_offsets"),
        ({"a": [0, 8]}, 8, "a: expected dtype, shape and data_offsets"),
        ({"a": {**row(0, 8, 2), "shape": None}}, 8, "a: expected lists"),
        ({"a": {**row(0, 8, 2), "data_offsets": [0]}}, 8, "a: expected lists"),
        ({"__metadata__": {"x": 1}}, 0, "__metadata__: expected text"),
        ({"__metadata__": ["x"]}, 0, "__metadata__: expected text"),
        (b'{"a": 1, "a": 2}', 0, "a name stands there twice"),
        (b'{"a": ', 0, "its header is damaged"),
        (b'{"\xff": 1}', 0, "its header is damaged"),
        (b"{" * 10, 0, "its header is damaged"),
        (b'{"a":' * 100_000, 0, "its header is damaged"),
        (b'{"a":' + b"9" * 10_000 + b"}", 0, "its header is damaged"),
        (b"[1, 2]", 0, "not a safetensors file"),
        (b" {}", 0, "not a safetensors file"),
        (b"", 0, "not a safetensors file"),
    ],
)
def test_a_header_that_lies_is_told(tmp_path: Path, header: Rows | bytes, size: int, message: str) -> None:
    path = write(tmp_path / "lies.safetensors", header, size)
    with pytest.raises(WeightsError, match=r"lies\.safetensors: ") as caught:
        read_safetensors(path)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("length", [0, 1, 2**20, 2**31, 2**63, 2**64 - 1])
def test_a_length_that_lies_is_told(tmp_path: Path, length: int) -> None:
    with pytest.raises(WeightsError, match="safetensors file"):
        FoldedNetwork.load(write(tmp_path / "a", {"a": row(0, 8, 2)}, 8, length=length))


def test_a_file_cut_anywhere_is_told(small: FoldedNetwork, tmp_path: Path) -> None:
    path = tmp_path / "network.safetensors"
    small.save(path)
    content = path.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    cuts = [*range(10), 100, begin - 1, begin, begin + 1, begin + 4, len(content) // 2, len(content) - 1]
    for cut in cuts:
        path.write_bytes(content[:cut])
        with pytest.raises(WeightsError, match=r"network\.safetensors: ") as caught:
            FoldedNetwork.load(path)
        assert any(words in str(caught.value) for words in ("cut off", "not a safetensors file", "empty")), cut


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, a: m.update(format_version="3"), "format version 3, this package reads up to 2; update it"),
        (lambda m, a: m.update(format_version="x"), "its metadata is damaged"),
        (lambda m, a: m.update(variant="295m"), "unknown variant '295m'"),
        (lambda m, a: m.update(variant="52m"), "wrong shape: blocks.0.project.weight is 12x6x1x1, expected 12x24x1x1"),
        (lambda m, a: m.update(num_classes="3"), "labels: expected 3"),
        (lambda m, a: m.update(num_classes="-1"), "num_classes: expected at least 1, got -1"),
        (lambda m, a: m.update(num_classes="9" * 5000), "its metadata is damaged"),
        (lambda m, a: m.update(in_chans="1"), "its metadata is damaged"),
        (lambda m, a: m.pop("in_chans"), "its metadata is damaged"),
        (lambda m, a: m.update(spatial_dynamic_relu="1"), "spatial_dynamic_relu: expected true or false"),
        (lambda m, a: m.update(labels='"ab"'), "labels: expected a list, got str"),
        (lambda m, a: m.update(labels="[" * 100_000), "its metadata is damaged"),
        (lambda m, a: m.update(mean="[0, NaN, 0]"), "mean: expected finite numbers"),
        (lambda m, a: m.update(std="[1, 0, 1]"), "std: expected positive numbers"),
        (lambda m, a: m.update(std="[1, 1e999, 1]"), "std: expected positive numbers"),
        (lambda m, a: m.update(std=f"[1, {10**400}, 1]"), "its metadata is damaged"),
        (lambda m, a: m.update(format="other"), "not a folded network"),
        (lambda m, a: a.pop("stem.bias"), "missing: stem.bias"),
        (lambda m, a: a.update(extra=np.zeros(1, np.float32)), "unexpected: extra"),
        (lambda m, a: a.update(tokens=np.zeros((3, 127), np.float32)), "wrong shape: tokens is 3x127, expected 3x128"),
        (
            lambda m, a: a.update(tokens=np.zeros((3, 128), np.float16)),
            "tokens: expected dtype F32, I8 or I16, got 'F16'",
        ),
        (lambda m, a: a.update(tokens=np.full((3, 128), np.nan, np.float32)), "not finite: tokens holds NaN"),
        (lambda m, a: a["tokens"].__setitem__((2, 127), -np.inf), "not finite: tokens holds NaN or infinity"),
    ],
)
def test_what_does_not_fit_the_variant_is_told(
    small: FoldedNetwork, tmp_path: Path, change: Callable[[dict, dict], object], message: str
) -> None:
    path = tmp_path / "network.safetensors"
    small.save(path)
    with safetensors.safe_open(path, framework="numpy") as file:
        metadata, arrays = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(metadata, arrays)
    safetensors.numpy.save_file(arrays, path, metadata)
    with pytest.raises(WeightsError, match=r"network\.safetensors: ") as caught:
        FoldedNetwork.load(path)
    assert message in str(caught.value)


def test_arrays_of_integers_are_read_wherever_they_lie(tmp_path: Path) -> None:
    """Behind three bytes nothing is at a multiple of its size; compiled code must be able to read it all the same."""
    expected = {
        "a": np.array([-128, 0, 127], np.int8),
        "b": np.array([-0.5, 3], np.float32),
        "c": np.array([[-32768, 258]], np.int16),
    }
    header = {"a": row(0, 3, 3, dtype="I8"), "b": row(3, 11, 2), "c": row(11, 15, 1, 2, dtype="I16")}
    path = write(tmp_path / "a", header, 0)
    path.write_bytes(path.read_bytes() + b"".join(array.tobytes() for array in expected.values()))
    arrays, _ = read_safetensors(path)
    assert arrays.keys() == expected.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, expected[name], strict=True)
        assert array.flags.aligned
        assert not array.flags.writeable


def quantised(network: FoldedNetwork, dtype: type, *names: str) -> dict[str, np.ndarray]:
    """The network's arrays, those of that name in steps of the dtype's largest integer."""
    arrays, largest = dict(network.arrays), np.iinfo(dtype).max
    for name in names:
        scale = np.abs(arrays[name]).reshape(len(arrays[name]), -1).max(1) / largest
        steps = arrays[name] / scale.reshape(-1, *[1] * (arrays[name].ndim - 1))
        arrays |= {name: np.rint(steps).astype(dtype), f"{name}.scale": scale.astype(np.float32)}
    return arrays


EIGHT = ("blocks.0.project.weight", "blocks.1.depthwise.weight")
SIXTEEN = ("head.classifier.weight", "blocks.2.former.query.weight")


@pytest.fixture
def integers(small: FoldedNetwork) -> dict[str, np.ndarray]:
    return quantised(FoldedNetwork(small.metadata, quantised(small, np.int8, *EIGHT)), np.int16, *SIXTEEN)


def test_weights_may_be_integers(small: FoldedNetwork, integers: dict[str, np.ndarray], tmp_path: Path) -> None:
    network = FoldedNetwork(small.metadata, integers)
    assert small.integers == ()
    assert set(network.integers) == {*EIGHT, *SIXTEEN}
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    network.save(first)
    again = FoldedNetwork.load(first)
    assert again.metadata == network.metadata
    assert again.arrays.keys() == integers.keys()
    for name, array in again.arrays.items():
        np.testing.assert_array_equal(array, integers[name], strict=True)
    again.save(second)
    for name, array in safetensors.numpy.load_file(second).items():  # somebody else's reader, of what is written back
        np.testing.assert_array_equal(array, integers[name], strict=True)
    small.save(second)
    for path, version in ((first, "2"), (second, "1")):  # files of floats stay what older releases read
        with safetensors.safe_open(path, framework="numpy") as file:
            assert file.metadata()["format_version"] == version


@needs_engine
def test_todays_engine_refuses_integers(small: FoldedNetwork, integers: dict[str, np.ndarray], tmp_path: Path) -> None:
    network = FoldedNetwork(small.metadata, integers)
    network.save(tmp_path / "a.safetensors")
    for source in (network, tmp_path / "a.safetensors"):
        with pytest.raises(
            ValueError, match=r"^source: expected a network of float32 arrays, got int\d+ in "
        ) as caught:
            Engine(source)
        assert str(caught.value).endswith(" and integers in 3 more, which this engine does not run")
        assert "\n" not in str(caught.value)
    only = quantised(small, np.int8, EIGHT[0])
    with pytest.raises(ValueError, match=rf"got int8 in {EIGHT[0]}, which this engine does not run$"):
        Engine(FoldedNetwork(small.metadata, only))


SCALE = f"{EIGHT[0]}.scale"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop(SCALE), f"missing: {SCALE}"),
        (lambda a: a.update({SCALE: a[SCALE][:-1]}), f"wrong shape: {SCALE} is 11, expected 12"),
        (lambda a: a.update({SCALE: a[SCALE][:, None]}), f"wrong shape: {SCALE} is 12x1, expected 12"),
        (lambda a: a.update({SCALE: np.array(0.5, np.float32)}), f"wrong shape: {SCALE} is a scalar, expected 12"),
        (
            lambda a: a.update({SCALE: np.ones(12, np.int8)}),
            f"wrong dtype: {SCALE}: expected a float32 array, got int8",
        ),
        (lambda a: a[SCALE].__setitem__(3, np.nan), f"not finite: {SCALE} holds NaN or infinity"),
        (lambda a: a[SCALE].__setitem__(11, np.inf), f"not finite: {SCALE} holds NaN or infinity"),
        (lambda a: a[SCALE].__setitem__(0, 0), f"out of range: {SCALE}: expected positive numbers, got 0"),
        (lambda a: a[SCALE].__setitem__(5, -0.5), f"out of range: {SCALE}: expected positive numbers, got -0.5"),
        (lambda a: a[SCALE].__setitem__(5, 3e38), f"out of range: {SCALE}: times the largest integer, 3e+38 is no"),
        (lambda a: a[EIGHT[0]].__setitem__((2, 3), -128), f"out of range: {EIGHT[0]}: expected integers from -127"),
        (
            lambda a: a[SIXTEEN[0]].__setitem__((1, 3), -32768),
            f"{SIXTEEN[0]}: expected integers from -32767, got -32768",
        ),
        (lambda a: a.update({EIGHT[0]: a[EIGHT[0]][:-1]}), f"wrong shape: {EIGHT[0]} is 11x"),
        (lambda a: a.update({EIGHT[0]: a[EIGHT[0]].astype(np.float32)}), f"unexpected: {SCALE}"),
        (lambda a: a.update({"stem.weight.scale": np.ones(8, np.float32)}), "unexpected: stem.weight.scale"),
        (lambda a: a.update({"stem.bias": np.zeros(8, np.int8)}), "stem.bias: expected a float32 array, got int8"),
        (lambda a: a.update(tokens=np.zeros((3, 128), np.int16)), "tokens: expected a float32 array, got int16"),
        (
            lambda a: a.update({"mobile_to_former.norm.weight": np.ones(128, np.int8)}),
            "wrong dtype: mobile_to_former.norm.weight: expected a float32 array, got int8",
        ),
    ],
)
def test_integers_that_do_not_fit_are_told(
    small: FoldedNetwork,
    integers: dict[str, np.ndarray],
    tmp_path: Path,
    change: Callable[[dict], object],
    message: str,
) -> None:
    path = tmp_path / "network.safetensors"
    FoldedNetwork(small.metadata, integers).save(path)
    with safetensors.safe_open(path, framework="numpy") as file:
        metadata, arrays = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(arrays)
    safetensors.numpy.save_file(arrays, path, metadata)
    with pytest.raises(WeightsError, match=r"network\.safetensors: ") as caught:
        FoldedNetwork.load(path)
    assert message in str(caught.value)


def test_the_reader_survives_a_fuzzer() -> None:
    """For a few seconds; `fuzz_folded_file.py` by itself goes on for as long as it is told."""
    script = Path(__file__).with_name("fuzz_folded_file.py")
    done = subprocess.run([sys.executable, script, "6"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)


def test_weights_that_are_not_folded_say_how_to_fold_them(tmp_path: Path) -> None:
    """Told apart by its first bytes and its text, before any array is looked at: weights hold int64 counters."""
    model = Model("26m", num_classes=2)
    weights, zipped, pickled = (tmp_path / name for name in ("my weights.safetensors", "a.pth.tar", "b.pth"))
    save_weights(model, weights)
    torch.save({"state_dict": model.state_dict()}, zipped)
    torch.save({"state_dict": model.state_dict()}, pickled, _use_new_zipfile_serialization=False)
    for path, what in ((weights, "a safetensors file of other contents"), (zipped, "a checkpoint of PyTorch")):
        with pytest.raises(WeightsError) as caught:
            FoldedNetwork.load(path)
        quoted = f"'{path}'" if " " in str(path) else path
        assert str(caught.value) == (
            f"{path}: not a folded network but {what}; "
            f"`mobileformer convert --fold {quoted} OUT.safetensors` makes one from weights"
        )
    with pytest.raises(WeightsError, match="not a folded network but a checkpoint of PyTorch"):
        FoldedNetwork.load(pickled)


def test_only_a_regular_file_is_opened(tmp_path: Path) -> None:
    """A pipe would be waited for, a device never ends."""
    os.mkfifo(tmp_path / "pipe")
    for path, what in ((tmp_path, "a folder"), (tmp_path / "pipe", "a pipe or device"), ("/dev/zero", "a pipe or dev")):
        with pytest.raises(WeightsError, match=f"^{path}: expected a file, got {what}"):
            FoldedNetwork.load(path)
