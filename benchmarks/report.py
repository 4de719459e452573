"""Renders results to docs/benchmarks.md and to charts in docs/images: nobody edits those by hand.

    python benchmarks/report.py                # every *thread.json in benchmarks/results
    python benchmarks/report.py FILE...        # these

Needs matplotlib for the charts, and neither torch nor the package for the page.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Mapping
from pathlib import Path

import race
from reading import (
    PLAIN,
    Result,
    Row,
    caption,
    fastest,
    fastest_fused,
    grouped,
    images,
    load,
    machine_name,
    ratio,
    shape_of,
    speedup,
)

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks/results", ROOT / "docs/benchmarks.md"
TIMES = "*thread.json"  # beside them lie results of another kind
NAMES = {"compile": "torch.compile", "to_inference": "`to_inference`"}
WANTED_SPEEDUP, WANTED_AT = 2.0, ("56x56", "28x28")

INTRODUCTION = """\
# Benchmarks

This page is written by `benchmarks/report.py` from the files in `benchmarks/results`, which are written by

```
make bench BENCH="--with-compile --save-results"
```

- Every contender's numbers are compared with the float64 reference before it is timed; one that is wrong fails and
  has no time. Kernels are held to twice the error of plain PyTorch; a fused row also fails if another kernel served it.
- Times are the minimum over rounds in which all contenders of a row take turns. Only such times are divided by each
  other. "Against eager" is the faster of the two eager layouts over the faster fused layout.
- Bytes are the least that the operation has to move: every input read once, every output written once. GB/s is those
  bytes over the time, "of a copy" is that over the rate of a plain copy of as many bytes, warm in the same caches.
- Operators: batch 1, shapes of the networks at 224 x 224. Forward runs without gradients, backward is the gradients
  of all inputs alone. What the kernels save in a training step is in the training rows of the networks.
- Runtimes: all contenders of a table take turns. ONNX Runtime and OpenVINO get the graph that `mobileformer export`
  writes, with its shape made static, and the settings that were found fastest for them. "Engine gains" is the faster of
  the two over the engine in the same precision; "off by" is the largest difference of logits from the model in float64,
  over the largest logit. Accuracies are published ones, weights are random.
- Before commit fe579e7 ONNX Runtime's threads span on into the next contender's turn: with two threads OpenVINO's times
  are too long in older runs.
"""


def render(results: Mapping[str, Result]) -> str:
    """The page: a section for each result, by the stem of its file."""
    return "\n".join([INTRODUCTION, *(section(stem, result) for stem, result in results.items())])


def section(stem: str, result: Result) -> str:
    environment = result["environment"]
    threads = environment["threads"]
    networks = [row for row in result["rows"] if row["suite"] == "model"]
    operators = [row for row in result["rows"] if row["suite"] == "operators"]
    parts = [f"## {machine_name(result)}, {threads} thread{'s' if threads > 1 else ''}", "", caption(result), ""]
    if networks:
        parts += ["### Networks", "", f"![Time per image of each network]({images(stem)['model']})", ""]
        parts += [*network_tables(networks), ""]
    raced = [row for row in result["rows"] if row["suite"] == "race"]
    if raced:
        parts += ["### Runtimes", "", f"![Accuracy against time]({images(stem)['race']})", "", *race.tables(raced)]
    if operators:
        parts += ["### Operators", "", f"![Speedup of each operator]({images(stem)['operators']})", ""]
        for op in dict.fromkeys(row["op"] for row in operators):
            parts += [f"#### {op}", "", *operator_table([row for row in operators if row["op"] == op]), ""]
        parts += [*slower_than_wanted(operators), *backend_order(operators)]
    if result["failed"]:
        parts += ["### Failed, so not timed", ""]
        parts += [
            f"- {row['op']} {row['case']} {row['direction']}, {row['backend']} {row['layout']}: {row['error']}"
            for row in result["failed"]
        ]
        parts += [""]
    return "\n".join(parts)


def network_tables(rows: list[Row]) -> list[str]:
    """Milliseconds a call, a table for each task."""
    lines = []
    for task in dict.fromkeys((row["direction"], row["batch"]) for row in rows):
        chosen = [row for row in rows if (row["direction"], row["batch"]) == task]
        shape = chosen[0]["case"].split("-")[1].split("x")
        what = "Inference" if task[0] == "inference" else "Training step (forward, cross entropy, backward, AdamW)"
        contenders = list(dict.fromkeys((row["backend"], row["layout"]) for row in chosen))
        ours = [backend for backend, _ in contenders if backend not in PLAIN]
        head = [
            "network",
            *(f"{column(c)}, ms" for c in contenders),
            *(f"{column((b, ''))} against eager" for b in ours),
        ]
        body = []
        for group in grouped(chosen).values():
            times = {(row["backend"], row["layout"]): number(row["min_ms"]) for row in group}
            ratios = [ratio(speedup(group, fastest(group, backend))) for backend in ours]
            body.append([group[0]["variants"], *(times.get(c, "") for c in contenders), *ratios])
        lines += [f"{what}, batch {task[1]}, {shape[2]} x {shape[3]}:", "", *table(head, body, words=1), ""]
    return lines[:-1]


def operator_table(rows: list[Row]) -> list[str]:
    """Microseconds a call."""
    contenders = list(dict.fromkeys((row["backend"], row["layout"]) for row in rows))
    contenders.sort(key=lambda c: (c[0] not in PLAIN, c[0] == "compile"))
    head = [
        "shape",
        "layer of",
        "pass",
        *(f"{column(c)}, us" for c in contenders),
        "against eager",
        "GB/s",
        "of a copy",
    ]
    body = []
    for (_, case, direction), group in grouped(rows).items():
        times = {(row["backend"], row["layout"]): number(1e3 * row["min_ms"]) for row in group}
        best = fastest_fused(group)
        rates = [number(best["gb_per_s"]), f"{best['share_of_copy']:.0%}"] if best else ["", ""]
        cells = [*(times.get(c, "") for c in contenders), ratio(speedup(group, best)), *rates]
        body.append([shape_of(case), group[0]["variants"].replace(" ", ", "), direction, *cells])
    return table(head, body, words=3)


def slower_than_wanted(rows: list[Row]) -> list[str]:
    """Forward passes on the large maps that are not twice as fast as eager, with what they reach."""
    below = []
    for (op, case, direction), group in grouped(rows).items():
        gained = speedup(group, fastest_fused(group))
        if direction == "forward" and any(side in case for side in WANTED_AT) and gained and gained < WANTED_SPEEDUP:
            below.append(f"- {op} {shape_of(case)} ({group[0]['variants']}): {ratio(gained)}")
    title = f"Forward at {' and '.join(WANTED_AT)}, below {WANTED_SPEEDUP:g}x of eager:"
    return [title, "", *(below or ["- none"]), ""]


def backend_order(rows: list[Row]) -> list[str]:
    """Where a device has two backends: how much faster native is than Triton, operator by operator."""
    ratios: dict[tuple[str, str], list[float]] = {}
    for (op, _, direction), group in grouped(rows).items():
        native, triton = fastest(group, "native"), fastest(group, "triton")
        if native and triton:
            ratios.setdefault((op, direction), []).append(triton["min_ms"] / native["min_ms"])
    if not ratios:
        return []
    body = [
        [op, direction, ratio(geometric_mean(values)), str(len(values))] for (op, direction), values in ratios.items()
    ]
    return [
        "Which backend is faster:",
        "",
        *table(["operator", "pass", "native against triton", "shapes"], body, words=2),
        "",
    ]


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def column(contender: tuple[str, str]) -> str:
    """Heading of a contender's column."""
    backend, layout = contender
    return NAMES.get(backend, backend) + (", channels_last" if layout == "channels_last" else "")


def number(value: float) -> str:
    """Three significant digits, never in powers of ten."""
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:.{digits}f}"


def table(head: list[str], body: list[list[str]], *, words: int) -> list[str]:
    """A Markdown table whose first columns are words, the others numbers, aligned to the right."""
    rule = ["---" if index < words else "---:" for index in range(len(head))]
    return ["| " + " | ".join(cells) + " |" for cells in (head, rule, *body)]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="results (benchmarks/results/*thread.json)")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page; charts go to images/ beside it")
    options = parser.parse_args(arguments)
    files = options.files or sorted(RESULTS.glob(TIMES))
    if not files:
        parser.error(f"no results in {RESULTS}: make bench BENCH=--save-results writes them")
    import charts

    results = {path.stem: load(path) for path in files}
    folder = options.page.parent
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for stem, result in results.items():
        for path in charts.draw(stem, result, folder):
            print(path)
    temporary = options.page.with_name(f".{options.page.name}.tmp")
    temporary.write_text(render(results), encoding="utf-8")
    os.replace(temporary, options.page)
    print(options.page)


if __name__ == "__main__":
    main()
