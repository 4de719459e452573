"""Names beside the points of a chart, each where it covers no line, no marker and no other name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

SIZE, GAP = 8, 2  # of the letters, in points; between a name and what is around it, in pixels
LEADER = 24  # pixels from which on a line leads from a point to its name
DIRECTIONS = (
    135,
    0,
    180,
    90,
    270,
    315,
    45,
    225,
    160,
    20,
    110,
    70,
    250,
    290,
    200,
    340,
    150,
    30,
    120,
    60,
    240,
    300,
    210,
    330,
)


def place(ax: Axes, names: list[tuple[str, tuple[float, float], str]]) -> None:
    """Write (text, point in data, colour) near the points; from where that is not close, a thin line leads there.

    Everything else has to be in the figure: it is laid out here and its layout kept, since places are in pixels.
    """
    figure: Any = ax.figure
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    inside = ax.get_window_extent().padded(-GAP)
    inside = Bbox.from_extents(inside.x0, inside.y0, figure.bbox.x1 - 2 * GAP, inside.y1)
    lines = np.concatenate([_along(ax, line) for line in ax.lines] or [np.empty((0, 2))])
    taken = [legend.get_window_extent() for legend in [ax.get_legend()] if legend]
    points = ax.transData.transform([point for _, point, _ in names]) if names else np.empty((0, 2))
    for text, point, color in sorted(names, key=lambda name: (-name[1][1], name[1][0])):
        written = ax.annotate(
            text, point, (0, 0), textcoords="offset points", ha="center", va="center", fontsize=SIZE, color=color
        )
        written.set_path_effects([withStroke(linewidth=2, foreground="white")])  # over the grid
        box, centre = written.get_window_extent(), ax.transData.transform(point)
        others = points[np.hypot(*(points - centre).T) > 14]  # closer ones cannot be told apart
        cost = _Cost(inside, lines, taken, others, centre, box.width, box.height)
        at = _cheapest(cost, _offsets(box))
        written.set_position((at[0] * 72 / figure.dpi, at[1] * 72 / figure.dpi))
        there = cost.box(at)
        taken.append(there)
        if _distances(there, centre[None])[0] > LEADER:
            ends = cost.leader(there)
            ax.plot(*ax.transData.inverted().transform(ends).T, color=color, linewidth=0.6, scalex=False, scaley=False)
            lines = np.concatenate([lines, np.linspace(*ends, 60)])


@dataclass(frozen=True)
class _Cost:
    """What it costs to write a name at an offset from its point, in pixels."""

    inside: Bbox
    lines: npt.NDArray[np.float64]  # (n,2) places that lines and markers take
    taken: list[Bbox]
    others: npt.NDArray[np.float64]  # (n,2) points of other names
    point: npt.NDArray[np.float64]
    width: float
    height: float

    def __call__(self, at: tuple[float, float]) -> float:
        box = self.box(at)
        around = box.padded(GAP)
        outside = (
            box.x0 < self.inside.x0 or box.x1 > self.inside.x1 or box.y0 < self.inside.y0 or box.y1 > self.inside.y1
        )
        covered = np.count_nonzero(((self.lines > around.min) & (self.lines < around.max)).all(axis=1))
        met = sum(around.overlaps(other) for other in self.taken)
        own = _distances(box, self.point[None])[0]
        mistaken = np.count_nonzero(_distances(box, self.others) < min(own, LEADER) + 6)
        crossed = 0
        if own > LEADER:
            way = np.linspace(*self.leader(box), 60)
            crossed = sum(((way > other.min) & (way < other.max)).all(axis=1).any() for other in self.taken)
            met += crossed
            crossed += np.count_nonzero((np.hypot(*(way[:, None] - self.others).transpose(2, 0, 1)) < 10).any(axis=0))
        return 1e6 * outside + 1e4 * met + 500 * covered + 50 * crossed + 35 * mistaken + 0.4 * own

    def box(self, at: tuple[float, float]) -> Bbox:
        return Bbox.from_bounds(*(self.point + at - (self.width / 2, self.height / 2)), self.width, self.height)

    def leader(self, box: Bbox) -> npt.NDArray[np.float64]:
        """(2,2) from the point to the nearest place of a name's edge."""
        return np.stack([self.point, np.clip(self.point, box.min, box.max)])


def _distances(box: Bbox, points: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """From a box to each of the points (n,2)."""
    return np.hypot(*(points - np.clip(points, box.min, box.max)).T)


def _cheapest(cost: _Cost, offsets: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """The cheapest offset; those far away are not tried when a near one is cheap."""
    best, chosen = float("inf"), (0.0, 0.0)
    for at in offsets:
        found = cost(at)
        if found < best:
            best, chosen = found, at
        if best < 0.1 * (np.hypot(*at) - cost.width / 2):
            break
    return chosen


def _along(ax: Axes, line: Any) -> npt.NDArray[np.float64]:
    """Pixels of a line and its markers, close enough together that no name fits between two of them."""
    points = ax.transData.transform(np.column_stack(line.get_data()))
    radius = line.get_markersize() * ax.figure.dpi / 72 / 2 if line.get_marker() not in (None, "None", "") else 0
    turns = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    around = (points[:, None] + radius * np.stack([np.cos(turns), np.sin(turns)], axis=1)).reshape(-1, 2)
    if line.get_linestyle() in ("None", ""):
        return around
    between = [np.linspace(a, b, max(2, int(np.hypot(*(b - a)) / 2))) for a, b in pairwise(points)]
    return np.concatenate([around, *between])


def _offsets(box: Bbox) -> Iterator[tuple[float, float]]:
    """Where a name's centre may be, from its point, in pixels: nearest first, all around."""
    for distance in (9, 12, 16, 22, 30, 40, 54, 70, 90, 115, 145, 180, 220, 270, 330, 400, 480):
        for angle in np.deg2rad(DIRECTIONS):
            x, y = np.cos(angle), np.sin(angle)
            yield x * (distance + box.width / 2), y * (distance + box.height / 2)
