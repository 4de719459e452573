"""What the rows of every benchmark file share: checked before timed, timed in turns, recorded in long format.

A group is one thing computed several ways by its contenders, on the same values: eager in both layouts,
torch.compile, the fused kernels. They are timed in turns (`mobileformer.measure`), and a ratio is one between
two of a group. pytest-benchmark times one contender after another: its figures are for its own tools.
"""

from __future__ import annotations

import datetime
import json
import math
import re
import subprocess
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import reading
import torch
from reading import rounded

import mf_kernels
import mobileformer
from mobileformer.files.replacing import replacing
from mobileformer.measure.machine import machine
from mobileformer.measure.timing import Timing, interleaved

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

ROOT = Path(__file__).resolve().parents[1]
MEASURED = ("mf_kernels", "mobileformer", "csrc", "setup.py", "benchmarks", ":!benchmarks/results")
EAGER = "eager"


@dataclass
class Row:
    """One contender of a group: what it is, whether it is right, how long it took."""

    facts: dict[str, Any]  # the columns that say what was measured
    run: Callable[[], object]
    calls: Callable[[], AbstractContextManager[Any]] = nullcontext  # the mode in which `run` is called
    error: str | None = None  # why it is not timed
    timing: Timing | None = None

    @property
    def name(self) -> str:
        return f"{self.facts['backend']} {self.facts['layout']}"


@dataclass
class Recorder:
    """Collects the rows of a session, with what they depend on, and writes them to a file for each device."""

    threads: int
    arguments: list[str]
    rows: list[dict[str, Any]] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)  # rows that are not timed, with the reason
    started: float = field(default_factory=time.time)
    _environments: dict[str, dict[str, Any]] = field(default_factory=dict)
    _copies: dict[str, dict[int, float]] = field(default_factory=dict)

    def environment(self, device: str) -> dict[str, Any]:
        if device not in self._environments:
            self._environments[device] = environment(device)
        return self._environments[device]

    def copies(self, device: str) -> dict[int, float]:
        """{bytes moved: GB/s} of plain copies, measured once a session."""
        if device not in self._copies:
            self._copies[device] = copy_rates(device)
        return self._copies[device]

    def record(self, benchmark: BenchmarkFixture, row: Row, group: list[Row]) -> None:
        """Fail if the row is wrong; else let pytest-benchmark time it too, and keep it with its group's ratio."""
        if row.error is not None or row.timing is None:
            error = row.error or "not timed"
            self.failed.append(row.facts | {"error": error})
            raise AssertionError(f"{row.name}: {error}")
        device = row.facts["device"]
        finished = row.facts | self._measures(row, group)
        times = {other.name: other.timing.min_ms for other in group if other.timing is not None}
        benchmark.group = " ".join(str(row.facts[key]) for key in ("op", "case", "direction"))
        benchmark.extra_info.update(finished | self.environment(device) | {"interleaved_ms": times})
        wait = waiting(device)
        with row.calls():
            benchmark.pedantic(
                row.run if wait is None else lambda: (row.run(), wait()),
                rounds=5 if row.timing.min_ms < 100 else 2,
                iterations=row.timing.calls,
            )
        self.rows.append(finished)

    def _measures(self, row: Row, group: list[Row]) -> dict[str, Any]:
        timing = row.timing
        assert timing is not None
        eager = [r.timing.min_ms for r in group if r.facts["backend"] == EAGER and r.timing is not None]
        moved, flops = row.facts["bytes"], row.facts["flops"]
        copy = rate_at(self.copies(row.facts["device"]), moved) if moved else None
        rate = moved / timing.min_ms / 1e6 if moved else None
        return {
            "min_ms": timing.min_ms,
            "median_ms": timing.median_ms,
            "rounds": len(timing.samples_ms),
            "calls_per_round": timing.calls,
            "against_eager": min(eager) / timing.min_ms if eager else None,
            "gb_per_s": rate,
            "copy_gb_per_s": copy,
            "share_of_copy": rate / copy if rate and copy else None,
            "gflop_per_s": flops / timing.min_ms / 1e6 if flops else None,
        }

    def save(self, folder: Path) -> list[Path]:
        """One file for each device, `<machine>-<threads>thread.json`, each written as a whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for device in dict.fromkeys(row["device"] for row in self.rows):
            described = self.environment(device)
            slug = re.sub(r"[^a-z0-9]+", "-", str(described.get("gpu", described["cpu"])).lower()).strip("-")
            paths.append(folder / f"{slug}-{self.threads}thread.json")
            header = {
                "format": 1,
                "environment": described,
                "arguments": self.arguments,
                "started": datetime.datetime.fromtimestamp(self.started, datetime.UTC).isoformat("T", "seconds"),
                "seconds": round(time.time() - self.started),
                "copy_gb_per_s": {str(size): rounded(rate) for size, rate in self.copies(device).items()},
                "failed": [row for row in self.failed if row["device"] == device],
            }
            rows = [rounded(row) for row in self.rows if row["device"] == device]
            with replacing(paths[-1]) as temporary:
                temporary.write_text(as_lines(header, rows), encoding="utf-8")
        return paths


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each operator and pass, and each network: how much faster than the faster eager layout."""
    gains: dict[str, list[float]] = {}
    for (op, _, direction), group in reading.grouped(rows).items():
        name, best = f"{op} {direction}", {"": reading.fastest_fused(group)}
        if group[0]["suite"] == "model":
            name = f"{group[0]['variants']} {direction}, batch {group[0]['batch']}"
            best = {f", {backend}": reading.fastest(group, backend) for backend in ("fused", "to_inference")}
        for label, row in best.items():
            gained = reading.speedup(group, row)
            if gained is not None:
                gains.setdefault(name + label, []).append(gained)
    return [
        f"{name}: {min(values):.2f}x" + (f" to {max(values):.2f}x of {len(values)} shapes" if len(values) > 1 else "")
        for name, values in gains.items()
    ]


def time_in_turns(rows: list[Row], *, repeats: int, min_sample_ms: float, device: str) -> None:
    """Time those of a group that are right."""
    right = {row.name: row for row in rows if row.error is None}
    if not right:
        return
    runs = {name: row.run for name, row in right.items()}
    with next(iter(right.values())).calls():
        timings = interleaved(runs, repeats=repeats, warmup=3, min_sample_ms=min_sample_ms, synchronize=waiting(device))
    for name, timing in timings.items():
        right[name].timing = timing


def waiting(device: str) -> Callable[[], object] | None:
    """What waits for the device, None where a call returns when it is done."""
    return torch.cuda.synchronize if device == "cuda" else None


def devices(only: str | None = None) -> dict[str, dict[str, list[str]]]:
    """{device: {operator: backends that serve it}}, of the devices that have any kernel."""
    found: dict[str, dict[str, list[str]]] = {}
    for line in mf_kernels.status():
        if line["available"] and only in (None, line["device"]):
            found.setdefault(line["device"], {}).setdefault(line["op"], []).append(line["backend"])
    return found


def environment(device: str) -> dict[str, Any]:
    """The machine, the versions and the code: all that a figure depends on besides its own row."""
    lines = [line for line in mf_kernels.status() if line["device"] == device and line["automatic"]]
    return machine(device) | {
        "numpy": np.__version__,
        "mobileformer": mobileformer.__version__,
        "kernels": "; ".join(sorted({str(line["built_with"]) for line in lines})) or None,
        "kernels_older_than_sources": _is_stale(device),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--", *MEASURED)),
    }


def copy_rates(device: str) -> dict[int, float]:
    """{bytes moved: GB/s} of `copy_` between two buffers that hold that many bytes together, 16 KiB to 256 MiB.

    A row is held against the copy of its own size: what fits a cache is not held against main memory.
    """
    rates = {}
    for power in range(14, 30, 2):
        half = 2**power // 2
        source, target = (torch.ones(half // 4, device=device) for _ in range(2))
        copying = {"copy": lambda source=source, target=target: target.copy_(source)}
        timing = interleaved(copying, repeats=20, min_sample_ms=1.0, synchronize=waiting(device))["copy"]
        rates[2 * half] = 2 * half / timing.min_ms / 1e6
    return rates


def rate_at(rates: dict[int, float], moved: int) -> float:
    """The copy rate for a number of bytes, between the measured ones on a logarithmic axis."""
    sizes = sorted(rates)
    return float(np.interp(math.log(moved), [math.log(size) for size in sizes], [rates[size] for size in sizes]))


def as_lines(header: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """JSON with a row a line, so that a new result can be read as a diff."""
    head = json.dumps(header, indent=1)[:-2]
    return f'{head},\n "rows": [\n' + ",\n".join(json.dumps(row) for row in rows) + "\n]\n}\n"


def _git(*arguments: str) -> str | None:
    """What git prints, stripped; None outside a repository or without git."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _is_stale(device: str) -> bool | None:
    """Whether a source was changed after the library was built from it; None without library or sources."""
    library = ROOT / f"mf_kernels/_{device}.so"
    folders = [ROOT / "csrc" / name for name in ("common", "tensor", device)]
    changed = [path.stat().st_mtime for folder in folders for path in folder.rglob("*") if path.is_file()]
    return max(changed) > library.stat().st_mtime if changed and library.is_file() else None
