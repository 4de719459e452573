"""What the tests of the kernels share: rows to run them on, what must have served, and fresh processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import mf_kernels
from mf_kernels import _native, _preference, _triton

OPS = _preference.OPS
# Those of them that somebody has written such kernels of
TRITON_OPS = tuple(op for op in OPS if _triton.has_kernels(op))
CUDA_OPS = tuple(op for op in OPS if (Path(__file__).parents[1] / "csrc" / "cuda" / f"{op}.cu").is_file())


def runnable() -> list[str]:
    """The instruction sets that this CPU has kernels for."""
    return _native.cpu_report()["runnable"]


def native(*kernels: str, isa: str) -> dict[str, int]:
    """What `record_kernels` counts when each of these kernels ran once on the CPU, and nothing else did."""
    return {f"{kernel}:native:cpu:{isa}": 1 for kernel in kernels}


def python(
    code: str, *arguments: str, package: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh process, every warning shown, `mf_kernels` from `package` or the same as here."""
    return interpreter("-W", "always", "-c", code, *arguments, package=package, **environment)


def in_forks(codes: str | Sequence[str], packages: Path | Sequence[Path]) -> list[str]:
    """What each code prints with `mf_kernels` and `mobileformer` from its folder, neither of which was imported before.

    One code goes with every folder, and one folder with every code. One fresh process loads torch alone, and each has
    a fork of it to itself.
    """
    several = [packages] if isinstance(packages, Path) else list(packages)
    codes = [codes] * len(several) if isinstance(codes, str) else list(codes)
    folders = list(map(str, several * len(codes) if len(several) == 1 else several))
    runs = list(zip(codes, folders, strict=True))
    done = python(f"RUNS = {runs!r}\n{_FORKS}", package=Path(__file__).parent)
    assert done.returncode == 0, done.stderr
    parts = done.stdout.split("\0")
    assert len(parts) == len(runs) + 1, done.stdout + done.stderr
    return parts[:-1]


_FORKS = """
import os, sys
import torch
for code, folder in RUNS:
    child = os.fork()
    if child == 0:
        sys.path.insert(0, folder)
        exec(code, {"__name__": "__main__"})
        print(end="\\0", flush=True)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"{folder}: failed")
"""


def interpreter(*command: str, package: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python with that command line, in the folder that `mf_kernels` is to come from."""
    where = package or Path(mf_kernels.__file__).parents[1]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MF_KERNELS_", "PYTHON", "COV_"))}
    return subprocess.run(
        [sys.executable, *command],
        cwd=where,
        # The tests' folder for memory_support, which has nothing of the package
        env={**inherited, "PYTHONPATH": os.pathsep.join([str(where), str(Path(__file__).parent)]), **environment},
        capture_output=True,
        text=True,
    )
