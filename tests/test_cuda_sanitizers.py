"""The CUDA kernels with one host thread for each CUDA thread, under ThreadSanitizer and AddressSanitizer.

A barrier that is missing is a race between host threads, a wrong index an access outside an array. That the sanitizers
see both is shown with a fault of each kind planted in the kernels.
"""

from __future__ import annotations

import subprocess

import emulator_support
import pytest

pytestmark = pytest.mark.skipif(bool(emulator_support.missing()), reason=emulator_support.missing())


def run(sanitizer: str, *, plant: str = "") -> subprocess.CompletedProcess[str]:
    flags = [f"-fsanitize={sanitizer}", "-DMF_EMULATOR_THREADS", "-DMF_FLOAT_ONLY"]
    flags += [f"-DMF_PLANT_{plant}", "-DMF_PLANTED", "-O0"] if plant else []
    program = emulator_support.build(f"{sanitizer}{plant.lower()}", ["sanitized.cpp"], *flags)
    return subprocess.run([str(program)], capture_output=True, text=True)


@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_nothing_to_report(sanitizer: str) -> None:
    done = run(sanitizer)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    assert "0 comparisons failed" in done.stdout
    assert "Sanitizer" not in done.stderr


def test_a_missing_barrier_is_reported() -> None:
    done = run("thread", plant="RACE")
    assert done.returncode != 0
    assert "WARNING: ThreadSanitizer: data race" in done.stderr
    for kernel in ("dynamic_relu_rows_backward", "mobile_to_former_channels"):
        assert kernel in done.stderr


def test_a_write_outside_is_reported() -> None:
    done = run("address", plant="OVERFLOW")
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
    assert "sum_parts" in done.stderr
