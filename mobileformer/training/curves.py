"""A run's log as one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mobileformer.files import replacing
from mobileformer.training.log import read_log

__all__ = ["draw_curves"]


def draw_curves(log: Path, target: Path) -> None:
    """Loss, top-1, learning rate and speed over the epochs, from log.jsonl to a PNG.

    Raises ImportError where matplotlib is missing.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    events = read_log(log)
    training = [event for event in events if event["kind"] == "train"]
    validation = [event for event in events if event["kind"] == "validation"]
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2, sharex=True)

    def plot(axis: Any, rows: list[dict[str, Any]], key: str, label: str, **style: Any) -> None:
        found = [(row["epochs"], row[key]) for row in rows if key in row]
        if found:
            axis.plot(*zip(*found, strict=True), label=label, **style)

    plot(axes[0, 0], training, "loss", "training, augmented", linewidth=1, color="#1f77b4")
    plot(axes[0, 0], validation, "loss", "validation", marker="o", markersize=3, color="#d62728")
    axes[0, 0].set(title="Loss (cross-entropy, nats)", ylabel="loss")
    plot(axes[0, 1], validation, "top1", "validation", marker="o", markersize=3, color="#d62728")
    axes[0, 1].set(title="Top-1 accuracy", ylabel="per cent")
    plot(axes[1, 0], training, "learning_rate", "learning rate", color="#2ca02c")
    axes[1, 0].set(title="Learning rate", ylabel="rate", xlabel="epoch", yscale="log")
    plot(axes[1, 1], training, "images_per_second", "training", color="#9467bd", linewidth=1)
    axes[1, 1].set(title="Speed", ylabel="images / s", xlabel="epoch", ylim=(0, None))
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[0]:
        if axis.lines:
            axis.legend(frameon=False)
    if validation:
        last = validation[-1]
        axes[0, 1].annotate(
            f"{last['top1']:.2f} %",
            (last["epochs"], last["top1"]),
            xytext=(-6, -14),
            textcoords="offset points",
            ha="right",
        )
    with replacing(target) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
