"""Boxes on a photo: what was found with its name and score, and what is there."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from mobileformer.files.replacing import replacing
from mobileformer.visualize.contact_sheet import write_line
from mobileformer.visualize.fonts import elided, font_for

__all__ = ["SHEET_SIDE", "draw_box_sheet", "draw_boxes"]

_DASH, _GAP = 7, 5  # pixels of a true box's outline
SHEET_SIDE, _SHEET_GAP, _SHEET_HEAD, _LINE, _COLUMNS = 384, 16, 84, 22, 4
_INK, _FAINT = (60, 60, 60), (110, 110, 110)


def draw_boxes(
    image: Image.Image,
    names: Sequence[str],
    found: Mapping[str, Any] | None = None,
    truth: Mapping[str, Any] | None = None,
    *,
    least_side: int = 512,
) -> Image.Image:
    """A copy of the image with boxes on it, "RGB".

    | argument | what |
    |---|---|
    | names | of the classes, by label |
    | found | boxes (n, 4) corners in pixels of the image, labels (n), scores (n): a line in the colour of the class, |
    | | the name and the score in per cent on it; the highest score lies on top |
    | truth | boxes (N, 4), labels (N): a dashed line in white on black; its name where `found` is not given |
    | least_side | an image whose long side has fewer pixels is enlarged, or no name could be read |
    """
    scale = max(1.0, least_side / max(image.size))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    picture = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(picture)
    stretch = (size[0] / image.width, size[1] / image.height) * 2
    weight = max(2, round(max(size) / 320))
    letters = max(12, round(max(size) / 44))
    for box, label in _rows(truth, "boxes", "labels"):
        corners = _placed(box, stretch, size)
        _dashed(pen, corners, weight)
        if found is None:
            _tag(pen, corners, names[int(label)], "", letters, (20, 20, 20), size)
    rows = _rows(found, "boxes", "labels", "scores")
    for box, label, _ in sorted(rows, key=lambda row: float(row[2])):
        pen.rectangle(_placed(box, stretch, size), outline=_colour(int(label)), width=weight)
    for box, label, score in sorted(rows, key=lambda row: float(row[2])):
        corners = _placed(box, stretch, size)
        _tag(pen, corners, names[int(label)], f" {100 * float(score):.0f} %", letters, _colour(int(label)), size)
    return picture


def draw_box_sheet(
    pictures: Sequence[Image.Image],
    captions: Sequence[str],
    title: str,
    target: Path,
    *,
    legend: str = "coloured: found, with the score; dashed: what is there",
) -> None:
    """Four pictures to a row with a line below each, as a PNG that appears whole or not at all."""
    small = [picture.copy() for picture in pictures]
    for picture in small:
        picture.thumbnail((SHEET_SIDE, SHEET_SIDE))
    height = max((picture.height for picture in small), default=0) + _SHEET_GAP + _LINE
    step = SHEET_SIDE + _SHEET_GAP
    rows = -(-len(small) // _COLUMNS)
    sheet = Image.new("RGB", (_SHEET_GAP + _COLUMNS * step, _SHEET_HEAD + rows * height), "white")
    pen = ImageDraw.Draw(sheet)
    write_line(pen, _SHEET_GAP, 16, title, 22, fill=_INK, room=sheet.width - 2 * _SHEET_GAP)
    write_line(pen, _SHEET_GAP, 50, legend, 15, fill=_FAINT, room=sheet.width - 2 * _SHEET_GAP)
    for index, (picture, caption) in enumerate(zip(small, captions, strict=True)):
        x, y = _SHEET_GAP + index % _COLUMNS * step, _SHEET_HEAD + index // _COLUMNS * height
        sheet.paste(picture, (x, y))
        write_line(pen, x, y + picture.height + 4, caption, 15, fill=_INK, room=SHEET_SIDE)
    with replacing(target) as temporary:
        sheet.save(temporary, format="PNG", optimize=True)


def _rows(boxes: Mapping[str, Any] | None, *fields: str) -> list[tuple[Any, ...]]:
    if boxes is None:
        return []
    return list(zip(*(boxes[name].tolist() for name in fields), strict=True))  # tensors and arrays alike


def _placed(box: Sequence[float], stretch: tuple[float, ...], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """In pixels of the picture, inside it, and never turned over: what cannot be seen is drawn at the edge."""
    x1, y1, x2, y2 = (round(value * factor) for value, factor in zip(box, stretch, strict=True))
    x1, y1 = min(max(x1, 0), size[0] - 1), min(max(y1, 0), size[1] - 1)
    return x1, y1, min(max(x2, x1), size[0] - 1), min(max(y2, y1), size[1] - 1)


def _tag(
    pen: ImageDraw.ImageDraw,
    corners: tuple[int, int, int, int],
    name: str,
    after: str,
    letters: int,
    colour: tuple[int, int, int],
    size: tuple[int, int],
) -> None:
    """A name on its own ground at the upper edge of a box, above it where there is room, never outside the picture."""
    name, font = font_for(name, letters)
    text = elided(name, lambda part: pen.textlength(part + after, font=font) <= size[0] // 3) + after
    left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
    width, height = int(right - left) + 6, int(bottom - top) + 6
    x = max(0, min(corners[0], size[0] - width))
    y = corners[1] - height if corners[1] >= height else min(corners[1], max(0, size[1] - height))
    pen.rectangle((x, y, x + width, y + height), fill=colour)
    bright = 299 * colour[0] + 587 * colour[1] + 114 * colour[2] > 140_000  # ITU-R 601
    pen.text((x + 3 - left, y + 3 - top), text, fill=(0, 0, 0) if bright else (255, 255, 255), font=font)


def _dashed(pen: ImageDraw.ImageDraw, corners: tuple[int, int, int, int], weight: int) -> None:
    x1, y1, x2, y2 = corners
    pen.rectangle(corners, outline=(0, 0, 0), width=weight)
    for x in range(x1, x2 + 1, _DASH + _GAP):
        for y in (y1, max(y1, y2 - weight + 1)):
            pen.rectangle((x, y, min(x + _DASH, x2), min(y + weight - 1, y2)), fill=(255, 255, 255))
    for y in range(y1, y2 + 1, _DASH + _GAP):
        for x in (x1, max(x1, x2 - weight + 1)):
            pen.rectangle((x, y, min(x + weight - 1, x2), min(y + _DASH, y2)), fill=(255, 255, 255))


def _colour(label: int) -> tuple[int, int, int]:
    """Hues by the golden ratio, so that neighbours among the classes are far apart."""
    red, green, blue = colorsys.hsv_to_rgb((0.58 + label * 0.618034) % 1, 0.85, (0.95, 0.75)[label % 2])
    return round(255 * red), round(255 * green), round(255 * blue)
