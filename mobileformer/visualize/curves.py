"""A training run as one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mobileformer.files.replacing import replacing

__all__ = ["draw_curves"]


def draw_curves(
    rows: Sequence[Mapping[str, Any]], target: Path, *, loss_unit: str, score: str, score_title: str, score_unit: str
) -> None:
    """Loss, score, learning rate and speed over the epochs, to a PNG that appears whole or not at all.

    ==================  ===================================================================================
    argument            meaning
    ==================  ===================================================================================
    rows                events of a run; those of kind "train" and "validation" have "epochs", which is
                        where they are drawn, and any of "loss", "learning_rate", "images_per_second" and `score`
    loss_unit           what the loss is, in words
    score               key of the figure that validations are judged by
    score_title, _unit  its name and unit
    ==================  ===================================================================================

    Raises ImportError where matplotlib is missing.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    training = [row for row in rows if row["kind"] == "train"]
    validation = [row for row in rows if row["kind"] == "validation"]
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2, sharex=True)

    def plot(axis: Any, rows: Sequence[Mapping[str, Any]], key: str, label: str, **style: Any) -> None:
        found = [(row["epochs"], row[key]) for row in rows if key in row]
        if found:
            axis.plot(*zip(*found, strict=True), label=label, **style)

    plot(axes[0, 0], training, "loss", "training, augmented", linewidth=1, color="#1f77b4")
    plot(axes[0, 0], validation, "loss", "validation", marker="o", markersize=3, color="#d62728")
    axes[0, 0].set(title=f"Loss ({loss_unit})", ylabel="loss")
    told = f", {validation[-1][score]:.2f} {score_unit} in the end" if validation else ""
    plot(axes[0, 1], validation, score, "validation", marker="o", markersize=3, color="#d62728")
    axes[0, 1].set(title=f"{score_title}{told}", ylabel=score_unit)
    plot(axes[1, 0], training, "learning_rate", "learning rate", color="#2ca02c")
    axes[1, 0].set(title="Learning rate", ylabel="rate", xlabel="epoch")
    if any(row.get("learning_rate", 0) > 0 for row in training):
        axes[1, 0].set_yscale("log")
    plot(axes[1, 1], training, "images_per_second", "training", color="#9467bd", linewidth=1)
    axes[1, 1].set(title="Speed", ylabel="images / s", xlabel="epoch", ylim=(0, None))
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[0]:
        if axis.lines:
            axis.legend(frameon=False)
    with replacing(target) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
