"""What is read out of result files: groups of contenders, ratios, words for people. Knows neither torch nor charts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PLAIN = ("eager", "compile")

Row = dict[str, Any]
Result = dict[str, Any]


def load(path: Path) -> Result:
    """One result file. Raises ValueError naming the file when it is of another format."""
    result = json.loads(path.read_text(encoding="utf-8"))
    if result.get("format") != 1:
        raise ValueError(f"{path}: expected a result of format 1, got {result.get('format')!r}")
    return result


def machine_name(result: Result) -> str:
    return result["environment"].get("gpu") or result["environment"]["cpu"]


def images(stem: str) -> dict[str, str]:
    """Names of the charts of a result, as the page refers to them."""
    names = {"model": "networks", "operators": "operators", "race": "race"}
    return {suite: f"images/{stem}-{name}.png" for suite, name in names.items()}


def caption(result: Result, *, brief: bool = False) -> str:
    """Machine, versions, date and commit, in a few sentences; brief, without what cannot be seen from a figure."""
    e = result["environment"]
    commit = f"commit {e['commit'][:10]}{' with local changes' if e['dirty'] else ''}" if e["commit"] else "no commit"
    parts = [
        f"{e['cpu']}, {e['threads']} of {e['processors']} processors, {e['instruction_set']}, {e['system']}",
        *([f"{e['gpu']}, CUDA {e['cuda']}"] if "gpu" in e else []),
        f"Python {e['python']}, torch {e['torch']}, numpy {e['numpy']}, mobileformer {e['mobileformer']}",
        *([] if brief else [f"Kernels: {e['kernels']}"]),
        f"{result['started'][:10]}, {commit}",
        *(["The kernels were older than their sources"] if e["kernels_older_than_sources"] else []),
    ]
    return ". ".join(parts) + "."


def grouped(rows: Iterable[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """{(operator, case, direction): the contenders}, in the order of the file."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["op"], row["case"], row["direction"]), []).append(row)
    return groups


def fastest(group: list[Row], *backends: str) -> Row | None:
    """The fastest row of these backends, None where there is none."""
    return min((row for row in group if row["backend"] in backends), key=lambda row: row["min_ms"], default=None)


def fastest_fused(group: list[Row]) -> Row | None:
    return min((row for row in group if row["backend"] not in PLAIN), key=lambda row: row["min_ms"], default=None)


def speedup(group: list[Row], row: Row | None) -> float | None:
    """The faster eager layout over a row of the same group."""
    eager = fastest(group, "eager")
    return eager["min_ms"] / row["min_ms"] if eager and row else None


def ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x" if value < 10 else f"{value:.0f}x"


def rounded(value: Any) -> Any:
    """Floats to five significant digits, in dicts too: more is noise, and unreadable."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


def shape_of(case: str) -> str:
    """A row's shape for people: "1x24x56x56-mult6-k3-s2-identity" -> "24 x 56 x 56, 6 filters a channel, stride 2"."""
    size, *rest = case.split("-")
    parts = [" x ".join(size.split("x")[1:])]
    for part in rest:
        if part in ("identity", "k3", "s1", "mult1", "2heads"):  # as in most layers
            continue
        number_of = re.match(r"\d+", part)
        if part.startswith("mult"):
            parts.append(f"{part[4:]} filters a channel")
        elif part.startswith("k"):
            parts.append(f"{part[1:]} x {part[1:]}")
        elif part.startswith("s") and part[1:].isdigit():
            parts.append(f"stride {part[1:]}")
        else:
            parts.append(f"{number_of[0]} {part[number_of.end() :]}" if number_of else part)
    return ", ".join(parts)
