"""`make gpu` without a card: every section's code runs, its file holds what it should, and failures are told."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
from kernel_support import CUDA_OPS

from mf_kernels import _triton

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(
    _triton.missing("dynamic_relu", "cpu") == "triton is not installed", reason="triton is not installed"
)
SECTIONS = (
    *("machine", "build", "smoke", "profile", "models", "operators", "sweep", "counters"),
    *("more-models", "more-operators", "check"),
)
LEFT_OUT = {"build": {"build": "a dry run builds nothing"}, "counters": {"counters": "a dry run counts nothing"}}


def drive(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [
        "make",
        "--no-print-directory",
        "gpu",
        "DRY=1",
        f"PYTHON={sys.executable}",
        f"RESULTS={folder}",
        f"GPU={' '.join(arguments)}",
    ]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_"))}
    return subprocess.run(command, cwd=ROOT, env={**inherited, **environment}, capture_output=True, text=True)


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One whole run: its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("gpu")
    done = drive(folder)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return folder, done.stdout


def test_every_section_has_a_whole_file(dry: tuple[Path, str]) -> None:
    folder, _ = dry
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{name}.json" for name in SECTIONS)
    for name in SECTIONS:
        result = json.loads((folder / f"{name}.json").read_text())
        assert result["format"] == 1
        assert result["dry"]
        assert result["error"] is None
        assert result["failed"] == []
        assert result["left_out"] == LEFT_OUT.get(name, {})


def test_nothing_is_written_among_the_results(dry: tuple[Path, str]) -> None:
    assert not (ROOT / "benchmarks" / "results" / "dry").exists()
    done = drive(ROOT / "benchmarks" / "results" / "dry")
    assert done.returncode != 0
    assert "a dry run writes nothing below" in done.stderr


def load(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text())


def test_machine_has_its_ceilings(dry: tuple[Path, str]) -> None:
    result = load(dry[0], "machine")
    labels = [row["label"] for row in result["rows"]]
    assert labels[:4] == ["copy", "matmul bfloat16", "matmul float32", "matmul tf32"]
    assert labels[4:] == ["launch aten", "launch triton", "launch graph"]
    assert all(row["host_us"] > 0 for row in result["rows"][4:])
    assert {"torch", "triton", "python", "commit"} <= result["environment"].keys()


def test_build_names_its_command(dry: tuple[Path, str]) -> None:
    result = load(dry[0], "build")
    assert result["command"][1:] == ["setup.py", "build_ext", "--inplace"]
    assert result["environment"]["MF_KERNELS_CUDA"] == "1"


def test_tests_ran_on_both_backends(dry: tuple[Path, str]) -> None:
    first, others = load(dry[0], "smoke")["rows"], load(dry[0], "check")["rows"]
    rows = [*first, *others]
    assert len({row["label"] for row in rows}) == len(rows)  # no test in both
    assert any(row["label"].startswith("test_training_step") for row in first)
    passed = [row["label"] for row in rows if row.get("outcome") == "passed"]
    for backend in ("triton", "native"):
        for test in ("test_forward_and_gradients", "test_any_strides", "test_autocast", "test_compiled_whole"):
            assert any(label.startswith(test) and backend in label for label in passed), (test, backend)
    assert all(row["reason"] for row in rows if row.get("outcome") == "skipped")
    assert "0 wrong" in next(row["said"] for row in rows if row["label"] == "sanitizer plain")


def test_operators_have_every_contender(dry: tuple[Path, str]) -> None:
    result = load(dry[0], "operators")
    others = load(dry[0], "more-operators")
    assert {row["layout"] for row in result["rows"]} == {"channels_last"}
    found = {(row["op"], row["direction"], row["backend"], row["layout"]) for row in result["rows"]}
    for op in CUDA_OPS:
        for direction in ("forward", "backward"):
            for backend in ("eager", "triton", "native"):
                assert (op, direction, backend, "channels_last") in found
    assert any(row["backend"] == "compile" for row in others["rows"])
    assert {row["layout"] for row in others["rows"]} == {"contiguous", "channels_last"}
    assert {"torch", "cpu", "kernels_older_than_sources", "commit"} <= result["environment"].keys()
    for row in (*result["rows"], *others["rows"]):
        assert row["share_of_copy"] == pytest.approx(row["gb_per_s"] / result["copy_gb_per_s"], rel=1e-3)
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["median_ms"] / 1e6, rel=1e-3)
        assert 0 <= row["share_of_error_allowed"] <= (1 if row["target"] else 8)
        assert (row["kernel"] is not None) == (row["backend"] in ("triton", "native"))


def test_models_have_every_contender(dry: tuple[Path, str]) -> None:
    every = []
    tasks = ("inference 2", "training 8")
    for section, dtype, timed in (("models", "bfloat16", tasks), ("more-models", "float32", tasks[:1])):
        rows = load(dry[0], section)["rows"]
        for task in timed:
            names = [row["label"].partition(": ")[2] for row in rows if row["label"].startswith(f"26m {task} {dtype}")]
            cast = dtype == "bfloat16" and task.startswith("inference")
            expected = ["eager", "eager channels_last", "eager graph", *(["eager cast graph"] if cast else [])]
            assert names == [*expected, "fused", "fused graph", *(["fused cast graph"] if cast else [])]
        every += rows
    assert {"compile graphs", "fused compile"} <= {row["backend"] for row in every}
    assert all(row["images_per_s"] > 0 for row in every)


def test_profile_names_its_kernels(dry: tuple[Path, str]) -> None:
    rows = load(dry[0], "profile")["rows"]
    assert [row["label"] for row in rows] == ["fused inference 2", "fused training 8"]
    for row in rows:
        assert row["kernels"] >= sum(kernel["count"] for kernel in row["by_kernel"])
        assert row["by_kernel"][0]["us"] >= row["by_kernel"][-1]["us"] > 0


def test_sweep_has_every_setting_right(dry: tuple[Path, str]) -> None:
    rows = load(dry[0], "sweep")["rows"]
    variations = {row["variation"] for row in rows}
    assert variations == {"as chosen", "warps x2", "warps /2", "tile x2"}
    assert len(rows) == 2 * 2 * len(variations)
    assert all(0 <= row["share_of_error_allowed"] <= 1 for row in rows)


def test_the_plan_is_printed_and_fits_the_time(dry: tuple[Path, str], gpu: ModuleType) -> None:
    schedule = importlib.import_module("gpu.schedule")
    lines = dry[1].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("plan: "))
    assert lines[start] == f"plan: {schedule.seconds()} s of the 540 s that there are"
    assert [line.split()[0] for line in lines[start + 1 : start + 1 + len(SECTIONS)]] == list(SECTIONS)
    assert schedule.seconds() <= 540
    for minutes in (3.0, 9.0, 20.0):
        ends = [schedule.ends(name, minutes) for name in SECTIONS]
        assert ends == sorted(ends)
        assert ends[-1] == pytest.approx(60 * minutes if minutes != 9.0 else ends[-1])
        assert ends[-1] <= 60 * minutes + 1e-6


def test_networks_and_their_peers_come_before_operators(gpu: ModuleType) -> None:
    models = importlib.import_module("gpu.models")
    first = models.groups(dry=False, more=False)
    assert [group.task for group in first[:4]] == list(models.TASKS)
    assert {group.network for group in first} == {"294m", "levit_128", "hgnetv2_b1"}
    assert {group.dtype for group in first} == {"bfloat16"}
    assert any("compile graphs" in group.contenders for group in first)
    behind = {name for group in models.groups(dry=False, more=True) for name in group.contenders}
    assert {"compile", "compile max-autotune", "fused compile"} <= behind
    assert SECTIONS.index("models") < SECTIONS.index("operators")


def test_few_kernels_are_compiled_beforehand(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    warm, models = importlib.import_module("gpu.warm"), importlib.import_module("gpu.models")
    planned = warm.distinct(warm.jobs(models.SIDE), 90)
    keys = [warm.key(call) for calls in planned for call in calls]
    assert 100 < len(keys) <= 400
    assert len(set(keys)) == len(keys)
    found = {call.kernel.__name__ for calls in planned for call in calls}
    for op in CUDA_OPS:
        for direction in ("forward", "backward"):
            assert any(op.startswith(name.split(f"_{direction}")[0]) for name in found if f"_{direction}" in name)
    # one that does not compile is told, and the others are compiled
    monkeypatch.setattr(warm.torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(warm, "_planned", lambda arch: planned[:1])
    tried = []

    def warmup(*_: object, **__: object) -> None:
        tried.append(1)
        if len(tried) == 1:
            raise RuntimeError("no such layout")

    for call in planned[0]:
        monkeypatch.setattr(type(call.kernel), "warmup", warmup)
    compiled, failed = warm.compile_all(0)
    assert len(tried) == len(planned[0])
    assert compiled == len(planned[0]) - 1
    assert len(failed) == 1
    assert "no such layout" in failed[0]


def test_a_library_that_loads_is_taken_as_it_is(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpu import check

    monkeypatch.setattr(check, "ROOT", tmp_path)
    assert "is not there" in str(check.serves("9.0"))
    (tmp_path / "mf_kernels").mkdir()
    (tmp_path / "build" / "cuda" / "lib").mkdir(parents=True)
    (tmp_path / "build" / "cuda" / "lib" / "_cuda.so").write_bytes(b"library")
    said = {"out": '["sm_80", "sm_90"]', "code": 0}
    monkeypatch.setattr(check, "run", lambda *_, **__: (said["code"], said["out"]))
    assert check.serves("9.0") is None
    assert (tmp_path / "mf_kernels" / "_cuda.so").read_bytes() == b"library"
    assert check.serves("8.6") is None  # code for 8.0 runs there
    assert "has code for [80, 90]" in str(check.serves("10.0"))
    section = gpu.Section("build", tmp_path)
    check.build(section, 5.0, dry=False, capability="9.0")
    assert section.rows[0]["carried"]
    said |= {"out": "_cuda.so does not load: built with torch 2.9"}
    assert "does not load: built with torch 2.9" in str(check.serves("9.0"))
    check.build(section := gpu.Section("build", tmp_path), 5.0, dry=False, capability="9.0")
    assert "carried" not in section.rows[0]


def test_what_the_profiler_counts_is_read(gpu: ModuleType) -> None:
    from gpu import counters

    page = (
        "==PROF== Connected to process 7\n"
        '"ID","Kernel Name","gpu__time_duration.sum","dram__bytes.sum","launch__registers_per_thread"\n'
        '"","","us","Mbyte","register/thread"\n'
        '"0","dynamic_relu_forward(float *, int)","1,234.5","12.5","64"\n'
        '"1","depthwise_forward","2.0","n/a","80"\n'
        "==PROF== Disconnected\n"
    )
    first, second = counters.rows_of(page)
    assert (first["kernel"], first["duration"], first["duration_unit"]) == ("dynamic_relu_forward", 1234.5, "us")
    assert (second["registers"], second["dram_bytes"]) == (80.0, None)
    assert counters.rows_of("==ERROR== no permission") == []


def test_table_is_printed_last(dry: tuple[Path, str]) -> None:
    _, printed = dry
    assert all(f"== {name}: " in printed for name in SECTIONS)
    assert "everything was right" in printed.splitlines()[-1]


@pytest.mark.parametrize(("broken", "sound"), [("machine", "build"), ("build", "machine")])
def test_a_section_that_fails_is_told_and_the_next_one_runs(tmp_path: Path, broken: str, sound: str) -> None:
    """One in a process of its own, one in the driver's."""
    done = drive(tmp_path, "--only", broken, sound, MF_GPU_PLANT=broken)
    assert done.returncode == 2, done.stdout  # make's, of a recipe that fails
    assert "RuntimeError: planted by MF_GPU_PLANT" in load(tmp_path, broken)["error"]
    assert "BROKE OFF: RuntimeError: planted" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("SOMETHING FAILED")
    assert load(tmp_path, sound)["error"] is None


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu.section")


def test_what_the_time_did_not_reach_is_left_out(gpu: ModuleType, tmp_path: Path) -> None:
    """A section cut in the middle of a row keeps what it had and names the rest; another process goes on with it."""
    section = gpu.Section("operators", tmp_path)
    section.plan(["one", "two", "three"])
    section.add("one", {"median_ms": 1.0})
    with pytest.raises(gpu.OutOfTime), gpu.limited(0.2):
        time.sleep(5)
    assert load(tmp_path, "operators")["left_out"] == dict.fromkeys(["two", "three"], "the section's time was over")
    again = gpu.Section("operators", tmp_path, resume=True)
    again.plan(["one", "two", "three"])
    assert again.done("one")
    again.fail("two", {}, "wrong")
    result = load(tmp_path, "operators")
    assert [row["label"] for row in result["rows"]] == ["one"]
    assert [row["label"] for row in result["failed"]] == ["two"]
    assert list(result["left_out"]) == ["three"]
    assert not again.ok


def test_a_broken_device_asks_for_another_process(gpu: ModuleType, tmp_path: Path) -> None:
    from gpu.__main__ import guarded

    def body(section) -> None:
        section.plan(["one", "two"])
        section.fail("one", {}, "an illegal memory access was encountered")
        raise gpu.BrokenDevice

    assert guarded(gpu.Section("models", tmp_path), body) == gpu.AGAIN
    assert list(load(tmp_path, "models")["left_out"]) == ["two"]


def test_tests_that_take_too_long_leave_those_that_were_done(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpu import check

    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_gpu.py").write_text(
        "import pathlib, time, pytest\npytestmark = pytest.mark.gpu\ndef test_quick(): pass\n"
        f"def test_slow():\n    pathlib.Path({str(tmp_path / 'began')!r}).touch()\n    time.sleep(60)\n"
    )
    began, finish = tmp_path / "began", check.finish

    def once_it_is_slow(process: subprocess.Popen[str], seconds: float) -> tuple[int | None, str]:
        """However long pytest takes to start: the time is over when the second test has begun."""
        waits_until = time.monotonic() + 120
        while not began.exists() and process.poll() is None and time.monotonic() < waits_until:
            time.sleep(0.05)
        return finish(process, 0.1)

    monkeypatch.setattr(check, "finish", once_it_is_slow)
    monkeypatch.setattr(check, "ROOT", tmp_path)
    section = gpu.Section("check", tmp_path)
    check.tests(section, 25.0, True, "gpu")
    assert [row["label"] for row in section.rows] == ["test_quick"]
    assert "pytest was stopped after 25 s" in section.left_out["tests"]


def test_without_pytest_the_section_says_so(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu import check

    monkeypatch.setattr(check, "find_spec", lambda name: None)
    monkeypatch.setattr(check, "sanitize", lambda *_: None)
    section = gpu.Section("check", tmp_path)
    check.check(section, 5.0, dry=True)
    assert "pytest is not installed" in section.failed[0]["error"]
