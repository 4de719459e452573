"""Colours of the attention pictures.

A weight is shown as a multiple of the uniform one, on a logarithmic scale that all maps share: at 1 the photo shows as
it is, below it darkens, above it glows. So a map of noise looks like the photo, and maps can be compared.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

__all__ = [
    "OCTAVES",
    "SIMILARITY",
    "TOKEN_COLOURS",
    "laid",
    "over",
    "relative",
    "shade_table",
    "shades",
    "similarity_colours",
    "underlay",
]

OCTAVES = 4  # the scale ends at 2^-4 and 2^4 times the uniform weight

# Okabe and Ito's colours, told apart with any colour vision.
TOKEN_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#f0e442", "#f5f5f5")

# (place on the scale, red, green, blue, opacity)
_STOPS = (
    (-1.0, 6, 8, 28, 0.94),
    (-0.5, 8, 12, 44, 0.70),
    (-0.004, 8, 12, 44, 0.0),
    (0.004, 232, 96, 44, 0.0),
    (0.25, 232, 88, 40, 0.55),
    (0.55, 250, 140, 30, 0.82),
    (0.8, 255, 214, 70, 0.92),
    (1.0, 255, 252, 215, 0.97),
)
# Cosine -1, 0, 1: blue, white, red.
SIMILARITY = (
    (-1.0, 33, 102, 172),
    (-0.4, 146, 197, 222),
    (0.0, 247, 247, 247),
    (0.4, 244, 165, 130),
    (1.0, 178, 24, 43),
)


def relative(attention: npt.NDArray[np.floating], uniform: float) -> npt.NDArray[np.float32]:
    """log2(attention / uniform); a weight that has underflowed to 0 is far below the scale, not -infinity."""
    smallest = np.finfo(np.float32).tiny
    return np.log2(np.maximum(attention, smallest) / uniform).astype(np.float32)


def shade_table() -> npt.NDArray[np.uint8]:
    """(256, 4) uint8: red, green, blue and opacity, from 2^-OCTAVES to 2^OCTAVES times uniform."""
    places, *channels = np.array(_STOPS).T
    at = np.linspace(-1, 1, 256)
    table = np.stack([np.interp(at, places, channel) for channel in channels], axis=1)
    table[:, 3] *= 255
    return np.rint(table).astype(np.uint8)


def shades(logs: npt.NDArray[np.floating]) -> npt.NDArray[np.uint8]:
    """What `relative` gave -> the same shape with 4 more numbers, red, green, blue and opacity."""
    index = np.rint((np.clip(logs / OCTAVES, -1, 1) + 1) * 127.5).astype(np.intp)
    return shade_table()[index]


def similarity_colours(cosine: npt.NDArray[np.floating]) -> npt.NDArray[np.uint8]:
    """Cosines -> the same shape with red, green and blue."""
    places, *channels = np.array(SIMILARITY).T
    return np.stack([np.rint(np.interp(cosine, places, c)) for c in channels], axis=-1).astype(np.uint8)


def over(
    photo: npt.NDArray[np.uint8], colours: npt.NDArray[np.uint8], opacity: npt.NDArray[np.floating]
) -> npt.NDArray[np.uint8]:
    """Colours (H,W,3) laid over a photo (H,W,3), opacity (H,W) in [0, 1]."""
    share = opacity[..., None]
    return np.rint(photo * (1 - share) + colours * share).astype(np.uint8)


def laid(
    base: npt.NDArray[np.uint8], logs: npt.NDArray[np.floating], *, cells: tuple[float, float] | None = None
) -> npt.NDArray[np.uint8]:
    """What `relative` gave of a map (h,w), smooth, in its colours over a picture (H,W,3).

    cells: how many columns and rows of the map, from the upper left, the picture covers; None is all.
    """
    height, width = base.shape[:2]
    if logs.shape != base.shape[:2]:
        clipped = Image.fromarray(np.clip(logs, -OCTAVES, OCTAVES).astype(np.float32))
        columns, rows = cells or clipped.size
        logs = np.asarray(clipped.resize((width, height), Image.Resampling.BILINEAR, box=(0, 0, columns, rows)))
    colours = shades(logs)
    return over(base, colours[..., :3], colours[..., 3] / 255)


def underlay(photo: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The photo in grey and a little darker, so that colour means attention: (H,W,3) -> (H,W,3)."""
    grey = photo @ np.array([0.299, 0.587, 0.114])
    return np.repeat(np.rint(22 + 0.70 * grey).astype(np.uint8)[..., None], 3, axis=2)
