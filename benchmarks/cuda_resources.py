"""What every CUDA kernel takes of a multiprocessor: benchmarks/results/cuda-resources.json.

    python benchmarks/cuda_resources.py          build for sm_80 and sm_90, write the table
    python benchmarks/cuda_resources.py --keep build/cuda    the same, and leave the library there

Needs nvcc, no GPU and no torch for CUDA. One row for each kernel and architecture:

    registers         of a thread, as ptxas reports them; 255 at most, and above 128 a multiprocessor holds one block
    spill_bytes       of registers that did not fit, stored and loaded
    shared_bytes      of a block
    load_bits, store_bits   the widest access to global memory in the PTX: 128 is 16 bytes

`sources` is a digest of the code that they were compiled from, without its comments: where it is that of today, a
sample that compiles to the same rows shows that all of them are.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "benchmarks" / "results" / "cuda-resources.json"
_BITS = {
    "b8": 8,
    "u8": 8,
    "s8": 8,
    "b16": 16,
    "u16": 16,
    "b32": 32,
    "u32": 32,
    "f32": 32,
    "b64": 64,
    "u64": 64,
    "f64": 64,
}


def sources() -> str:
    """A digest of the kernels' code, of all that it includes of csrc and of the compiler's flags."""
    waiting, read = sorted(path.relative_to(ROOT / "csrc").as_posix() for path in ROOT.glob("csrc/cuda/*.cu")), {}
    while waiting:
        name = waiting.pop()
        if name not in read and (ROOT / "csrc" / name).is_file():
            text = re.sub(r"//[^\n]*|/\*.*?\*/", " ", (ROOT / "csrc" / name).read_text(), flags=re.DOTALL)
            read[name] = " ".join(text.split())
            waiting += re.findall(r'#include "([^"]+)"', text)
    flags = re.findall(r"^(?:COMMON_FLAGS|STABLE_FLAGS|NVCC_\w+)\b.*$", (ROOT / "setup.py").read_text(), re.MULTILINE)
    return hashlib.sha256(json.dumps([read, flags], sort_keys=True).encode()).hexdigest()[:16]


def build(folder: Path, sample: bool = False) -> str:
    """Build mf_kernels/_cuda.so into folder/lib, its PTX into folder/ptx; gives the compiler's report.

    A sample has the kernels for float32 and sm_90 alone.
    """
    (folder / "ptx").mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-lib",
        folder / "lib",
        "--build-temp",
        folder / "objects",
    ]
    environment = {
        **os.environ,
        "MF_KERNELS_CPU": "0",
        "MF_KERNELS_CUDA": "1",
        "MAX_JOBS": os.environ.get("MAX_JOBS", "2"),
        "NVCC_APPEND_FLAGS": f"-Xptxas=-v --keep --keep-dir {folder / 'ptx'}" + (" -DMF_FLOAT_ONLY" if sample else ""),
    }
    # Away from TORCH_CUDA_ARCH_LIST: the table is of the architectures that a plain install compiles for
    environment.pop("TORCH_CUDA_ARCH_LIST", None)
    if sample:
        environment["TORCH_CUDA_ARCH_LIST"] = "9.0+PTX"
    done = subprocess.run([str(part) for part in command], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the CUDA library does not build:\n{(done.stdout + done.stderr)[-5000:]}")
    return done.stdout + done.stderr


def kernel_names(mangled: list[str]) -> dict[str, str]:
    """former_to_mobile_channels<float, 4, 6> and the like."""
    text = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True).stdout
    for number, way in enumerate(("channels", "columns", "single")):  # of a depthwise convolution
        text = text.replace(f"(mf::Way){number}", way)
    plain = (line.partition("(")[0].removeprefix("void ").replace("mf::", "") for line in text.splitlines())
    return dict(zip(mangled, plain, strict=True))


def widest_accesses(ptx: str) -> dict[str, tuple[int, int]]:
    """Bits of the widest load and store to global memory of every kernel of a PTX file, by its mangled name."""
    widest = {}
    for name, body in re.findall(r"\.entry\s+(\w+)\((.*?)\n\}", ptx, re.DOTALL):
        bits = {"ld": 0, "st": 0}
        for verb, vector, kind in re.findall(r"\b(ld|st)\.global(?:\.nc)?(?:\.v(\d))?\.(\w+)", body):
            bits[verb] = max(bits[verb], int(vector or 1) * _BITS[kind])
        widest[name] = bits["ld"], bits["st"]
    return widest


def rows(report: str, ptx_files: list[Path]) -> list[dict[str, str | int]]:
    """The table from the compiler's report and the PTX that it kept."""
    pattern = (
        r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers([^\n]*)"
    )
    found = re.findall(pattern, report, re.DOTALL)
    names = kernel_names(sorted({name for name, *_ in found}))
    widest: dict[str, tuple[int, int]] = {}
    for path in ptx_files:
        widest |= widest_accesses(path.read_text())
    table = {}
    for name, arch, stores, loads, registers, rest in found:
        shared = re.search(r"(\d+) bytes smem", rest)
        table[names[name], arch] = {
            "kernel": names[name],
            "arch": arch,
            "registers": int(registers),
            "spill_bytes": int(stores) + int(loads),
            "shared_bytes": int(shared.group(1)) if shared else 0,
            "load_bits": widest[name][0],
            "store_bits": widest[name][1],
        }
    return [table[key] for key in sorted(table)]


def nvcc_release() -> str:
    """13.0 and the like: another compiler gives another table."""
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release ([\d.]+)", text).group(1)


def make_table(folder: Path, sample: bool = False) -> dict:
    """Build in `folder`, all or a sample, and read the table off."""
    report = build(folder, sample)
    return {
        "nvcc": nvcc_release(),
        "sources": sources(),
        "kernels": rows(report, sorted((folder / "ptx").glob("*.ptx"))),
    }


def to_text(table: dict) -> str:
    """JSON with one kernel a line."""
    lines = ",\n".join("    " + json.dumps(row) for row in table["kernels"])
    head = "".join(f'  "{name}": {json.dumps(table[name])},\n' for name in ("nvcc", "sources"))
    return f'{{\n{head}  "kernels": [\n{lines}\n  ]\n}}\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="folder for the library, its objects and PTX")
    keep = parser.parse_args().keep
    with tempfile.TemporaryDirectory() as temporary:
        table = make_table((keep or Path(temporary)).resolve())
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    temporary_file = TABLE.with_suffix(".tmp")
    temporary_file.write_text(to_text(table))
    os.replace(temporary_file, TABLE)
    print(f"{TABLE.relative_to(ROOT)}: {len(table['kernels'])} rows")


if __name__ == "__main__":
    main()
