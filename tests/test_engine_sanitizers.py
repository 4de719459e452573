"""The engine under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer, without Python around it.

The kernels are one source for every instruction set; the sanitizers see them for one, where compilation is quickest.
"""

from __future__ import annotations

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ENGINE = [path for path in sorted(ROOT.glob("csrc/engine/*.cpp")) if path.name != "bind.cpp"]
KERNELS = ROOT / "csrc/engine/kernels.cpp"  # which takes as long as all others
FLAGS = ["-std=c++20", "-O1", "-g1", "-pthread", "-DMF_BASELINE_ONLY", "-Wall", "-Wextra"]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_nothing_to_report(sanitizer: str, tmp_path: Path) -> None:
    flags = [*FLAGS, f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-I", str(ROOT / "csrc")]

    others = tmp_path / "others.cpp"  # one after the other in one file: their headers are read once
    files = [*(path for path in ENGINE if path != KERNELS), ROOT / "tests/engine/driver.cpp"]
    others.write_text("".join(f'#include "{path}"\n' for path in files))

    def compiled(source: Path) -> str:
        target = str(tmp_path / f"{source.stem}.o")
        subprocess.run(["g++", *flags, "-c", str(source), "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, (others, KERNELS)))
    program = str(tmp_path / "driver")
    subprocess.run(["g++", *flags, *objects, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    assert "0 failures" in done.stdout
    assert "Sanitizer" not in done.stderr
    assert "runtime error" not in done.stderr
