"""Built, right, and free of bad accesses and races: the build, `pytest -m gpu`, compute-sanitizer over small calls.

Everything runs in processes of its own; this module needs no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from importlib.util import find_spec
from pathlib import Path

from gpu.section import Section
from mobileformer.files.replacing import replacing

ROOT = Path(__file__).resolve().parents[2]
SANITIZERS = ("memcheck", "racecheck")
SANITIZER_SHARE = 0.4  # of the section's time
LOADS = """
import json
from mf_kernels import _native
missing = _native.load("cuda")
print(missing if missing is not None else json.dumps(_native.cuda_report()["architectures"]))
"""


def build(section: Section, seconds: float, dry: bool, capability: str | None) -> None:
    """Row "build": `mf_kernels/_cuda.so` for this card, in place. Dry, only the command is written down.

    One that is there and loads and has code for the card is taken as it is: compiled on another machine, it came along.
    """
    # A CPU library that is there stays and is brought up to date; one that is not would take a minute and serve nobody.
    cpu = "1" if (ROOT / "mf_kernels" / "_cpu.so").is_file() else "0"
    environment = {"MF_KERNELS_CUDA": "1", "MF_KERNELS_CPU": cpu}
    if capability is not None:
        environment["TORCH_CUDA_ARCH_LIST"] = (
            capability  # this card's code only: the shipped list takes three times as long
        )
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    row = {"command": command, "environment": environment}
    section.plan(["build"])
    if dry:
        section.skip("build", "a dry run builds nothing")
        section.header |= row
        return
    started = time.monotonic()
    carried = serves(capability)
    if carried is None:
        section.add("build", row | {"carried": True, "seconds": time.monotonic() - started})
        return
    section.header["not_carried"] = carried
    code, output = run(command, seconds, **environment)
    row |= {"seconds": time.monotonic() - started}
    if code != 0:
        section.fail("build", row, f"exit code {code}:\n{output[-4000:]}")
        return
    section.add("build", row)


def serves(capability: str | None) -> str | None:
    """None where a CUDA library is there that loads and has machine code for the card, else why not.

    One that was compiled elsewhere may still lie below build/cuda: it is copied to where it is loaded from.
    """
    place = ROOT / "mf_kernels" / "_cuda.so"
    if not place.is_file():
        elsewhere = sorted((ROOT / "build" / "cuda").glob("**/_cuda.so"))
        if not elsewhere:
            return "mf_kernels/_cuda.so is not there, nor one below build/cuda"
        with replacing(place) as temporary:
            shutil.copyfile(elsewhere[0], temporary)
    code, output = run([sys.executable, "-c", LOADS], 60)
    said = (output.strip().splitlines() or [""])[-1]
    if code != 0 or not said.startswith("["):
        return f"it does not load: {said[-400:]}"
    held = [int(arch.removeprefix("sm_")) for arch in json.loads(said)]
    major, minor = map(int, (capability or "0.0").split("."))
    fits = any(arch // 10 == major and arch % 10 <= minor for arch in held)
    return None if fits else f"it has code for {held}, the card is of {capability}"


def smoke(section: Section, seconds: float, dry: bool) -> None:
    """A row for each of the tests that tell at once whether anything is badly wrong."""
    section.plan([])
    if find_spec("pytest") is None:
        section.fail("pytest", {}, "pytest is not installed in this Python: no test was run")
    else:
        tests(section, seconds, dry, "gpu and smoke")


def check(section: Section, seconds: float, dry: bool) -> None:
    """A row for each test that was not run for its smoke, and for each sanitizer."""
    ends = time.monotonic() + seconds
    tools = ("plain",) if dry else SANITIZERS
    section.plan([f"sanitizer {tool}" for tool in tools])
    if find_spec("pytest") is None:
        section.fail("pytest", {}, "pytest is not installed in this Python: no test was run")
    else:
        tests(section, seconds if dry else seconds * (1 - SANITIZER_SHARE), dry, "gpu and not smoke")
    sanitize(section, tools, max(ends - time.monotonic(), 1.0), dry)


def tests(section: Section, seconds: float, dry: bool, marked: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "tests/test_gpu.py", "-m", marked, "-q", "-p", "no:cacheprovider"]
        command += ["-W", "default", f"--junitxml={report}"]  # a warning of an unknown torch is no failure of ours
        if find_spec("xdist") is not None and not dry:  # most of a test is the compilation of its kernels
            command += ["-n", str(max(1, min(12, (os.cpu_count() or 2) - 2))), "--dist", "load"]
        extra = {"TRITON_INTERPRET": "1"} if dry else {}
        code, output = run(command, seconds, MF_KERNELS_STRICT="1", **extra)
        section.header["pytest"] = {"command": command, "exit_code": code, "said": output.strip()[-500:]}
        for name, row, error in outcomes(report) if report.is_file() else []:
            if row["outcome"] == "failed":
                section.fail(name, row, error)
            else:
                section.add(name, row)
    if code is None:
        section.skip("tests", f"pytest was stopped after {seconds:.0f} s: the tests that are not in rows did not run")
    elif code != 0 and not section.failed:
        section.fail("pytest", {}, f"exit code {code}:\n{output[-4000:]}")


def outcomes(report: Path) -> list[tuple[str, dict[str, object], str]]:
    """(name, row, error) of every test in pytest's JUnit file."""
    found = []
    for case in ElementTree.parse(report).iter("testcase"):
        if not case.get("name"):  # what an interrupt cut off
            continue
        row: dict[str, object] = {"outcome": "passed", "seconds": float(case.get("time", 0))}
        error = ""
        for child in case:
            if child.tag in ("failure", "error"):
                row["outcome"], error = "failed", f"{child.get('message')}\n{(child.text or '')[-2000:]}"
            elif child.tag == "skipped":
                row |= {"outcome": "skipped", "reason": child.get("message")}
        found.append((str(case.get("name")), row, error))
    return found


def sanitize(section: Section, tools: tuple[str, ...], seconds: float, dry: bool) -> None:
    """Every tool at once over `gpu.small`; dry, that alone."""
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    small = [sys.executable, "-m", "gpu.small"]
    started: dict[str, subprocess.Popen[str]] = {}
    for tool in tools:
        if not dry and program is None:
            section.skip(f"sanitizer {tool}", "compute-sanitizer is not installed")
            continue
        command = small if dry else [str(program), "--tool", tool, "--error-exitcode", "9", *small]
        # Each tensor in memory of its own, or an access beyond it hits a neighbour of the same block
        extra = {"TRITON_INTERPRET": "1"} if dry else {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        started[tool] = start(command, **extra)
    ends = time.monotonic() + seconds
    for tool, process in started.items():
        code, output = finish(process, max(ends - time.monotonic(), 1.0))
        label, row = f"sanitizer {tool}", {"said": output.strip()[-1500:]}
        if code is None:
            section.skip(label, f"stopped after {seconds:.0f} s")
        elif code != 0:
            section.fail(label, row, f"exit code {code}")
        else:
            section.add(label, row)


def run(command: list[str], seconds: float, **environment: str) -> tuple[int | None, str]:
    """Exit code, None where the time was over, and what was said."""
    return finish(start(command, **environment), seconds)


def start(command: list[str], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # what it has started goes with it
        preexec_fn=_hear_interrupts,
    )


def _hear_interrupts() -> None:
    """In the process to be: a shell's background job ignores interrupts, and so would all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def finish(process: subprocess.Popen[str], seconds: float) -> tuple[int | None, str]:
    """An interrupt when the time is over, after which pytest still writes what it has; then the end."""
    try:
        output = process.communicate(timeout=seconds)[0]
        return process.returncode, output
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return None, process.communicate(timeout=10)[0]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and whatever it has left behind
    return None, process.communicate()[0]
