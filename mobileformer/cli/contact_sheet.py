"""Images with what a network makes of them, on one PNG."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mobileformer.files import replacing

__all__ = ["Entry", "draw_contact_sheet"]

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
    large, small = ImageFont.load_default(20), ImageFont.load_default(15)
    pen.text((_GAP, 18), title, fill=_INK, font=large)
    for index, entry in enumerate(entries):
        x = _GAP + (index % _COLUMNS) * (_PICTURE + _GAP)
        y = head + (index // _COLUMNS) * (_PICTURE + _TEXT + _GAP)
        sheet.paste(entry.image.convert("RGB").resize((_PICTURE, _PICTURE), Image.Resampling.NEAREST), (x, y))
        right = entry.guess == entry.truth
        guess = f"{entry.guess} {100 * entry.probability:.1f} %"
        pen.text((x, y + _PICTURE + 6), guess, fill=_RIGHT if right else _WRONG, font=small)
        pen.text((x, y + _PICTURE + 27), f"is: {entry.truth}", fill=_INK, font=small)
    with replacing(target) as temporary:
        sheet.save(temporary, format="PNG", optimize=True)
