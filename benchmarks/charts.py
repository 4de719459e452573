"""The charts of the benchmark report: time per image of each network, speedup of each operator.

Colours are those of Okabe and Ito, told apart with any colour vision; markers differ in shape too.
"""

from __future__ import annotations

import os
import textwrap
from pathlib import Path
from typing import Any

import matplotlib as mpl
import race
import reading
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, NullLocator

INK, FAINT, GRID = "#1f2933", "#616e7c", "#d9dee3"
GREY, ORANGE, BLUE, SKY, RED = "#a5adb5", "#e69f00", "#0072b2", "#56b4e9", "#d55e00"
DPI = 160
HALO = withStroke(linewidth=2, foreground="white")  # around a number that stands on the grid
VARIANT = "294m"  # the operators' chart is of one network; the page's tables have all
BARS = {"eager": ("eager, the faster layout", GREY), "compile": ("torch.compile", ORANGE)} | {
    "fused": ("fused", BLUE),
    "to_inference": ("fused, to_inference()", SKY),
}


def draw(stem: str, result: reading.Result, folder: Path) -> list[Path]:
    """Write the charts that the page of this result refers to, beside it; the paths that were written."""
    style = {"font.family": "DejaVu Sans", "font.size": 9, "text.color": INK, "axes.labelcolor": INK}
    written = []
    with mpl.rc_context(style | {"xtick.color": INK, "ytick.color": INK, "axes.edgecolor": FAINT}):
        for suite, name in reading.images(stem).items():
            rows = [row for row in result["rows"] if row["suite"] == suite]
            if rows:
                figure = {"model": networks, "operators": operators, "race": _race}[suite](rows)
                figure.set_dpi(DPI)
                figure.supxlabel(_caption(result, figure), x=0.01, ha="left", fontsize=7, color=FAINT)
                if suite == "race":
                    race.name_points(figure, rows, BLUE, RED)
                written.append(_save(figure, folder / name))
    return written


def _race(rows: list[reading.Row]) -> Figure:
    return race.chart(rows, {"blue": BLUE, "sky": SKY, "grey": GREY, "red": RED, "grid": GRID})


def networks(rows: list[reading.Row]) -> Figure:
    """A panel for each task, a group of bars for each network; speedups stand beside the bars they belong to."""
    tasks = list(dict.fromkeys((row["direction"], row["batch"]) for row in rows))
    panels = {
        task: [g for g in reading.grouped(rows).values() if (g[0]["direction"], g[0]["batch"]) == task]
        for task in tasks
    }
    slots = max(map(len, panels.values()))
    height = 0.8 / max(len({row["backend"] for row in group}) for groups in panels.values() for group in groups)
    figure = Figure(figsize=(9.2, 5.1), layout="constrained")
    axes = figure.subplots(1, len(tasks), squeeze=False)[0]
    shown: dict[str, Any] = {}
    for ax, (task, groups) in zip(axes, panels.items(), strict=True):
        shown |= _bars(ax, groups, batch=task[1], slots=slots, height=height)
        what = "Inference" if task[0] == "inference" else "Training step"
        side = groups[0][0]["case"].rpartition("x")[2]
        ax.set_title(f"{what}\nbatch {task[1]}, {side} × {side}", loc="left", fontsize=9.5)
        ax.set_xlabel("milliseconds per image")
    handles = [shown[backend] for backend in BARS if backend in shown]
    _head(figure, "Time per image of each network (shorter is faster)", handles)
    return figure


def _bars(ax: Axes, groups: list[list[reading.Row]], *, batch: int, slots: int, height: float) -> dict[str, Any]:
    shown = {}
    for place, group in enumerate(groups):
        present = [backend for backend in BARS if reading.fastest(group, backend)]
        for index, backend in enumerate(present):
            row = reading.fastest(group, backend)
            assert row is not None
            label, color = BARS[backend]
            y = place + (index - (len(present) - 1) / 2) * height
            time = row["min_ms"] / batch
            shown[backend] = ax.barh(y, time, 0.88 * height, color=color, label=label)
            told = (
                f"{time:.3g} ms" if backend == "eager" else reading.ratio(reading.speedup(group, row)).replace("x", "×")
            )
            ax.annotate(
                told,
                (time, y),
                (3, -0.5),
                textcoords="offset points",
                va="center",
                fontsize=7,
                color=FAINT,
                path_effects=[HALO],
            )
    ax.set_yticks(range(len(groups)), [group[0]["variants"] for group in groups])
    ax.set_ylim(slots - 0.5, -0.5)
    ax.margins(x=0.2)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", color=GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right", "left"]].set_visible(False)
    return shown


def operators(rows: list[reading.Row]) -> Figure:
    """A panel for each operator, a line for each shape: how many times faster than the faster eager layout."""
    groups = {key: g for key, g in reading.grouped(rows).items() if VARIANT in g[0]["variants"].split()}
    panels: dict[str, list[str]] = {}
    for op, case, _ in groups:
        panels.setdefault(op, [])
        if case not in panels[op]:
            panels[op].append(case)
    lines = [len(cases) for cases in panels.values()]
    figure = Figure(figsize=(9.2, 1.5 + 0.24 * sum(lines) + 0.3 * len(lines)), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=[n + 0.6 for n in lines])[:, 0]
    for ax, (op, cases) in zip(axes, panels.items(), strict=True):
        for place, case in enumerate(cases):
            _dots(
                ax,
                place,
                {direction: groups[op, case, direction] for o, c, direction in groups if (o, c) == (op, case)},
            )
        ax.set_title(op, loc="left", fontsize=9, family="monospace", pad=3)
        ax.set_yticks(range(len(cases)), [reading.shape_of(case).replace(" x ", " × ") for case in cases], fontsize=8)
        ax.set_ylim(len(cases) - 0.4, -0.6)
        ax.tick_params(axis="both", length=0)
        ax.axvline(1, color=INK, linewidth=1)
        ax.grid(color=GRID, linewidth=0.8)
        ax.set_axisbelow(True)
        ax.spines[:].set_visible(False)
    last = axes[-1]
    last.set_xscale("log", base=2)
    last.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    last.xaxis.set_minor_locator(NullLocator())
    last.set_xlabel("speedup, eager time / time (logarithmic)")
    _head(
        figure,
        f"Operators of {VARIANT} against the faster of the two eager layouts (further right is faster)",
        _legend(),
    )
    return figure


def _dots(ax: Axes, place: int, groups: dict[str, list[reading.Row]]) -> None:
    for direction, group in groups.items():
        marker, color, nudge = ("o", BLUE, -0.13) if direction == "forward" else ("s", RED, 0.13)
        compiled = reading.speedup(group, reading.fastest(group, "compile"))
        fused = reading.speedup(group, reading.fastest_fused(group))
        common = {"marker": marker, "markeredgecolor": color, "linestyle": "none"}
        if compiled:
            ax.plot(compiled, place + nudge, **common, markerfacecolor="white", markersize=4.6, markeredgewidth=1.1)
        if fused:
            ax.plot(fused, place + nudge, **common, markerfacecolor=color, markersize=6)


def _legend() -> list[Line2D]:
    handles = []
    for name, fill in (("fused", True), ("torch.compile", False)):
        for direction, marker, color in (("forward", "o", BLUE), ("backward", "s", RED)):
            look = {"markerfacecolor": color if fill else "white", "markersize": 6 if fill else 4.6}
            handles.append(
                Line2D(
                    [], [], linestyle="none", marker=marker, markeredgecolor=color, label=f"{name}, {direction}", **look
                )
            )
    return handles


def _head(figure: Figure, title: str, handles: list[Any]) -> None:
    """The title with the legend below it."""
    bold = {"weight": "bold", "size": 10.5}
    look = {"alignment": "left", "frameon": False, "fontsize": 8.5, "borderpad": 0, "title_fontproperties": bold}
    figure.legend(handles=handles, title=title, loc="outside upper left", ncols=len(handles), **look)


def _caption(result: reading.Result, figure: Figure) -> str:
    return textwrap.fill(reading.caption(result, brief=True), int(figure.get_size_inches()[0] * 17))


def _save(figure: Figure, path: Path) -> Path:
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    os.replace(temporary, path)
    return path
