"""Images with what a network makes of them, on one PNG."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from mobileformer.files.replacing import replacing
from mobileformer.visualize.fonts import elided, font_for

__all__ = ["Entry", "draw_contact_sheet", "write_line"]

_PICTURE, _GAP, _TEXT, _COLUMNS = 168, 16, 52, 6
_RIGHT, _WRONG, _INK = (22, 122, 54), (190, 32, 32), (60, 60, 60)


@dataclass(frozen=True, slots=True)
class Entry:
    """An image, what it shows, and the network's best guess with its probability."""

    image: Image.Image
    truth: str
    guess: str
    probability: float


def draw_contact_sheet(entries: list[Entry], title: str, target: Path) -> None:
    """Six pictures to a row, the guess below in green where it is right; whole or not at all."""
    rows = -(-len(entries) // _COLUMNS)
    width = _GAP + _COLUMNS * (_PICTURE + _GAP)
    head = 56
    sheet = Image.new("RGB", (width, head + rows * (_PICTURE + _TEXT + _GAP)), "white")
    pen = ImageDraw.Draw(sheet)
    write_line(pen, _GAP, 18, title, 20, fill=_INK, room=width - 2 * _GAP)
    for index, entry in enumerate(entries):
        x = _GAP + (index % _COLUMNS) * (_PICTURE + _GAP)
        y = head + (index // _COLUMNS) * (_PICTURE + _TEXT + _GAP)
        sheet.paste(entry.image.convert("RGB").resize((_PICTURE, _PICTURE), Image.Resampling.NEAREST), (x, y))
        right = entry.guess == entry.truth
        colour, share = _RIGHT if right else _WRONG, f" {100 * entry.probability:.1f} %"
        write_line(pen, x, y + _PICTURE + 6, entry.guess, 15, fill=colour, room=_PICTURE, after=share)
        write_line(pen, x, y + _PICTURE + 27, entry.truth, 15, fill=_INK, room=_PICTURE, before="is: ")
    with replacing(target) as temporary:
        sheet.save(temporary, format="PNG", optimize=True)


def write_line(
    pen: ImageDraw.ImageDraw,
    x: int,
    y: int,
    name: str,
    size: int,
    *,
    fill: tuple[int, int, int],
    room: int,
    before: str = "",
    after: str = "",
) -> None:
    """A line no wider than `room` pixels: of a longer name the middle is left out."""
    name, font = font_for(name, size)
    part = elided(name, lambda part: pen.textlength(before + part + after, font=font) <= room)
    pen.text((x, y), before + part + after, fill=fill, font=font)
