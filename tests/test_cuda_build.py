"""The CUDA library where nvcc is, GPU or not: built for both generations, nothing spilt, loads of 16 bytes."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import emulator_support
import pytest
import torch
from kernel_support import CUDA_OPS, OPS, python

ROOT = Path(__file__).resolve().parents[1]
NO_NVCC = "" if emulator_support.cuda_home() else "no nvcc"
pytestmark = pytest.mark.skipif(bool(NO_NVCC), reason=NO_NVCC)


cuda_resources = emulator_support.cuda_resources()


@pytest.fixture(scope="module")
def committed() -> dict:
    return json.loads(cuda_resources.TABLE.read_text())


@pytest.fixture(scope="module")
def sampled(committed: dict) -> bool:
    """Whether the committed table is of this compiler, its flags and this code: then a part shows that it holds."""
    return (committed["nvcc"], committed["sources"]) == (cuda_resources.nvcc_release(), cuda_resources.sources())


@pytest.fixture(scope="module")
def built(sampled: bool) -> Path:
    """The library and its table, built once for every state of its sources: float32 for sm_90 alone, or all of it."""
    digest = hashlib.sha256(f"{torch.__version__} {cuda_resources.nvcc_release()} {sampled}".encode())
    rooms = [path for room in ("cuda", "common", "tensor") for path in ROOT.glob(f"csrc/{room}/*")]
    for path in sorted([ROOT / "setup.py", ROOT / "benchmarks" / "cuda_resources.py", *rooms]):
        digest.update(path.name.encode() + path.read_bytes())
    folder = ROOT / "build" / "cuda" / digest.hexdigest()[:16]
    if not (folder / "table.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        table = cuda_resources.make_table(folder, sampled)
        (folder / "table.json").write_text(cuda_resources.to_text(table))
    return folder


@pytest.fixture(scope="module")
def compiled(built: Path) -> dict:
    """The table of what was compiled here."""
    return json.loads((built / "table.json").read_text())


@pytest.fixture(scope="module")
def table(sampled: bool, committed: dict, compiled: dict) -> dict:
    """The table of all kernels."""
    return committed if sampled else compiled


@pytest.fixture(scope="module")
def library(built: Path) -> Path:
    return built / "lib" / "mf_kernels" / "_cuda.so"


def test_every_kernel_is_compiled_for_both_generations_and_spills_nothing(table: dict) -> None:
    kernels = {arch: {row["kernel"] for row in table["kernels"] if row["arch"] == arch} for arch in ("sm_80", "sm_90")}
    assert kernels["sm_80"] == kernels["sm_90"]
    for op in CUDA_OPS:
        assert any(kernel.startswith(op) and "backward" in kernel for kernel in kernels["sm_90"])
    assert [row for row in table["kernels"] if row["spill_bytes"] > 0] == []
    assert max(row["registers"] for row in table["kernels"]) <= 255
    assert max(row["shared_bytes"] for row in table["kernels"]) <= 48 * 1024


def test_the_committed_table_is_current(committed: dict) -> None:
    if committed["nvcc"] != cuda_resources.nvcc_release():
        pytest.skip(f"the table is of nvcc {committed['nvcc']}, here is {cuda_resources.nvcc_release()}")
    assert committed["sources"] == cuda_resources.sources(), "run python benchmarks/cuda_resources.py"


def test_what_is_compiled_here_is_what_the_table_says(sampled: bool, committed: dict, compiled: dict) -> None:
    if not sampled:
        pytest.skip("the table is of another compiler or of other code")
    sample = [row for row in committed["kernels"] if "<float" in row["kernel"] and row["arch"] == "sm_90"]
    assert compiled["kernels"] == sample
    assert {row["kernel"].partition("<")[0] for row in sample} == {
        row["kernel"].partition("<")[0] for row in committed["kernels"]
    }


def test_maps_move_16_bytes_at_a_time(table: dict) -> None:
    """The kernels for aligned maps in both layouts; 4 values of half precision, where more would spill, are 8 bytes."""
    seen = set()
    for row in table["kernels"]:
        name, _, parameters = row["kernel"].rstrip(">").partition("<")
        dtype, *numbers = [p for p in parameters.split(", ") if p not in ("channels", "columns", "single")]
        values = int(numbers[0]) if numbers else 1
        if values == 1:
            continue
        bits = values * (32 if dtype == "float" else 16)
        seen.add((name, bits))
        assert row["load_bits"] >= bits, row
        if not name.startswith("mobile_to_former") or "backward" in name:  # its result is the tokens'
            assert row["store_bits"] >= bits, row
    wide = {name for name, bits in seen if bits == 128}
    streaming = {"dynamic_relu_rows", "dynamic_relu_flat", "dynamic_relu_rows_backward", "dynamic_relu_planes_backward"}
    attention = {f"{op}_{way}{b}" for op in OPS[:2] for way in ("channels", "positions") for b in ("", "_backward")}
    assert wide == streaming | attention | {"depthwise_conv2d", "depthwise_conv2d_backward"}


def test_the_library_holds_machine_code_of_what_it_was_built_for(library: Path, sampled: bool) -> None:
    bundled = importlib.util.find_spec("triton")
    beside = Path(bundled.origin).parent / "backends" / "nvidia" / "bin" if bundled else None
    cuobjdump = shutil.which("cuobjdump") or (shutil.which("cuobjdump", path=str(beside)) if beside else None)
    if cuobjdump is None:
        pytest.skip("no cuobjdump, neither CUDA's nor Triton's")
    listed = subprocess.run([cuobjdump, "--list-elf", library], capture_output=True, text=True, check=True).stdout
    assert {"sm_90", *([] if sampled else ["sm_80"])} == set(re.findall(r"sm_\d+", listed))
    ptx = subprocess.run([cuobjdump, "--list-ptx", library], capture_output=True, text=True, check=True).stdout
    assert {"sm_90"} == set(re.findall(r"sm_\d+", ptx))


def test_the_library_fills_every_slot_and_needs_the_stable_interface_only(library: Path) -> None:
    content = library.read_bytes()
    for op in CUDA_OPS:
        assert f"{op}_fwd.native".encode() in content
        assert f"{op}_bwd.native".encode() in content
    symbols = subprocess.run(["nm", "--dynamic", "-C", library], capture_output=True, text=True, check=True).stdout
    assert " T mf_kernels_cuda_report" in symbols
    undefined = [line for line in symbols.splitlines() if " U " in line]
    assert [line for line in undefined if re.search(r" (_?Py|c10::|at::)", line)] == []
    if audit := shutil.which(
        "torch-abi-audit", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    ):
        done = subprocess.run([audit, "--check", "torch", library.parent], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is for CUDA: the library loads")
def test_beside_torch_for_the_cpu_the_status_says_why_it_cannot_load(library: Path, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "mf_kernels", tmp_path / "mf_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(library, tmp_path / "mf_kernels" / "_cuda.so")
    code = "import mf_kernels.__main__ as m; import sys; sys.argv = ['mf_kernels']; m.main()"
    done = python(code, package=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if re.match(r"\w+ +cuda +native", line)]
    assert len(rows) == len(OPS)
    assert all("_cuda.so does not load: built with torch" in row for row in rows)


def test_calls_are_counted_on_the_host(tmp_path: Path) -> None:
    """report.cu is host code: compiled alone, it counts and reports as record_kernels reads it."""
    source, target = tmp_path / "kernels.cpp", tmp_path / "report.so"
    source.write_text(
        '#include "common/counter.h"\n'
        'mf::KernelCounter forward("dynamic_relu_fwd"), backward("depthwise_conv2d_bwd"), never("dynamic_relu_bwd");\n'
        'extern "C" void call_forward() { forward.add(); }\n'
        'extern "C" void call_backward() { backward.add(); }\n'
    )
    command = ["g++", "-std=c++20", "-fPIC", "-shared", "-x", "c++", "-D__CUDA_ARCH_LIST__=800,900"]
    report = str(ROOT / "csrc/cuda/report.cu")
    emulator_support.run(*command, "-I", str(ROOT / "csrc"), report, str(source), "-o", str(target))
    library = ctypes.CDLL(str(target))
    library.mf_kernels_cuda_report.restype = ctypes.c_char_p
    assert json.loads(library.mf_kernels_cuda_report()) == {"calls": {}, "architectures": ["sm_80", "sm_90"]}
    for call in (library.call_forward, library.call_forward, library.call_backward):
        call()
    calls = json.loads(library.mf_kernels_cuda_report())["calls"]
    assert calls == {"dynamic_relu_fwd:native:cuda": 2, "depthwise_conv2d_bwd:native:cuda": 1}
