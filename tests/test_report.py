"""The benchmarks: a row that is wrong fails and is not timed, results are saved whole, the page says what they say."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import mf_kernels
from mf_kernels import reference, testing

pytest.importorskip("pytest_benchmark", reason="the benchmarks need the extra `bench`")

ROOT = Path(__file__).resolve().parents[1]
CASE = next(case for case in testing.TIMED if case.id == "dynamic_relu-1x576x7x7")


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture
def report() -> ModuleType:
    return importlib.import_module("report")


@pytest.fixture
def bench_ops() -> ModuleType:
    return importlib.import_module("bench_ops")


def row(backend: str, layout: str, min_ms: float, **facts: Any) -> dict[str, Any]:
    common = {"suite": "operators", "op": "dynamic_relu", "case": "1x96x56x56", "variants": "294m", "batch": 1}
    speed = {"gb_per_s": 12.34, "share_of_copy": 0.5}
    return common | {"direction": "forward", "backend": backend, "layout": layout, "min_ms": min_ms} | speed | facts


def made_up() -> dict[str, Any]:
    """A result with one operator of two passes, another one that is slow, and one network."""
    slow = {"op": "depthwise_conv2d", "case": "1x24x28x28-mult6-k3-s2-identity"}
    network = {"suite": "model", "op": "network", "case": "294m-8x3x224x224", "direction": "inference", "batch": 8}
    environment = {
        "cpu": "Some CPU",
        "processors": 2,
        "threads": 1,
        "instruction_set": "AVX2",
        "system": "Linux x86_64",
    }
    environment |= {"python": "3.11.0", "torch": "2.13.0", "numpy": "2.0.0", "mobileformer": "0.1.0", "kernels": "c++"}
    return {
        "format": 1,
        "environment": environment | {"commit": "abcdef0123456789", "dirty": True, "kernels_older_than_sources": False},
        "started": "2026-01-02T03:04:05+00:00",
        "failed": [row("native", "contiguous", 1.0, **slow, error="AssertionError: d_x is off")],
        "rows": [
            row("eager", "contiguous", 0.4),
            row("eager", "channels_last", 0.3),
            row("compile", "contiguous", 0.2),
            row("native", "contiguous", 0.15),
            row("native", "channels_last", 0.1),
            row("eager", "contiguous", 5.0, direction="backward"),
            row("eager", "contiguous", 0.3, **slow),
            row("native", "contiguous", 0.2, **slow),
            row("eager", "contiguous", 80.0, **network),
            row("eager", "channels_last", 60.0, **network),
            row("fused", "its own", 40.0, **network),
            row("to_inference", "its own", 24.0, **network),
        ],
    }


def cells(page: str, start: str) -> list[list[str]]:
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith(f"| {start}")]
    return [[cell.strip() for cell in line] for line in lines]


def test_page_compares_the_faster_of_each(report: ModuleType) -> None:
    page = report.render({"some": made_up()})
    forward, backward = cells(page, "96 x 56 x 56")
    assert forward == ["96 x 56 x 56", "294m", "forward", "400", "300", "200", "150", "100", "3.00x", "12.3", "50%"]
    assert backward[:4] == ["96 x 56 x 56", "294m", "backward", "5000"]
    assert not any(backward[4:])
    assert cells(page, "294m") == [["294m", "80.0", "60.0", "40.0", "24.0", "1.50x", "2.50x"]]
    assert "- depthwise_conv2d 24 x 28 x 28, 6 filters a channel, stride 2 (294m): 1.50x" in page
    assert "native contiguous: AssertionError: d_x is off" in page
    assert "Some CPU, 1 of 2 processors, AVX2" in page
    assert "commit abcdef0123 with local changes" in page


def test_page_says_which_backend_is_faster(report: ModuleType) -> None:
    result = made_up()
    result["rows"] += [row("triton", "contiguous", 0.2), row("triton", "channels_last", 0.25)]
    assert cells(report.render({"some": result}), "dynamic_relu") == [["dynamic_relu", "forward", "2.00x", "1"]]


@pytest.mark.parametrize(
    ("value", "text"), [(0.01234, "0.0123"), (1.0, "1.00"), (12.34, "12.3"), (123.4, "123"), (4422.0, "4422")]
)
def test_numbers_have_three_digits(report: ModuleType, value: float, text: str) -> None:
    assert report.number(value) == text


def test_a_file_of_another_format_is_refused(report: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"format": 0}))
    with pytest.raises(ValueError, match=r"old\.json: expected a result of format 1, got 0"):
        report.load(path)


def test_report_writes_the_page_and_its_charts(report: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="charts need the extra `bench`")
    (tmp_path / "some.json").write_text(json.dumps(made_up()))
    report.main([str(tmp_path / "some.json"), "--page", str(tmp_path / "page.md")])
    page = (tmp_path / "page.md").read_text()
    for name in ("images/some-networks.png", "images/some-operators.png"):
        assert f"({name})" in page
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
        "page.md",
        "some-networks.png",
        "some-operators.png",
        "some.json",
    ]


def test_the_page_of_costs_is_what_its_files_say() -> None:
    costs = importlib.import_module("costs")
    assert costs.PAGE.read_text() == costs.page(sorted(costs.RESULTS.glob("*-costs.json")))


def test_committed_page_is_what_the_committed_results_render_to(report: ModuleType) -> None:
    files = sorted(p for p in report.RESULTS.glob(report.TIMES) if not p.stem.endswith("-resources"))
    assert report.PAGE.exists() == bool(files)
    if files:
        assert report.PAGE.read_text() == report.render({path.stem: report.load(path) for path in files})


def test_right_row_is_timed(bench_ops: ModuleType) -> None:
    built = bench_ops.build(CASE, "backward", "cpu", "native", "channels_last", several_backends=False)
    assert built.error is None
    assert built.facts["kernel"].startswith("dynamic_relu_bwd:native:cpu:")
    assert built.facts["bytes"] == 4 * (3 * 576 * 49 + 2 * 2 * 576)  # x, d_y and d_x; theta and d_theta


def test_wrong_numbers_are_not_timed(bench_ops: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    right = mf_kernels.dynamic_relu
    monkeypatch.setattr(mf_kernels, "dynamic_relu", lambda x, theta: right(x, theta) * (1 + 1e-5))
    built = bench_ops.build(CASE, "forward", "cpu", "native", "contiguous", several_backends=False)
    assert "output: Error" in built.error
    assert built.facts["share_of_error_allowed"] > 1


def test_numbers_of_another_kernel_are_not_timed(bench_ops: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mf_kernels, "dynamic_relu", reference.dynamic_relu)
    built = bench_ops.build(CASE, "forward", "cpu", "native", "contiguous", several_backends=False)
    assert "expected dynamic_relu_fwd:native:cpu to serve, got {}" in built.error


def test_run_saves_every_row_with_what_it_depends_on(tmp_path: Path) -> None:
    """A whole run of one group, as a user starts it."""
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-q", "-p", "no:cacheprovider"]
    command += ["-k", "dynamic_relu-1x576x7x7-forward and not depthwise", "--save-results", str(tmp_path / "results")]
    command += ["--benchmark-json", str(tmp_path / "theirs.json")]
    # under xdist the benchmark plugin switches itself off, and its mark is in the environment
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

    (path,) = (tmp_path / "results").iterdir()
    assert path.name.endswith("-1thread.json")
    result = json.loads(path.read_text())
    assert result["environment"]["threads"] == 1
    assert result["environment"]["torch"] == torch.__version__
    assert [(row["backend"], row["layout"]) for row in result["rows"]] == [
        (backend, layout) for backend in ("eager", "native") for layout in ("contiguous", "channels_last")
    ]
    eager = min(row["min_ms"] for row in result["rows"][:2])
    for saved in result["rows"]:
        assert saved["against_eager"] == pytest.approx(eager / saved["min_ms"], rel=1e-3)
        assert saved["gb_per_s"] == pytest.approx(saved["bytes"] / saved["min_ms"] / 1e6, rel=1e-3)
        assert 0 < saved["share_of_error_allowed"] <= 1
        assert (saved["kernel"] is not None) == (saved["backend"] == "native")

    theirs = json.loads((tmp_path / "theirs.json").read_text())["benchmarks"]
    assert len(theirs) == 4
    for benchmark in theirs:
        extra = benchmark["extra_info"]
        assert set(extra["interleaved_ms"]) == {f"{row['backend']} {row['layout']}" for row in result["rows"]}
        assert extra["commit"] == result["environment"]["commit"]
