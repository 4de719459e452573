"""A picture in pixels: tiles are pasted by numpy, text is written by matplotlib, whose fonts come with it.

Several hundred axes would take matplotlib minutes; one axes with one image takes a second.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt

from mobileformer.files import replacing

__all__ = ["Canvas", "new_figure", "save_figure"]

PAPER, INK, FAINT = (255, 255, 255), "#1f2933", "#616e7c"
DPI = 100


class Canvas:
    """width x height white pixels, from the upper left corner."""

    def __init__(self, width: int, height: int) -> None:
        self.pixels = np.full((height, width, 3), PAPER, dtype=np.uint8)
        self._texts: list[tuple[int, int, str, dict[str, Any]]] = []

    def paste(self, x: int, y: int, tile: npt.NDArray[np.uint8]) -> None:
        """A tile (h,w,3) with its upper left corner at (x, y)."""
        height, width = tile.shape[:2]
        self.pixels[y : y + height, x : x + width] = tile

    def write(self, x: float, y: float, text: str, size: float = 15, *, colour: str = INK, **style: Any) -> None:
        """One line, `size` pixels high, its upper left corner at (x, y) unless `ha` and `va` say otherwise."""
        told = {"ha": "left", "va": "top", "color": colour, "fontsize": size * 72 / DPI} | style
        self._texts.append((x, y, text, told))  # type: ignore[arg-type]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a PNG, whole or not at all. Raises ImportError where matplotlib is missing."""
        height, width = self.pixels.shape[:2]
        figure = new_figure(figsize=(width / DPI, height / DPI), dpi=DPI)
        figure.figimage(self.pixels, origin="upper")
        for x, y, text, style in self._texts:
            # parse_math: a class or a file may have two dollar signs in its name.
            figure.text(x / width, 1 - y / height, text, family="DejaVu Sans", parse_math=False, **style)
        save_figure(figure, path)


def new_figure(**arguments: Any) -> Any:
    """A matplotlib figure that no window and no other figure knows of. Raises ImportError that names the extra."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("matplotlib: not installed; pip install 'mobileformer[plot]' brings it") from error
    figure = Figure(**arguments)
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: str | os.PathLike[str]) -> None:
    """As a PNG, whole or not at all. A name in letters that the font lacks is drawn as boxes, without a warning."""
    with replacing(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from", UserWarning)
        figure.savefig(temporary, format="png")
