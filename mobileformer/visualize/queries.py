"""Where each query of an end-to-end detector looks: a sheet with one picture for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from mobileformer.visualize import shades
from mobileformer.visualize.boxes import SHEET_SIDE, draw_box_sheet, draw_boxes

__all__ = ["Query", "draw_queries"]

_LEGEND = (
    "Bright: up to 16 times as much as an even look would give, dark: a quarter of it or less; a cross: the point from "
    "which the query tells its box"
)
_DARKEST = -2  # log2 of a weight over the even one
_ARM = 8  # pixels of a cross


@dataclass(frozen=True, eq=False)
class Query:
    """One query. Pixels are those of the photo.

    =========  =====  ==========================================================================
    field      shape  meaning
    =========  =====  ==========================================================================
    index             its number
    label             the likeliest class
    score             how sure of it, 0 to 1
    box        (4)    corners
    point      (2)    (x, y) from which the box is told
    attention  (h,w)  shares of sum 1 of its look over the map
    cells      (2)    columns and rows of the map that the photo covers; the last may reach over
    =========  =====  ==========================================================================
    """

    index: int
    label: int
    score: float
    box: npt.NDArray[np.floating]
    point: npt.NDArray[np.floating]
    attention: npt.NDArray[np.floating]
    cells: tuple[float, float]

    @property
    def spread(self) -> float:
        """e to the entropy of the attention over the number of positions: 1 is an even look at everything."""
        shares = self.attention[self.attention > 0].astype(np.float64)
        return float(np.exp(-(shares * np.log(shares)).sum()) / self.attention.size)


def draw_queries(photo: Image.Image, queries: Sequence[Query], names: Sequence[str], path: Path, *, title: str) -> None:
    """Write a PNG: the photo with all their boxes, then each query's attention over it, its point and its box.

    The file appears whole or not at all.
    """
    scale = SHEET_SIDE / max(photo.size)
    size = (max(1, round(photo.width * scale)), max(1, round(photo.height * scale)))
    small = photo.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    base = shades.underlay(np.asarray(small))
    pictures, captions = [_boxed(small, queries, names, scale)], [f"the {len(queries)} surest queries"]
    for query in queries:
        # No darker than that: queries look at little, and the photo is to be seen
        logs = np.maximum(shades.relative(query.attention, 1 / query.attention.size), _DARKEST)
        picture = Image.fromarray(shades.laid(base, logs, cells=query.cells))
        picture = _boxed(picture, [query], names, scale)
        _cross(picture, (query.point * scale).tolist())
        pictures.append(picture)
        captions.append(f"query {query.index}: looks at {100 * query.spread:.0f} % of the map")
    draw_box_sheet(pictures, captions, title, path, legend=_LEGEND)


def _boxed(picture: Image.Image, queries: Sequence[Query], names: Sequence[str], scale: float) -> Image.Image:
    found = {
        "boxes": np.array([query.box * scale for query in queries]).reshape(-1, 4),
        "labels": np.array([query.label for query in queries]),
        "scores": np.array([query.score for query in queries]),
    }
    return draw_boxes(picture, names, found, least_side=1)


def _cross(picture: Image.Image, point: Sequence[float]) -> None:
    """White on black, so that it is seen on any ground."""
    pen = ImageDraw.Draw(picture)
    x, y = (round(value) for value in point)
    for colour, width in (((0, 0, 0), 5), ((255, 255, 255), 2)):
        for ends in ((x - _ARM, y, x + _ARM, y), (x, y - _ARM, x, y + _ARM)):
            pen.line(ends, fill=colour, width=width)
