"""Curves of precision over recall as one picture."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mobileformer.visualize.canvas import new_figure, save_figure
from mobileformer.visualize.fonts import elided, shown

__all__ = ["draw_precision_recall"]

NAMED = 12  # classes with a colour and a line in the legend; of more, those with the lowest AP
LONGEST = 24  # letters of a name that are shown
FAINT = "#c4ccd4"


def draw_precision_recall(
    recalls: npt.NDArray[np.float64],
    curves: npt.NDArray[np.float64],
    thresholds: Sequence[float],
    names: Sequence[str],
    path: str | os.PathLike[str],
    *,
    title: str,
) -> None:
    """Write a PNG: on the left the mean of the classes at each threshold of IoU, on the right each class at the first.

    =========  =========  ======================================================================
    argument   shape      meaning
    =========  =========  ======================================================================
    recalls    (R)        where precision is read, rising from 0 to 1
    curves     (T, R, K)  precision at each threshold, recall and class; NaN for a class that there is no object of
    =========  =========  ======================================================================

    The area under a curve is the AP beside its name. Raises ImportError where matplotlib is missing.
    """
    there = np.flatnonzero(~np.isnan(curves).any((0, 1)))
    figure = new_figure(figsize=(12, 5.5), layout="constrained", dpi=110)
    whole, by_class = figure.subplots(1, 2, sharey=True)
    figure.suptitle(shown(title), parse_math=False)
    for place, threshold in enumerate(thresholds if len(there) else ()):
        mean = curves[place][:, there].mean(1)
        label = f"IoU {threshold:.2f}: AP {mean.mean():.3f}"
        colour = 0.1 + 0.8 * place / max(1, len(thresholds) - 1)
        whole.plot(recalls, mean, linewidth=1.6, color=_shade(colour), label=label)
    first = curves[0]
    areas = first.mean(0)
    lowest_last = sorted(there.tolist(), key=lambda label: -areas[label])
    named = set(lowest_last[-NAMED:])
    for rank, label in enumerate(lowest_last):
        if label in named:
            name = elided(shown(names[label]), lambda part: len(part) <= LONGEST)
            place = rank - (len(lowest_last) - len(named))
            by_class.plot(
                recalls, first[:, label], linewidth=1.4, color=_colour(place), label=f"{name}: {areas[label]:.3f}"
            )
        else:
            by_class.plot(recalls, first[:, label], linewidth=0.7, color=FAINT, zorder=1)
    whole.set(title="Mean over the classes", xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    few = f"; {NAMED} lowest of {len(there)} named" if len(there) > NAMED else ""
    by_class.set(title=f"Classes, IoU {thresholds[0]:.2f}{few}", xlabel="recall", xlim=(0, 1))
    for axis in (whole, by_class):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[1]:
            legend = axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
            for text in legend.get_texts():
                text.set_parse_math(False)  # a class may have two dollar signs in its name
    if not len(there):
        whole.text(0.5, 0.5, "no object to find", ha="center", va="center", transform=whole.transAxes)
    save_figure(figure, path)


def _shade(share: float) -> tuple[float, ...]:
    from matplotlib import colormaps

    return tuple(colormaps["viridis"](share))


def _colour(place: int) -> tuple[float, ...]:
    from matplotlib import colormaps

    return tuple(colormaps["tab20"](place % 20))
