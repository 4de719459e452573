"""What the card counts while a kernel runs: Nsight Compute over six kernels, where it is installed and allowed to.

python -m gpu.counters        inside the profiler: each kernel once to compile, once to be counted
"""

from __future__ import annotations

import collections
import csv
import io
import re
import shutil
import sys
from typing import Any

from gpu import check
from gpu.section import Section

METRICS = {
    "gpu__time_duration.sum": "duration",
    "dram__bytes.sum": "dram_bytes",
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": "dram_share",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "multiprocessor_share",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy",
    "launch__registers_per_thread": "registers",
}
OURS = r"regex:(mobile_to_former|former_to_mobile|dynamic_relu|depthwise)"


def run(section: Section, seconds: float, dry: bool) -> None:
    """A row for each kernel that was counted."""
    section.plan(["counters"])
    program = shutil.which("ncu") or shutil.which("ncu", path="/usr/local/cuda/bin")
    if dry or program is None:
        section.skip("counters", "a dry run counts nothing" if dry else "Nsight Compute (ncu) is not installed")
        return
    command = [program, "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw"]
    command += ["--metrics", ",".join(METRICS), "--kernel-name", OURS, sys.executable, "-m", "gpu.counters"]
    code, output = check.run(command, seconds)
    for number, row in enumerate(rows_of(output)):
        section.add(f"{number} {row['kernel']}", row)
    if section.rows:
        section.left_out.pop("counters", None)
        section.save()
    elif code is None:
        section.skip("counters", f"stopped after {seconds:.0f} s")
    else:
        section.skip("counters", f"ncu counted nothing, exit code {code}: {' '.join(output.split())[-400:]}")


def rows_of(output: str) -> list[dict[str, Any]]:
    """What ncu's CSV page says of every launch; lines before its header are the program's."""
    lines = output.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    table = list(csv.DictReader(io.StringIO("\n".join(line for line in lines[start:] if line.startswith('"')))))
    units, found = (table[0], table[1:]) if table and not table[0]["ID"] else ({}, table)
    return [
        {"kernel": re.sub(r"\(.*", "", row.get("Kernel Name", ""))[:120]}
        | {name: _number(row[metric]) for metric, name in METRICS.items() if metric in row}
        | {f"{name}_unit": units[metric] for metric, name in METRICS.items() if units.get(metric) not in (None, "")}
        for row in found
    ]


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def main() -> None:
    import torch

    import mf_kernels
    from gpu import sweep
    from gpu.operators import DTYPES

    calls: collections.deque[Any] = collections.deque()
    for case in sweep.cases("cuda", dry=False):
        inputs = case.inputs(DTYPES["bfloat16"], layout="channels_last")
        leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
        calls.append((case.function(mf_kernels), leaves, case.d_output(DTYPES["bfloat16"], layout="channels_last")))
    for counted in (False, True):
        if counted:
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
        for function, leaves, d_output in calls:
            with mf_kernels.use_backend("triton"):
                torch.autograd.grad(function(**leaves), list(leaves.values()), d_output)
        torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()
