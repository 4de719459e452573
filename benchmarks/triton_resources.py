"""Compile every Triton kernel at the launches of the model, without a GPU, and write down what each one needs.

    python benchmarks/triton_resources.py          # benchmarks/results/triton-resources.json and docs/triton.md

Every timed layer of `mf_kernels.testing`, forward and backward: bfloat16, channels_last, batch 128 for compute
capability 8.0 and 9.0; float32, contiguous, batch 1 for 9.0. Takes a few minutes on one core.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton

from mf_kernels.testing import TIMED
from mf_kernels.triton._resources import launches_of, resources, settings

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "triton-resources.json"
TABLE = ROOT / "docs" / "triton.md"
CONFIGURATIONS = (
    {"arch": 90, "dtype": "bfloat16", "channels_last": True, "batch": 128},
    {"arch": 80, "dtype": "bfloat16", "channels_last": True, "batch": 128},
    {"arch": 90, "dtype": "float32", "channels_last": False, "batch": 1},
)


def rows() -> Iterator[tuple[dict[str, Any], Any]]:
    """Each distinct kernel and setting once, with the first layer that launches it, and that launch."""
    for configuration in CONFIGURATIONS:
        seen = set()
        arch, batch, channels_last = (configuration[key] for key in ("arch", "batch", "channels_last"))
        dtype = getattr(torch, configuration["dtype"])
        for case in TIMED:
            for call in launches_of(case, dtype, channels_last=channels_last, batch=batch, arch=arch):
                row = {
                    "kernel": call.kernel.__name__,
                    **configuration,
                    "settings": settings(call),
                }
                key = json.dumps(row, sort_keys=True)
                if key not in seen:
                    seen.add(key)
                    yield {"op": case.op, "layer": case.name, **row}, call


def main() -> None:
    """Write both files, each to a temporary name first."""
    table = [row | resources(call, row["arch"]) for row, call in rows()]
    written = {"triton": triton.__version__, "kernels": table}
    lines = ["[\n" + ",\n".join(json.dumps(row) for row in table) + "\n]"]
    _write(RESULTS, f'{{"triton": {json.dumps(written["triton"])}, "kernels": {lines[0]}}}\n')
    _write(TABLE, markdown(written))


def markdown(written: dict[str, Any]) -> str:
    """The table for people: one line for each kernel of each configuration, its heaviest setting."""
    lines = [
        "# Triton kernels: what they need",
        "",
        "Written by `python benchmarks/triton_resources.py`; every setting is in",
        "[triton-resources.json](../benchmarks/results/triton-resources.json).",
        "Compiled for real, executed in Triton's interpreter, not yet timed on a card.",
        "",
        f"Triton {written['triton']}, at the layers of 26m, 294m and 508m. Each line is the worst over a kernel's",
        "settings: most registers, spilled bytes and shared memory, fewest bytes that one load or store of a",
        "thread moves at its widest.",
        "",
        "| kernel | sm | dtype, layout, batch | settings | registers | spilled | shared bytes | load | store |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in written["kernels"]:
        layout = "channels_last" if row["channels_last"] else "contiguous"
        key = (row["kernel"], row["arch"], f"{row['dtype']}, {layout}, {row['batch']}")
        groups.setdefault(key, []).append(row)
    for (kernel, arch, what), group in sorted(groups.items()):
        numbers = [
            len(group),
            *(max(row[key] for row in group) for key in ("registers", "spilled_bytes", "shared_bytes")),
            *(min(max(int(width) for width in row[key]) for row in group) for key in ("loads", "stores")),
        ]
        lines.append(f"| {kernel} | {arch} | {what} | {' | '.join(map(str, numbers))} |")
    return "\n".join(lines) + "\n"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(path.suffix + ".part")
    temporary.write_text(text)
    os.replace(temporary, path)


if __name__ == "__main__":
    main()
