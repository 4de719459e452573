"""The table of what `auto` takes on a card, written anew from what a card measured."""

from __future__ import annotations

import importlib
import json
import runpy
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from kernel_support import OPS

from mf_kernels import _preference

ROOT = Path(__file__).resolve().parents[1]
FILE = "benchmarks/results/some-card/operators.json"


@pytest.fixture
def preference(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("preference")


def row(op: str, backend: str, median_ms: float, **facts: str) -> dict[str, Any]:
    where = {"case": "256x24x56x56", "layout": "channels_last", "direction": "forward", "dtype": "bfloat16"}
    return {"op": op, "backend": backend, "median_ms": median_ms, **where, **facts}


def measured() -> dict[str, Any]:
    """Native is faster in one operator, slower, faster and once wrong, and not measured in the others."""
    return {
        "format": 1,
        "environment": {"gpu": "Some Card", "cpu": "Some CPU", "kernels_older_than_sources": False},
        "rows": [
            row("mobile_to_former", "eager", 0.9),
            row("mobile_to_former", "triton", 0.4),
            row("mobile_to_former", "native", 0.2),
            row("mobile_to_former", "triton", 0.2, direction="backward"),
            row("mobile_to_former", "native", 0.3, direction="backward"),
            row("former_to_mobile", "triton", 0.3),
            row("former_to_mobile", "native", 0.299),
            row("dynamic_relu", "triton", 0.3),
            row("dynamic_relu", "native", 0.1),
            row("depthwise_conv2d", "triton", 0.3),
        ],
        "failed": [row("dynamic_relu", "native", 0.0, layout="contiguous")],
        "left_out": {},
    }


def test_native_comes_first_where_it_is_right_and_faster(preference: ModuleType) -> None:
    decided = preference.decide(measured(), FILE)
    assert tuple(decided) == OPS
    assert decided["mobile_to_former"] == (("native", "triton"), FILE)  # twice as fast, and 1.5 times slower
    assert decided["former_to_mobile"] == (("triton", "native"), FILE)  # no more than noise
    assert decided["dynamic_relu"] == (("triton", "native"), FILE)  # faster and wrong
    assert decided["depthwise_conv2d"] == _preference.CUDA["depthwise_conv2d"]  # nothing beside it


def test_what_is_written_is_read_back(preference: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preference, "ROOT", tmp_path)
    (tmp_path / FILE).parent.mkdir(parents=True)
    (tmp_path / FILE).write_text(json.dumps(measured()))
    preference.main([str(tmp_path / FILE), "--table", str(tmp_path / "_preference.py")])
    assert runpy.run_path(str(tmp_path / "_preference.py"))["CUDA"] == preference.decide(measured(), FILE)


def test_the_committed_table_is_as_it_would_be_written(preference: ModuleType) -> None:
    source = preference.TABLE.read_text()
    assert preference.rewritten(source, _preference.CUDA) == source


def test_a_table_justified_by_a_file_is_what_the_file_says(preference: ModuleType) -> None:
    for file in {p.justified_by for p in _preference.CUDA.values() if p.justified_by}:
        decided = preference.decide(preference.load(ROOT / file), file)
        for op, chosen in _preference.CUDA.items():
            assert chosen.justified_by != file or decided[op] == chosen


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"dry": True}, "expected a result of a card, got one of Some CPU"),
        ({"environment": {"cpu": "Some CPU"}}, "expected a result of a card"),
        ({"environment": {"gpu": "Some Card", "kernels_older_than_sources": True}}, "older than their sources"),
    ],
)
def test_a_result_that_justifies_nothing_is_refused(preference: ModuleType, change: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        preference.decide(measured() | change, FILE)
