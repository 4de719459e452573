"""The race between runtimes, as tables and a chart: reads result files, knows neither torch nor what was run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import reading
from reading import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = {
    ("engine", "float32"): "engine",
    ("onnxruntime", "float32"): "ONNX Runtime",
    ("openvino", "float32"): "OpenVINO",
    ("eager", "float32"): "eager",
    ("engine", "bfloat16"): "engine, bf16",
    ("openvino", "bfloat16"): "OpenVINO, bf16",
}
OTHERS = {"float32": ("onnxruntime", "openvino"), "bfloat16": ("openvino",)}
ROUNDED = (("engine", "bfloat16"), ("openvino", "bfloat16"))  # they differ in how far their logits are off


def times(rows: list[Row]) -> dict[str, dict[tuple[str, str], float]]:
    """{network: {(backend, dtype): milliseconds an image}}, in the order of the rows."""
    found: dict[str, dict[tuple[str, str], float]] = {}
    for row in rows:
        found.setdefault(row["variants"], {})[row["backend"], row["dtype"]] = row["min_ms"] / row["batch"]
    return found


def gain(of: dict[tuple[str, str], float], dtype: str) -> float | None:
    """The faster of the other runtimes over the engine, in the same precision."""
    others = [of[backend, dtype] for backend in OTHERS[dtype] if (backend, dtype) in of]
    return min(others) / of["engine", dtype] if others and ("engine", dtype) in of else None


def tables(rows: list[Row]) -> list[str]:
    """One for each race: milliseconds an image, and what the engine gains."""
    lines = []
    for threads, batch in dict.fromkeys((row["threads"], row["batch"]) for row in rows):
        chosen = times([row for row in rows if (row["threads"], row["batch"]) == (threads, batch)])
        ours = {name: of for name, of in chosen.items() if any(backend == "engine" for backend, _ in of)}
        contenders = [key for key in NAMES if any(key in of for of in ours.values())]
        head = [*("network", *(f"{NAMES[key]}, ms" for key in contenders)), "engine gains", "engine gains, bf16"]
        head += [f"{NAMES[key]}, off by" for key in ROUNDED if key in contenders]
        off = {(r["variants"], r["backend"], r["dtype"]): r["logits_off_by"] for r in rows if r["batch"] == batch}
        kernels = {row["kernel"] for row in rows if row["backend"] == "engine"}
        told = f"{threads} thread{'s' if threads > 1 else ''}, batch {batch}, 224 x 224, the engine in"
        lines += [f"{told} {', '.join(sorted(kernels))}, milliseconds an image:", ""]
        lines += [_line(head), _line(["---", *["---:"] * (len(head) - 1)])]
        for name, of in ours.items():
            cells = [f"{of[key]:.2f}" if key in of else "" for key in contenders]
            gains = [reading.ratio(gain(of, dtype)) for dtype in OTHERS]
            errors = [f"{off[name, *key]:.2%}" if key in of else "" for key in ROUNDED if key in contenders]
            lines += [_line([name, *cells, *gains, *errors])]
        lines += [""]
        peers = {name: of for name, of in chosen.items() if name not in ours}
        if peers:
            lines += ["Other networks in the same run, float32:", ""]
            lines += [
                _line(["network", "published top-1", "ONNX Runtime, ms", "OpenVINO, ms"]),
                _line(["---", *["---:"] * 3]),
            ]
            top1 = {row["variants"]: row["top1"] for row in rows}
            for name, of in peers.items():
                cells = [f"{of[key, 'float32']:.2f}" if (key, "float32") in of else "" for key in OTHERS["float32"]]
                lines += [_line([name, f"{top1[name]:.1f} %", *cells])]
            lines += [""]
    return lines


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def chart(rows: list[Row], colors: dict[str, str]) -> Figure:
    """Published accuracy against time, one thread, one image: our networks in the engine and elsewhere, and others."""
    from matplotlib.figure import Figure

    chosen = [row for row in rows if (row["threads"], row["batch"]) == (1, 1)]
    top1 = {row["variants"]: row["top1"] for row in chosen}
    found = times(chosen)
    figure = Figure(figsize=(9.2, 5.4), layout="constrained")
    ax = figure.subplots()
    ours = [name for name, of in found.items() if ("engine", "float32") in of]
    lines = {
        "Mobile-Former, engine, bfloat16": ([found[n].get(("engine", "bfloat16")) for n in ours], "sky", "o", "-"),
        "Mobile-Former, engine, float32": ([found[n]["engine", "float32"] for n in ours], "blue", "o", "-"),
        "Mobile-Former, the faster of ONNX Runtime and OpenVINO": (
            [min(t for (b, d), t in found[n].items() if d == "float32" and b in OTHERS[d]) for n in ours],
            "grey",
            "s",
            "--",
        ),
    }
    for label, (values, color, marker, style) in lines.items():
        points = [(time, top1[name]) for name, time in zip(ours, values, strict=True) if time is not None]
        if points:
            ax.plot(*zip(*points, strict=True), style, marker=marker, color=colors[color], label=label, markersize=6)
    others = {name: min(of.values()) for name, of in found.items() if name not in ours}
    if others:
        ax.plot(others.values(), [top1[name] for name in others], "D", color=colors["red"], markersize=5)
        ax.lines[-1].set_label("others, float32, the faster of ONNX Runtime and OpenVINO")
    ax.set_xscale("log")
    low, high = ax.get_xlim()
    ticks = [tick for tick in (0.3, 0.5, 0.7, 1, 2, 3, 5, 7, 10, 15, 20, 30, 50) if low <= tick <= high]
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    ax.minorticks_off()
    ax.set_xlabel("milliseconds an image, one thread")
    ax.set_ylabel("published ImageNet-1k top-1, %")
    ax.grid(color=colors["grid"], linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(loc="lower right", frameon=False, fontsize=8)
    ax.set_title("What one thread of this processor can have (up and to the left is better)", loc="left", fontsize=10.5)
    return figure


def name_points(figure: Figure, rows: list[Row], ours: str, others: str) -> None:
    """Write the networks' names beside their points, in two colours, when all else is in the figure."""
    import labels

    chosen = [row for row in rows if (row["threads"], row["batch"]) == (1, 1)]
    top1 = {row["variants"]: row["top1"] for row in chosen}
    names = []
    for name, of in times(chosen).items():
        time = of.get(("engine", "float32"))
        names.append((name, (time or min(of.values()), top1[name]), others if time is None else ours))
    labels.place(figure.axes[0], names)
