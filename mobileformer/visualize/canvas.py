"""A picture in pixels: tiles are pasted by numpy, text is written by matplotlib, whose fonts come with it.

Several hundred axes would take matplotlib minutes; one axes with one image takes a second.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt

from mobileformer.files.replacing import replacing
from mobileformer.visualize.fonts import elided, font_paths, shown

__all__ = ["Canvas", "new_figure", "save_figure", "use_fonts"]

PAPER, INK, FAINT = (255, 255, 255), "#1f2933", "#616e7c"
DPI = 100


class Canvas:
    """width x height white pixels, from the upper left corner."""

    def __init__(self, width: int, height: int) -> None:
        self.pixels = np.full((height, width, 3), PAPER, dtype=np.uint8)
        self._texts: list[tuple[float, float, str, float | None, dict[str, Any]]] = []

    def paste(self, x: int, y: int, tile: npt.NDArray[np.uint8]) -> None:
        """A tile (h,w,3) with its upper left corner at (x, y)."""
        height, width = tile.shape[:2]
        self.pixels[y : y + height, x : x + width] = tile

    def write(
        self,
        x: float,
        y: float,
        text: str,
        size: float = 15,
        *,
        colour: str = INK,
        room: float | None = None,
        **style: Any,
    ) -> None:
        """One line, `size` pixels high, its upper left corner at (x, y) unless `ha` and `va` say otherwise.

        Of a text wider than `room` pixels the middle is left out.
        """
        told = {"ha": "left", "va": "top", "color": colour, "fontsize": size * 72 / DPI} | style
        self._texts.append((x, y, shown(text), room, told))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a PNG, whole or not at all. Raises ImportError where matplotlib is missing."""
        height, width = self.pixels.shape[:2]
        figure = new_figure(figsize=(width / DPI, height / DPI), dpi=DPI)
        figure.figimage(self.pixels, origin="upper")
        for x, y, text, room, style in self._texts:
            # parse_math: a class or a file may have two dollar signs in its name.
            artist = figure.text(x / width, 1 - y / height, text, parse_math=False, **style)
            if room is not None:
                use_fonts(figure, text, [artist])
                artist.set_text(elided(text, lambda part, artist=artist, room=room: _width(artist, part) <= room))
        save_figure(figure, path)


def _width(artist: Any, text: str) -> float:
    artist.set_text(text)
    return artist.get_window_extent().width


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


def use_fonts(figure: Any, text: str, artists: Any = None) -> None:
    """Have a figure's texts, or some of them, drawn in DejaVu Sans and fonts with the other letters of a text."""
    from matplotlib import font_manager
    from matplotlib.text import Text

    families = ["DejaVu Sans"]
    known = {entry.fname for entry in font_manager.fontManager.ttflist}
    for path in font_paths(text):
        if path not in known:
            font_manager.fontManager.addfont(path)
        families.append(font_manager.FontProperties(fname=path).get_name())
    for artist in figure.findobj(Text) if artists is None else artists:
        artist.set_fontfamily(families)


def save_figure(figure: Any, path: str | os.PathLike[str]) -> None:
    """As a PNG, whole or not at all. Texts have gone through `fonts.shown`, which leaves nothing that no font has."""
    from matplotlib.text import Text

    use_fonts(figure, "".join(text.get_text() for text in figure.findobj(Text)))
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
