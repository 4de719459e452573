"""Every Triton kernel compiled for sm_80 and sm_90, without a GPU, at the launches of the model and of the tests.

The committed tables have what two releases of Triton make of all of them: that of torch 2.11 and that of the torch
which is tested here. A sample of each is compiled again and has to come out the same.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from kernel_support import TRITON_OPS

from mf_kernels import _triton
from mf_kernels.testing import TIMED

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(
    _triton.missing("dynamic_relu", "cpu") == "triton is not installed", reason="triton is not installed"
)
VERSIONS = ("3.6", "3.9")


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))


@pytest.fixture(scope="module", autouse=True)
def benchmarks() -> Iterator[None]:
    """The folder on the path, as for its scripts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield


@pytest.fixture(scope="module")
def script(benchmarks: None) -> ModuleType:
    """benchmarks/triton_resources.py, which is no package's module."""
    return importlib.import_module("triton_resources")


@pytest.mark.parametrize("op", TRITON_OPS)
def test_maps_move_16_bytes_at_once(op: str) -> None:
    """Channels a multiple of 64, bfloat16, channels_last: loads and stores of a feature map are whole vectors."""
    from triton_launches import launches_of, resources

    case = next(case for case in TIMED if case.op == op and case.shapes["x"][1] % 64 == 0)
    for call in launches_of(case, torch.bfloat16, channels_last=True, batch=64, arch=90):
        if call.kernel.__name__.endswith(("_forward", "_backward")):
            needs = resources(call, 90)
            assert "16" in needs["loads"], (call.kernel.__name__, needs)
            if call.kernel.__name__ != "mobile_to_former_forward":  # which writes tokens only
                assert "16" in needs["stores"], (call.kernel.__name__, needs)


def table(script: ModuleType, version: str) -> list[dict]:
    return json.loads(script.path_of(version).read_text())["kernels"]


@pytest.fixture(scope="module")
def launches(script: ModuleType) -> list[dict]:
    """What the launchers choose today."""
    return [row for row, _ in script.rows()]


@pytest.mark.parametrize("version", VERSIONS)
def test_the_committed_table_is_current(script: ModuleType, launches: list[dict], version: str) -> None:
    """The kernels and settings of today and no others, of the code of today; so both versions have the same."""
    how = "run benchmarks/triton_resources.py with both Tritons, as it says"
    written = json.loads(script.path_of(version).read_text())
    assert written["triton"].startswith(f"{version}.")
    assert written["sources"] == script.sources(), how
    assert [{k: v for k, v in row.items() if k not in script.NEEDS} for row in written["kernels"]] == launches, how


def test_the_page_is_made_from_the_tables(script: ModuleType) -> None:
    assert script.VERSIONS == VERSIONS
    written = [json.loads(script.path_of(version).read_text()) for version in VERSIONS]
    assert script.TABLE.read_text() == script.markdown(written), "run benchmarks/triton_resources.py --page"


@pytest.mark.parametrize("version", VERSIONS)
def test_nothing_spills_and_shared_memory_is_there(script: ModuleType, version: str) -> None:
    from triton_launches import SHARED_LIMIT

    rows = table(script, version)
    assert {row["kernel"].rsplit("_", 1)[1] for row in rows} >= {"forward", "backward", "merge", "splits"}
    assert {row["arch"] for row in rows} == set(SHARED_LIMIT)
    assert [row for row in rows if row["spilled_bytes"]] == []
    assert [row for row in rows if row["shared_bytes"] > SHARED_LIMIT[row["arch"]]] == []
    assert [row for row in rows if row["registers"] > 255] == []


SAMPLE = """
import json, sys
sys.path.insert(0, "benchmarks")
import triton
import triton_resources as script
from triton_launches import resources

waiting, found = set(sys.argv[2:]), []
for number, (row, call) in enumerate(script.rows()):
    if row["kernel"] in waiting and (row["arch"], row["dtype"]) == (90, sys.argv[1]):  # the first: a model's layer
        waiting.remove(row["kernel"])
        found.append([number, resources(call, 90)])
    if not waiting:
        break
print(json.dumps({"triton": triton.__version__, "found": found}))
"""


@pytest.mark.parametrize("version", VERSIONS)
def test_a_sample_compiles_to_what_the_table_says(script: ModuleType, version: str) -> None:
    """One launch of every kernel. `make test` fetches the other Triton; without make, it may not be there.

    In float32 with the older one, which takes less of it; the newer one sees half precision.
    """
    path = [str(ROOT)]
    if not importlib.import_module("triton").__version__.startswith(f"{version}."):
        folder = Path(os.environ.get("MF_TRITON_3_6") or ROOT / "build" / "triton-3.6")
        if not (folder / "triton").is_dir() and "MF_TRITON_3_6" not in os.environ:
            pytest.skip(f"no Triton {version} in {folder}: make test fetches it")
        assert (folder / "triton").is_dir(), f"MF_TRITON_3_6: no Triton in {folder}"
        path.append(str(folder))
    rows = table(script, version)
    kernels = {row["kernel"] for row in rows}
    ran = subprocess.run(
        [sys.executable, "-c", SAMPLE, "float32" if version == VERSIONS[0] else "bfloat16", *sorted(kernels)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    told = json.loads(ran.stdout.splitlines()[-1])
    assert told["triton"].startswith(f"{version}.")
    assert {rows[number]["kernel"] for number, _ in told["found"]} == kernels
    for number, needs in told["found"]:
        assert needs == {name: rows[number][name] for name in script.NEEDS}, rows[number]
