"""Every Triton kernel compiled for sm_80 and sm_90, without a GPU, at the launches of the model: what it needs."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mf_kernels import _triton
from mf_kernels.testing import TIMED, Case

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(
    _triton.missing("dynamic_relu", "cpu") == "triton is not installed", reason="triton is not installed"
)
# One layer of every stage of one variant; the committed table has the others.
LAYERS = [case for case in TIMED if "294m" in case.layer_of]


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """benchmarks/triton_resources.py, which is no package's module."""
    spec = importlib.util.spec_from_file_location("triton_resources", ROOT / "benchmarks" / "triton_resources.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.parametrize(
    ("arch", "dtype", "channels_last", "batch"),
    [(90, torch.bfloat16, True, 128), (80, torch.float32, False, 1)],
    ids=["sm90-bfloat16-channels_last-128", "sm80-float32-contiguous-1"],
)
@pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.id)
def test_no_spills_and_shared_memory_that_is_there(
    case: Case, arch: int, dtype: torch.dtype, channels_last: bool, batch: int
) -> None:
    from mf_kernels.triton._resources import SHARED_LIMIT, launches_of, resources

    calls = launches_of(case, dtype, channels_last=channels_last, batch=batch, arch=arch)
    assert len(calls) >= 2
    for call in calls:
        needs = resources(call, arch)
        assert needs["spilled_bytes"] == 0, (call.kernel.__name__, needs)
        assert needs["shared_bytes"] <= SHARED_LIMIT[arch], (call.kernel.__name__, needs)
        assert needs["registers"] <= 255


@pytest.mark.parametrize("op", ["dynamic_relu", "mobile_to_former", "former_to_mobile", "depthwise_conv2d"])
def test_maps_move_16_bytes_at_once(op: str) -> None:
    """Channels a multiple of 8, bfloat16, channels_last: loads and stores of a feature map are whole vectors."""
    from mf_kernels.triton._resources import launches_of, resources

    shapes = {"x": (1, 64, 28, 28)}
    options = {}
    if op == "dynamic_relu":
        shapes["theta"] = (1, 128)
    elif op == "depthwise_conv2d":
        shapes["weight"] = (64, 1, 3, 3)
        options = {"stride": 1, "activation": "identity"}
    else:
        shapes |= {name: (1, 6, 64) for name in ("q",) if op == "mobile_to_former"} or dict.fromkeys(
            ("k", "v"), (1, 6, 64)
        )
        options = {"num_heads": 2}
    case = Case(op, "aligned", shapes, "aligned", options)
    for call in launches_of(case, torch.bfloat16, channels_last=True, batch=64, arch=90):
        if call.kernel.__name__.endswith(("_forward", "_backward")):
            needs = resources(call, 90)
            assert "16" in needs["loads"], (call.kernel.__name__, needs)
            if call.kernel.__name__ != "mobile_to_former_forward":  # which writes tokens only
                assert "16" in needs["stores"], (call.kernel.__name__, needs)


def test_the_committed_table_is_current(script: ModuleType) -> None:
    """The kernels and settings that the launchers choose today, and no others; and the page made from it."""
    written = json.loads(script.RESULTS.read_text())
    needs = ("registers", "spilled_bytes", "shared_bytes", "loads", "stores")
    table = [{k: v for k, v in row.items() if k not in needs} for row in written["kernels"]]
    current = [row for row, _ in script.rows()]
    how = "run python benchmarks/triton_resources.py"
    assert [row for row in current if row not in table] == [], how
    assert [row for row in table if row not in current] == [], how
    assert script.TABLE.read_text() == script.markdown(written), how


def test_nothing_in_the_committed_table_spills(script: ModuleType) -> None:
    rows = json.loads(script.RESULTS.read_text())["kernels"]
    assert {row["kernel"].rsplit("_", 1)[1] for row in rows} >= {"forward", "backward", "merge", "splits"}
    assert [row for row in rows if row["spilled_bytes"]] == []
