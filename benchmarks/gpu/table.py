"""What the sections' files say, for people: a page of text, printed last.

python -m gpu.table benchmarks/results/<device>
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median
from typing import Any

from reading import load

from gpu import schedule

ENOUGH = 16e6  # bytes that a call must move for its launch not to count
SECTIONS = tuple(part.name for part in schedule.PARTS)


def render(folder: Path) -> str:
    """Of every section that has a file."""
    results = {name: load(folder / f"{name}.json") for name in SECTIONS if (folder / f"{name}.json").is_file()}
    makers = {"machine": machine, "check": check, "operators": operators, "models": models, "sweep": sweep}
    makers |= {"smoke": check, "profile": profile, "more-models": models, "more-operators": operators}
    lines: list[str] = []
    for name, result in results.items():
        lines += [f"== {name}: {state(result)}", *makers.get(name, lambda _: [])(result)]
        lines += [f"  FAILED {row['label']}: {first_line(row['error'])}" for row in result["failed"][:10]]
        if len(result["failed"]) > 10:
            lines.append(f"  FAILED {len(result['failed']) - 10} more, in {name}.json")
        whys = list(result["left_out"].values())
        lines += [f"  left out, {why}: {whys.count(why)}" for why in dict.fromkeys(whys)]
    return "\n".join(lines)


def state(result: dict[str, Any]) -> str:
    counts = f"{len(result['rows'])} rows, {len(result['failed'])} failed, {len(result['left_out'])} left out"
    error = f"; BROKE OFF: {result['error'].strip().splitlines()[-1]}" if result["error"] else ""
    return f"{counts}, {result['seconds']:.0f} s{error}"


def machine(result: dict[str, Any]) -> list[str]:
    if not result["rows"]:
        return []
    e = result["environment"]
    where = [f"{e.get('gpu', e['cpu'])}", f"torch {e['torch']}", f"triton {e.get('triton')}", f"python {e['python']}"]
    lines = ["  " + ", ".join(where)]
    for row in result["rows"]:
        units = {"gb_per_s": "GB/s", "tflop_per_s": "TFLOP/s", "host_us": "us of the host"}
        told = next(f"{row[key]:.4g} {unit}" for key, unit in units.items() if key in row)
        lines.append(f"  {row['label']:<16} {told}")
    if result["missing_packages"]:
        lines.append(f"  not installed here: {', '.join(result['missing_packages'])}")
    return lines


def check(result: dict[str, Any]) -> list[str]:
    tests = [row["outcome"] for row in result["rows"] if "outcome" in row]
    lines = [f"  tests: {tests.count('passed')} passed, {tests.count('skipped')} skipped"]
    return lines + [f"  {row['label']}: nothing found" for row in result["rows"] if "outcome" not in row]


def operators(result: dict[str, Any]) -> list[str]:
    """Against the targets first; then a line for each shape, of each backend's faster layout."""
    if not result["rows"]:
        return []
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        groups.setdefault(tuple(row[key] for key in ("op", "case", "direction", "dtype")), []).append(row)
    shares: dict[tuple[str, ...], list[float]] = {}
    lines = []
    for (op, case, direction, dtype), rows in groups.items():
        best = {b: fastest(rows, b) for b in ("eager", "compile", "triton", "native")}
        cells = [f"{1e3 * row['median_ms']:8.1f}" if row else "       -" for row in best.values()]
        for backend in ("triton", "native"):
            row = best[backend]
            measured = row is not None and row["share_of_copy"] is not None
            cells.append(f"{row['share_of_copy']:6.0%}" if measured else "     -")
            if measured and row["bytes"] >= ENOUGH:
                shares.setdefault((op, direction, dtype, backend), []).append(row["share_of_copy"])
        lines.append(f"  {op:17}{case:44}{direction[:3]} {dtype[:4]}{''.join(cells)}")
    head = "  share of the copy ceiling, median (worst) of the shapes that move 16 MB or more; target of the operator"
    summary = []
    for (op, direction, dtype, backend), values in sorted(shares.items()):
        target = result["targets"][op][direction]
        told = f"{median(values):4.0%} ({min(values):.0%}), target {target:.0%}"
        reached = ": reached" if median(values) >= target else ""
        summary.append(f"  {op:17}{direction:9}{dtype:9}{backend:7} {told}{reached}")
    columns = (
        f"  {'us a call':77}{'eager':>4}{'compile':>8}{'triton':>8}{'native':>8}{'triton':>7}{'native':>6} of copy"
    )
    return [head, *summary, columns, *lines]


def models(result: dict[str, Any]) -> list[str]:
    """Milliseconds a call of every contender, a line for each network, task and dtype."""
    groups: dict[str, list[str]] = {}
    for row in result["rows"]:
        group, _, contender = row["label"].partition(": ")
        groups.setdefault(group, []).append(f"{contender} {row['median_ms']:.3g}")
    return [f"  {group:40} ms: {', '.join(cells)}" for group, cells in groups.items()]


def profile(result: dict[str, Any]) -> list[str]:
    """Of every call the kernels, their time, and the three that take the longest."""
    lines = []
    for row in result["rows"]:
        longest = ", ".join(f"{k['kernel'][:40]} {k['us']:.0f}" for k in row["by_kernel"][:3])
        times = f"{row['device_us']:.0f} us on the device, {row['wall_us']:.0f} us in all"
        lines.append(f"  {row['label']:28} {row['kernels']:.0f} kernels, {times}: {longest}")
    return lines


def sweep(result: dict[str, Any]) -> list[str]:
    """Of every kernel the variations, each as a share of the chosen settings' time."""
    groups: dict[str, dict[str, float]] = {}
    for row in result["rows"]:
        group, _, variation = row["label"].partition(": ")
        groups.setdefault(group, {})[variation] = row["median_ms"]
    lines = []
    for group, times in groups.items():
        chosen = times.get("as chosen")
        cells = [f"{name} {ms / chosen:.2f}" for name, ms in times.items() if chosen]
        lines.append(f"  {group:70} {', '.join(cells)}")
    return lines


def fastest(rows: list[dict[str, Any]], backend: str) -> dict[str, Any] | None:
    return min((row for row in rows if row["backend"] == backend), key=lambda row: row["median_ms"], default=None)


def first_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[0][:200]


if __name__ == "__main__":
    print(render(Path(sys.argv[1])))
