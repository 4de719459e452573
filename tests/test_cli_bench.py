"""`mobileformer bench` and `demo`, and the measuring below them."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_support import make_files, run, run_json
from engine_support import needs_engine
from PIL import Image
from tiny_support import tiny_variants

import mobileformer
from mobileformer.data import sample_photo
from mobileformer.measure.difference import (
    GRADIENT_BOUNDS,
    LOGIT_BOUNDS,
    difference,
    lively_weights_,
    relative_norm,
    why_wrong,
)
from mobileformer.measure.timing import interleaved
from mobileformer.race import trial as race

# Without the compiled library the commands run on the reference and say so; the rest is the same.
pytestmark = pytest.mark.filterwarnings("ignore::mf_kernels.KernelFallbackWarning")


@pytest.fixture(scope="module", autouse=True)
def variants() -> Iterator[None]:
    """What is exported for other runtimes or compiled is a small network."""
    with tiny_variants():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("cli"))


SMALL = ("--variant", "tiny", "--size", "32", "--repeats", "2", "--no-runtimes")


def test_bench_inference(folder: Path) -> None:
    image = folder / "images" / "a.jpg"
    report = run_json("bench", *SMALL, "--no-compile", "--batch", 2, "--image", image)
    rows = {row["name"]: row for row in report["contenders"]}
    assert list(rows) == ["eager", "eager channels_last", "fused", "fused inference"]
    faster = min(rows["eager"]["min_ms"], rows["eager channels_last"]["min_ms"])
    for row in rows.values():
        assert row["error"] is None
        assert 0 < row["min_ms"] <= row["median_ms"]
        assert row["speedup"] == pytest.approx(faster / row["min_ms"])
        assert row["relative_logit_difference"] < 3e-5
        assert row["logit_difference"] > 0 or row["relative_logit_difference"] == 0
    assert rows["eager"]["kernels"] == {}
    assert sum(rows["fused"]["kernels"].values()) > 20
    assert report["machine"]["threads"] == 1
    assert report["image"] == str(image)


@needs_engine
def test_bench_profile() -> None:
    report = run_json("bench", *SMALL, "--profile")
    stages = {stage["name"]: stage for stage in report["stages"]}
    assert sum(stage["share"] for stage in stages.values()) == pytest.approx(1)
    assert sum(stage["ms"] for stage in stages.values()) == pytest.approx(report["total_ms"])
    assert {"stem", "blocks.2.depthwise", "blocks.2.former", "head.expand", "head.fc, head.classifier"} <= set(stages)
    assert stages["blocks.2.depthwise"]["gflop_per_s"] > 0
    assert "--profile" in run("bench", *SMALL, "--profile", "--threads", 2, code=2).output


def test_bench_training() -> None:
    report = run_json("bench", *SMALL, "--no-compile", "--train", "--batch", 8)
    assert [row["name"] for row in report["contenders"]] == ["eager", "eager channels_last", "fused"]
    for row in report["contenders"]:
        assert row["error"] is None
        assert 0 < row["relative_gradient_difference"] < 5e-2


def test_bench_bfloat16() -> None:
    report = run_json("bench", *SMALL, "--no-compile", "--dtype", "bfloat16")
    differences = [row["relative_logit_difference"] for row in report["contenders"]]
    assert all(1e-4 < difference < 0.1 for difference in differences)


def test_bench_races_other_runtimes() -> None:
    report = run_json("bench", "--variant", "tiny", "--size", "32", "--repeats", "2", "--no-compile", "--batch", 2)
    rows = {row["name"]: row for row in report["contenders"]}
    assert list(rows) == ["eager", "eager channels_last", "fused", "fused inference", "onnxruntime", "openvino"]
    for row in rows.values():
        assert row["error"] is None
        assert row["min_ms"] > 0
        assert row["relative_logit_difference"] < 3e-5


def test_bench_says_why_a_runtime_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.setattr(race.Trial, "_exported", None)  # neither gets so far
    told = run("bench", "--variant", "tiny", "--size", "32", "--repeats", "1", "--no-compile", "--dtype", "bfloat16")
    assert "without onnxruntime: on the CPU it computes in float32" in told.stderr
    assert "without openvino: " in told.stderr
    assert "mobileformer[export]" in told.stderr


def test_bench_compiles_unless_told_not_to(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    told = " ".join(run("bench", *SMALL).stdout.split())
    assert len(compiled) == 1
    for words in (
        "compile",
        "eager channels_last",
        "fused inference",
        "min, ms",
        "median, ms",
        "threads 1",
    ):
        assert words in told


def test_bench_does_not_time_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(torch.nn.Module):
        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.model(x) * 1.001

    monkeypatch.setattr(mobileformer.Model, "to_inference", lambda self, dtype: Wrong(self))
    result = run("bench", *SMALL, "--no-compile", "--json", code=1)
    rows = {row["name"]: row for row in json.loads(result.stdout)["contenders"]}
    assert "off by 1.0e-03" in rows["fused inference"]["error"]
    assert rows["fused inference"]["min_ms"] is None
    assert rows["fused"]["min_ms"] > 0
    told = run("bench", *SMALL, "--no-compile", code=1)
    assert "fused inference" in told.stderr
    assert "fused inference" not in told.stdout


def test_bench_goes_on_where_compilation_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: torch.nn.Module) -> Any:
        def call(x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no C++ compiler\nand a long story")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    rows = {row["name"]: row for row in run_json("bench", *SMALL, code=1)["contenders"]}
    assert rows["compile"]["error"] == "RuntimeError: no C++ compiler"
    assert rows["fused"]["min_ms"] > 0


def test_wrong_gradients_are_not_timed() -> None:
    trial = race.Trial("26m", torch.randn(8, 3, 32, 32), train=True)
    trial.add("eager", "fused")
    parameter = trial.contenders[1].parameters[0]
    parameter.register_hook(lambda gradient: torch.full_like(gradient, 10.0))
    assert not trial.check()
    trial.time(1)
    right, wrong = trial.rows()
    assert right["error"] is None
    assert "gradients are off" in wrong["error"]
    assert wrong["min_ms"] is None


@pytest.fixture
def sheet(tmp_path: Path) -> tuple[str, Path]:
    return "--sheet", tmp_path / "sheet.png"


def test_demo_classifies_and_races(sheet: tuple[str, Path]) -> None:
    report = run_json("demo", *sheet, "--variant", "26m", "--repeats", 1)
    assert len(report["classified"]) == 12
    assert sum(row["truth"] == row["prediction"] for row in report["classified"]) >= 10
    with Image.open(sheet[1]) as picture:
        assert picture.format == "PNG"
    assert Path(report["image"]) == sample_photo()
    assert {row["name"] for row in report["contenders"]} == {
        "eager",
        "eager channels_last",
        "fused",
        "fused inference",
    }
    assert all(row["relative_logit_difference"] < 1e-9 for row in report["contenders_float64"])
    told = run("demo", sample_photo(), *sheet, "--variant", "26m", "--repeats", 1)
    for words in ("of 12 right", "Ankle boot", "random", "fused inference", "float64", "chelsea.jpg"):
        assert words in told.stdout
    assert f"written: {sheet[1]}" in told.stderr
    assert "no such file" in run_json("demo", "missing.jpg", *sheet, "--variant", "26m", code=1)["error"]
    nowhere = run_json("demo", "--sheet", sheet[1].parent / "no" / "sheet.png", code=1)["error"]
    assert "--sheet: path: the folder" in nowhere


def test_demo_fails_when_paths_disagree(monkeypatch: pytest.MonkeyPatch, sheet: tuple[str, Path]) -> None:
    monkeypatch.setitem(LOGIT_BOUNDS["inference"], torch.float64, 0.0)
    result = run("demo", *sheet, "--variant", "26m", "--repeats", 1, code=1)
    assert "error: float64 fused: logits are off" in result.stderr
    assert "Off in float64: see errors" in " ".join(result.stdout.split())


def test_interleaved_takes_turns() -> None:
    order: list[str] = []
    timings = interleaved({name: (lambda name=name: order.append(name)) for name in "abc"}, repeats=4, warmup=1)
    assert order == list("abc" * 5)
    assert all(len(timing.samples_ms) == 4 and timing.calls == 1 for timing in timings.values())


def test_interleaved_measures_time() -> None:
    timings = interleaved({"slow": lambda: time.sleep(0.01), "fast": lambda: None}, repeats=3, min_sample_ms=1.0)
    assert timings["slow"].calls == 1
    assert timings["slow"].min_ms >= 10
    assert timings["fast"].calls > 100
    assert timings["fast"].median_ms < 0.1
    for arguments in ({"contenders": {}}, {"contenders": {"a": print}, "repeats": 0}):
        with pytest.raises(ValueError, match="expected a contender"):
            interleaved(**arguments)


def test_difference_never_passes_what_is_not_finite() -> None:
    exact = torch.tensor([1.0, -4.0])
    assert difference(exact + torch.tensor([0.0, 0.5]), exact) == race.Difference(0.5, 0.125)
    for bad in (float("nan"), float("inf")):
        assert difference(torch.tensor([1.0, bad]), exact).relative == float("inf")
    assert difference(torch.ones(2), torch.zeros(2)).relative == float("inf")
    with pytest.raises(ValueError, match="shape"):
        difference(torch.ones(3), exact)


def test_what_is_wrong_is_told_and_nan_is_wrong() -> None:
    assert why_wrong("logits", 1e-3, 1e-3) is None
    assert why_wrong("logits", 2e-3, 1e-3) == "logits are off by 2.0e-03 of the largest one, more than 0.001"
    told = why_wrong("gradients", float("nan"), 1e-3, of="their norm")
    assert told == "gradients are off by nan of their norm, more than 0.001"
    exact = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    off = [torch.tensor([3.0, 3.0]), torch.tensor([[0.0]])]
    assert relative_norm(off, exact) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="longer"):
        relative_norm(off[:1], exact)


def test_bounds_widen_with_the_dtype() -> None:
    for table in (*LOGIT_BOUNDS.values(), *GRADIENT_BOUNDS.values()):
        by_precision = [table[d] for d in (torch.float64, torch.float32, torch.bfloat16) if d in table]
        assert by_precision == sorted(by_precision)
        assert torch.float32 in table


def test_lively_weights_are_seeded_and_reach_every_part() -> None:
    first, second, other = (mobileformer.Model("26m", use_fused=False).double().eval() for _ in range(3))
    for model, seed in ((first, 0), (second, 0), (other, 1)):
        lively_weights_(model, seed)
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 3, 64, 64)))
    logits = first(x)
    assert torch.equal(logits, second(x))
    assert not torch.allclose(logits, other(x), atol=0.1)
    (logits * torch.arange(1000)).sum().backward()
    for name, parameter in first.named_parameters():
        if not name.endswith("key.bias"):  # shifts the scores of all tokens alike, which softmax does not see
            assert parameter.grad.abs().max() > 1e-3, name
