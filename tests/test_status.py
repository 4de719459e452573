"""What the package says of itself: rows of `status()`, the table of `python -m mf_kernels`, and the same as JSON."""

from __future__ import annotations

import json
import re
import runpy
import sys

import pytest
import torch
from kernel_support import OPS, TRITON_OPS, interpreter, runnable

import mf_kernels
from mf_kernels import _native

KEYS = {"op", "device", "backend", "available", "automatic", "reason", "built_with"}


def rows(device: str, backend: str) -> list[dict]:
    return [row for row in mf_kernels.status() if (row["device"], row["backend"]) == (device, backend)]


def test_one_row_for_each_operator_device_and_backend() -> None:
    status = mf_kernels.status()
    assert all(row.keys() == KEYS for row in status)
    found = [(row["op"], row["device"], row["backend"]) for row in status]
    assert found == [(op, d, b) for op in OPS for d in ("cpu", "cuda") for b in ("native", "triton")]


def test_a_row_is_available_or_has_a_reason() -> None:
    for row in mf_kernels.status():
        assert row["available"] == (row["reason"] is None) == (row["built_with"] is not None)
        assert not row["automatic"] or row["available"]


def test_cpu_kernels_are_there_and_automatic() -> None:
    for row in rows("cpu", "native"):
        assert row["available"]
        assert row["automatic"]
        assert f"torch {torch.__version__}" in row["built_with"]
        assert re.search(r"\d+\.\d+", row["built_with"].split(", torch")[0]), "the compiler has a version"
        assert f"runs {runnable()[-1]} of baseline" in row["built_with"]


def test_triton_on_the_cpu_needs_its_interpreter() -> None:
    for row in rows("cpu", "triton"):
        assert not row["available"]
        told = ("interpreter", "not installed") if row["op"] in TRITON_OPS else ("no Triton kernels", "not installed")
        assert any(reason in row["reason"] for reason in told)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_cuda_device_every_row_says_so() -> None:
    for row in rows("cuda", "native") + rows("cuda", "triton"):
        assert row["reason"].startswith("this machine has no CUDA device")


def test_the_instruction_set_in_use_is_told(isa: str) -> None:
    assert f"runs {isa} of" in rows("cpu", "native")[0]["built_with"]


def run_module(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["mf_kernels", *arguments])
    runpy.run_module("mf_kernels", run_name="__main__")
    return capsys.readouterr().out


def test_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = run_module(monkeypatch, capsys).splitlines()
    assert len(lines) == len(mf_kernels.status())
    for line, row in zip(lines, mf_kernels.status(), strict=True):
        op, device, backend, mark, told = line.split(maxsplit=4)
        assert (op, device, backend) == (row["op"], row["device"], row["backend"])
        assert mark == ("auto" if row["automatic"] else "yes" if row["available"] else "no")
        assert told == (row["built_with"] or row["reason"])


def test_the_same_as_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    told = json.loads(run_module(monkeypatch, capsys, "--json"))
    assert told == {"kernels": mf_kernels.status(), "build": _native.build_record()}
    assert told["build"]["libraries"]["mf_kernels._cpu"]["built"]
    assert json.loads(interpreter("-m", "mf_kernels", "--json").stdout) == told


def test_an_unknown_argument_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_module(monkeypatch, capsys, "--yaml")
    assert "unrecognized arguments: --yaml" in capsys.readouterr().err
