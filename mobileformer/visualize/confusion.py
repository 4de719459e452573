"""The confusion matrix as one picture."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mobileformer.visualize.canvas import new_figure, save_figure, use_fonts
from mobileformer.visualize.fonts import elided, shown

__all__ = ["draw_confusion"]

LONGEST = 28  # letters of a name that are shown
NAMED = 40  # classes up to which rows have names and cells have numbers
INK, FAINT = "#1f2933", "#616e7c"


def draw_confusion(
    confusion: npt.NDArray[np.int64], names: Sequence[str], path: str | os.PathLike[str], *, title: str
) -> None:
    """Write a PNG: a row for each class, a column for each that its images were taken for.

    =========  ======  =====================================================================================
    argument   shape   meaning
    =========  ======  =====================================================================================
    confusion  (K,K)   images of the class of the row that were taken for the class of the column
    names      (K)     of the classes
    title              above the picture
    =========  ======  =====================================================================================

    Right ones are blue by their share of the row. Mistakes are orange by theirs, on a scale that ends at the largest of
    them, so that rare ones show too. Up to 40 classes the counts are in the cells, recall and precision at the edges.

    Raises ImportError where matplotlib is missing, with the extra that brings it.
    """
    classes = len(names)
    names = [elided(shown(name), lambda part: len(part) <= LONGEST) for name in names]
    side = min(12.0, 4.5 + 0.45 * classes)
    figure = new_figure(figsize=(side + 0.8, side), dpi=120, layout="constrained")
    axes = figure.subplots()
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    diagonal = np.eye(classes, dtype=bool)
    worst = float(shares[~diagonal].max(initial=0)) or 1.0
    axes.imshow(np.where(diagonal, shares, np.nan), cmap="Blues", vmin=0, vmax=1.25)
    mistakes = axes.imshow(np.where(diagonal, np.nan, shares), cmap="Oranges", vmin=0, vmax=worst)
    bar = figure.colorbar(mistakes, ax=axes, shrink=0.6, pad=0.02)
    bar.set_label("mistakes, share of the row", color=FAINT)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    letters = int(6.2 * (side + 0.8))  # of a line
    told = textwrap.fill(elided(shown(title), lambda part: len(part) <= 3 * letters), letters)
    figure.suptitle(told, x=0.01, ha="left", color=INK, fontweight="bold", parse_math=False)
    axes.set_xlabel("taken for", color=FAINT)
    axes.set_ylabel("is", color=FAINT)
    if classes <= NAMED:
        _name(axes, confusion, names)
    for edge in axes.spines.values():
        edge.set_visible(False)
    axes.tick_params(length=0, labelcolor=INK)
    if classes <= NAMED:
        use_fonts(figure, "".join(names) + shown(title))
        figure.draw_without_rendering()  # the layout: how large a cell is
        _number(axes, confusion, shares, worst, cell=axes.get_window_extent().width / figure.dpi * 72 / classes)
    save_figure(figure, path)


def _name(axes: Any, confusion: npt.NDArray[np.int64], names: Sequence[str]) -> None:
    """Names at the left and below, recall and precision beside them."""
    right, rows, columns = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    beside = [f"{name}  {_percent(a, b)}" for name, a, b in zip(names, right, rows, strict=True)]
    below = [f"{name}  {_percent(a, b)}" for name, a, b in zip(names, right, columns, strict=True)]
    axes.set_yticks(range(len(names)), beside, parse_math=False)
    axes.set_xticks(range(len(names)), below, rotation=45, ha="right", rotation_mode="anchor", parse_math=False)
    axes.set_ylabel("is, with recall", color=FAINT)
    axes.set_xlabel("taken for, with precision", color=FAINT)


def _number(
    axes: Any, confusion: npt.NDArray[np.int64], shares: npt.NDArray[np.float64], worst: float, *, cell: float
) -> None:
    """Counts in the cells, of one size, at which the longest is no wider than `cell` points."""
    size = min(8.0, cell * 0.7, 0.9 * cell / (0.64 * len(str(confusion.max(initial=0)))))
    for row, column in zip(*np.nonzero(confusion), strict=True):
        dark = shares[row, column] / (1.25 if row == column else worst) > 0.6
        style = {"color": "white" if dark else INK, "fontsize": size}
        axes.text(column, row, str(confusion[row, column]), ha="center", va="center", **style)


def _percent(part: int, of: int) -> str:
    return f"{100 * part / of:.1f} %" if of else "–"
