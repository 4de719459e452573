"""Exports: the network in its other form is the same function, and a file that is not is never left behind."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import zipfile
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from cli_support import NAMES, run, run_json
from tiny_support import TINY, add_tiny, make

import mobileformer
import mobileformer.config
from mobileformer import VARIANTS, Model
from mobileformer.cli import export as command
from mobileformer.export import BOUND, ExportError, Report, check, export_model, job, to_executorch
from mobileformer.export.plain import ExportNetwork
from mobileformer.measure.difference import lively_weights_

# Without the compiled library the model runs on the reference and says so; the numbers are the same.
pytestmark = pytest.mark.filterwarnings("ignore::mf_kernels.KernelFallbackWarning")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Model:
    return add_tiny(monkeypatch)


@pytest.fixture
def tiniest(monkeypatch: pytest.MonkeyPatch) -> Model:
    """ "tiny" of one block, for targets that are slow; the others see the rest of the graph."""
    config = dataclasses.replace(TINY, blocks=TINY.blocks[1:2])
    monkeypatch.setattr(mobileformer.config, "VARIANTS", MappingProxyType(VARIANTS | {"tiny": config}))
    return make("tiny")


def needs(*modules: str) -> None:
    for module in modules:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")


@pytest.mark.parametrize(
    ("variant", "spatial", "edge"),
    [
        *((variant, False, number % 2 == 1) for number, variant in enumerate(VARIANTS)),
        *((variant, spatial, edge) for variant in ("26m", "52m") for spatial, edge in ((True, False), (True, True))),
    ],
)
def test_the_form_for_export_is_the_model(variant: str, spatial: bool, edge: bool) -> None:
    """In float64, for sides that are odd at every stage, at none, and as small as they may be."""
    model = make(variant, spatial_dynamic_relu=spatial, use_fused=False).double()
    network = ExportNetwork(model, torch.float64, edge=edge)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for shape in ((2, 3, 65, 47), (3, 3, 32, 64)):
            x = torch.randn(shape, generator=generator, dtype=torch.float64)
            expected = model(x)
            assert (network(x) - expected).abs().max() < 1e-9 * expected.abs().max()


def test_the_form_for_export_holds_no_shuffle(tiny: Model) -> None:
    """And takes nothing from the model it was made from."""
    network = ExportNetwork(tiny)
    x = torch.randn(1, 3, 40, 40)
    before = network(x)
    lively_weights_(tiny, seed=6)
    assert torch.equal(network(x), before)
    graph = torch.export.export(network, (x,)).graph
    five = [node for node in graph.nodes if node.op == "call_function" and getattr(node.meta["val"], "ndim", 0) > 4]
    assert five == []


def test_a_model_with_parts_of_its_own_is_refused(tiny: Model) -> None:
    tiny.head.classifier = torch.nn.Sequential(tiny.head.classifier)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match=r"head\.classifier is a Sequential"):
        ExportNetwork(tiny)


@pytest.mark.parametrize("spatial", [False, True])
@pytest.mark.usefixtures("tiny")
def test_onnx(spatial: bool, tmp_path: Path) -> None:
    """A published network goes the same way in the race of test_cli_bench.py."""
    needs("onnx", "onnxscript", "onnxruntime", "openvino")
    import onnx
    import onnxruntime

    model = make("tiny", spatial_dynamic_relu=spatial)
    path = tmp_path / "net.onnx"
    report = export_model(model, path, "onnx", size=65, labels=NAMES)
    assert [path] == list(tmp_path.iterdir())
    assert {c.runtime.split()[0] for c in report.checks} == {"ONNX", "OpenVINO"}
    assert {c.shape for c in report.checks} == {(1, 3, 65, 65), (3, 3, 65, 65) if spatial else (3, 3, 34, 63)}
    assert all(c.difference < BOUND for c in report.checks)

    graph = onnx.load(path)
    assert report.facts["nodes"] == len(graph.graph.node)
    told = {entry.key: entry.value for entry in graph.metadata_props}
    assert (told["variant"], json.loads(told["labels"])) == ("tiny", NAMES)
    assert json.loads(told["mean"]) == pytest.approx(mobileformer.config.IMAGENET_MEAN)
    assert str(Path.cwd()).encode() not in path.read_bytes()  # where it was made is nobody's business
    assert not any(node.metadata_props for node in graph.graph.node)

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    assert given.shape == ["batch", 3, *([65, 65] if spatial else ["height", "width"])]
    for shape in [(5, 3, 65, 65)] if spatial else [(1, 3, 32, 32), (0, 3, 64, 64), (2, 3, 100, 35)]:
        x = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
        (logits,) = session.run(None, {"images": x})
        with torch.no_grad():
            np.testing.assert_allclose(logits, model(torch.from_numpy(x)).numpy(), rtol=0, atol=1e-4)


def test_torch_export(tiny: Model, tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    report = export_model(tiny, path, "torch-export", size=(65, 33), labels=NAMES)
    assert [c.shape for c in report.checks] == [(1, 3, 65, 33), (3, 3, 34, 33)]
    extra = {"metadata": ""}
    program = torch.export.load(path, extra_files=extra)
    assert json.loads(json.loads(extra["metadata"])["labels"]) == NAMES
    x = torch.randn(5, 3, 40, 71)
    torch.testing.assert_close(program.module()(x), tiny(x), rtol=0, atol=1e-4)
    with zipfile.ZipFile(path) as archive:
        assert not any(str(Path.cwd()).encode() in archive.read(name) for name in archive.namelist())


@pytest.mark.usefixtures("tiniest")
def test_aotinductor(tmp_path: Path) -> None:
    """With slopes by position, whose one height and width spare the compiler most of its algebra."""
    path = tmp_path / "net.pt2"
    report = export_model(make("tiny", spatial_dynamic_relu=True), path, "aotinductor", size=(65, 34))
    assert [c.shape for c in report.checks] == [(1, 3, 65, 34), (3, 3, 65, 34)]
    assert report.takes == "any batch, 65 x 34"
    assert [path] == list(tmp_path.iterdir())
    assert torch._inductor.aoti_load_package(str(path)).get_metadata()["variant"] == "tiny"


@pytest.mark.usefixtures("tiniest")
def test_executorch(tmp_path: Path) -> None:
    needs("executorch")
    path = tmp_path / "net.pte"
    report = export_model(make("tiny"), path, "executorch", size=65)
    assert [c.shape for c in report.checks] == [(1, 3, 65, 65), (3, 3, 34, 63)]
    assert report.takes == "a batch of 1 to 4, any size from 33 to 65 x 65"
    assert [path] == list(tmp_path.iterdir())
    assert float(report.facts["delegated"].split()[0]) > 70
    assert "aten_convolution_default" not in report.facts["not_delegated"]


class Crooked(ExportNetwork):
    """Wrong by a little in one class."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.classifier.bias[3] += 1e-2


def test_a_wrong_file_is_never_left(tiniest: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it take the place of a good one."""
    path = tmp_path / "net.pt2"
    path.write_bytes(b"an older, good one")
    monkeypatch.setattr("mobileformer.export.ExportNetwork", Crooked)
    with pytest.raises(ExportError, match=r"torch .* \(1, 3, 40, 40\): logits are off by .* nothing was written"):
        export_model(tiniest, path, "torch-export", size=40)
    assert [path] == list(tmp_path.iterdir())
    assert path.read_bytes() == b"an older, good one"


def test_what_is_wrong_with_a_file_is_told(tiny: Model) -> None:
    given = job.Job(ExportNetwork(tiny), mobileformer.files.metadata.describe(tiny), (40, 40), True, 20)
    reference = make("tiny").double()

    def outputs(width: int, value: float = 0.0) -> check.Runtime:
        return lambda inputs: [np.full((len(x), width), value) for x in inputs]

    with pytest.raises(ExportError, match=r"shape \(1, 3, 40, 40\): gives shape \(1, 8\), the model \(1, 7\)"):
        check.compare("it", outputs(8), reference, given)
    with pytest.raises(
        ExportError, match=r"logits are off by inf of the largest one, more than 0.0001; nothing was written"
    ):
        check.compare("it", outputs(7, float("nan")), reference, given)
    with pytest.raises(ExportError, match=r"fails on .*\(1, 3, 40, 40\) and \(3, 3, 33, 38\)(.|\n)*no such kernel"):
        check.compare("it", check.in_fresh_process("raise SystemExit('no such kernel')", Path("x")), reference, given)
    # What runs there has nothing of this package to lean on.
    leaning = check.in_fresh_process("import mobileformer; run = lambda x: x", Path("x"))
    with pytest.raises(ExportError, match="AssertionError"):
        check.compare("it", leaning, reference, given)


@pytest.mark.parametrize(
    ("target", "ending", "missing", "extra"),
    [
        ("onnx", "onnx", "onnxscript", "export"),
        ("onnx", "onnx", "openvino", "export"),
        ("executorch", "pte", "executorch", "executorch"),
    ],
)
def test_a_runtime_that_is_not_there_is_named_with_its_extra(
    target: str, ending: str, missing: str, extra: str, tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else object())
    with pytest.raises(ExportError, match=rf"{missing}: not installed; pip install 'mobileformer\[{extra}\]'"):
        export_model(tiny, tmp_path / f"net.{ending}", target, size=40)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("target", "name", "arguments", "words"),
    [
        ("tflite", "net.tflite", {}, "target: expected one of onnx, torch-export, aotinductor, executorch"),
        ("onnx", "net.pb", {}, "path: expected the ending .onnx"),
        ("onnx", "net.onnx", {"size": 31}, "size: expected at least 32"),
        ("torch-export", "net.pt2", {"size": (64, 32)}, "size: expected at least 33"),
        ("onnx", "net.onnx", {"opset": 17}, "opset: expected 18 to 25"),
        ("onnx", "net.onnx", {"opset": 26}, "opset: expected 18 to 25"),
        ("torch-export", "net.pt2", {"opset": 20}, "opset: expected"),
        ("torch-export", "net.pt2", {"labels": ["a"]}, "labels: expected 7"),
        ("torch-export", "none/net.pt2", {}, "path: the folder"),
    ],
)
def test_arguments_out_of_range_are_named(
    target: str, name: str, arguments: dict[str, Any], words: str, tiny: Model, tmp_path: Path
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        export_model(tiny, tmp_path / name, target, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_the_memory_of_executorch_is_planned_for_what_is_told(tiny: Model) -> None:
    given = job.Job(ExportNetwork(tiny, edge=True), mobileformer.files.metadata.describe(tiny), (64, 96), True, 20)
    (dimensions,) = given.dynamic_shapes(largest_batch=to_executorch.LARGEST_BATCH)
    assert [dimensions[axis].max for axis in (0, 2, 3)] == [4, 64, 96]
    (fixed,) = dataclasses.replace(given, any_size=False).dynamic_shapes()
    assert list(fixed) == [0]


def test_the_command(tiniest: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "open_model", lambda path: tiniest)
    told = mobileformer.files.metadata.describe(tiniest, labels=NAMES, input_size=40)
    monkeypatch.setattr(command, "open_metadata", lambda path: told)
    out = tmp_path / "net.pt2"
    arguments = ("export", out, "--weights", "w", "--to", "torch-export")
    out.write_text("precious")
    assert "--force" in run_json(*arguments, code=1)["error"]
    assert out.read_text() == "precious"
    report = run_json(*arguments, "--force")
    assert report["checked"]
    assert [row["shape"] for row in report["checks"]] == [[1, 3, 40, 40], [3, 3, 33, 38]]
    assert report["takes"] == "any batch, any size from 33"
    extra = {"metadata": ""}
    torch.export.load(out, extra_files=extra)
    header = json.loads(extra["metadata"])
    assert (json.loads(header["labels"]), header["input_size"]) == (NAMES, "40")


@pytest.mark.parametrize("checked", [False, True])
def test_what_the_command_shows(checked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, out = tmp_path / "w.safetensors", tmp_path / "net.onnx"
    mobileformer.save_weights(make("26m"), weights)
    out.touch()
    asked = {}

    def stand_in(model: Model, path: Path, target: str, **kwargs: Any) -> Report:
        asked.update(kwargs)
        rows = (check.Check("OpenVINO 1", (3, 3, 33, 38), 1e-6),) if kwargs["check"] else ()
        facts = {"nodes": 123, "not_delegated": {"layer_norm": 4}}
        return Report(target, path, mobileformer.files.metadata.describe(model), "any batch", facts, rows)

    monkeypatch.setattr("mobileformer.export.export_model", stand_in)
    arguments = ["export", out, "--weights", weights, "--opset", 18, "--force"]
    told = run(*arguments) if checked else run(*arguments, "--no-check")
    assert asked["opset"] == 18
    for words in ("26m", "any batch", "123", "layer_norm 4"):
        assert words in told.stdout
    assert ("3x3x33x38" in told.stdout) == checked
    assert ("not checked" in told.stderr) != checked


def test_the_command_names_what_is_wrong(tmp_path: Path) -> None:
    weights = tmp_path / "w.safetensors"
    mobileformer.save_weights(make("26m"), weights)
    assert "an ending of .onnx" in run_json("export", tmp_path / "x", "--weights", weights, code=2)["error"]
    assert "none.pth" in run_json("export", tmp_path / "x.onnx", "--weights", tmp_path / "none.pth", code=1)["error"]
