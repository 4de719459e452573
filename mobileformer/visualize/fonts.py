"""Names in any script: in a font of this machine that has the letters, else as \\uXXXX, and a warning says so.

Class names and file names come from whoever made the data. A letter that no font has would be drawn as an empty box.
"""

from __future__ import annotations

import os
import sys
import unicodedata
import warnings
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import ImageFont, features

__all__ = ["elided", "font_for", "font_paths", "shown"]

_MISSING = "\U0010fffe"  # no font has it: what a font draws for it is its empty box
_LAST_RESORT = ("LastResort", "Apple Color Emoji", "NotoColorEmoji")  # boxes for every letter; pictures of one size
_PACKAGES = {
    "CJK": "Noto Sans CJK",
    "HIRAGANA": "Noto Sans CJK",
    "KATAKANA": "Noto Sans CJK",
    "HANGUL": "Noto Sans CJK",
}
_told: set[str] = set()


def shown(text: str) -> str:
    """The text with each letter that no font here has, and each control character, as \\uXXXX.

    Warns once in a process for each script that is missing, naming a font that has it.
    """
    if text.isascii() and text.isprintable():
        return text
    lacking = {letter for letter in text if not _drawable(letter)}
    _tell(letter for letter in lacking if letter.isprintable())
    return "".join(_escaped(letter) if letter in lacking else letter for letter in text)


def font_paths(text: str) -> list[str]:
    """Files of fonts that together have every letter of `shown(text)` beyond those of DejaVu Sans."""
    paths: list[str] = []
    for letter in sorted(set(text)):
        if not letter.isspace() and not _plain(letter) and not any(_has(path, letter) for path in paths):
            paths += [path for path in (_font_with(letter),) if path]
    return paths


def font_for(text: str, size: int) -> tuple[str, ImageFont.FreeTypeFont | ImageFont.ImageFont]:
    """What Pillow can write of a text, and the one font to write it in: Pillow's own where that has every letter."""
    own = ImageFont.load_default(size)
    if all(_glyph(own, letter) or letter.isspace() for letter in set(text)) and text.isprintable():
        return text, own
    text = shown(text)
    wanted = [letter for letter in sorted(set(text)) if not letter.isspace()]
    # Letters that join or run from right to left are set by raqm; without it they would stand in the wrong order.
    if features.check("raqm") or not any(unicodedata.bidirectional(letter) in ("R", "AL") for letter in wanted):
        for path in _installed():
            if all(_has(path, letter) for letter in wanted):
                return text, ImageFont.truetype(path, size)
    _tell(letter for letter in wanted if not _glyph(own, letter))
    return "".join(letter if _glyph(own, letter) or letter == " " else _escaped(letter) for letter in text), own


def elided(text: str, fits: Callable[[str], bool]) -> str:
    """The text, or as much of its beginning and end as fits, around an ellipsis."""
    if fits(text):
        return text
    low, high = 0, max(0, len(text) - 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(_shortened(text, middle)) else (low, middle - 1)
    return _shortened(text, low)


def _shortened(text: str, letters: int) -> str:
    end = letters // 3
    return text[: letters - end] + "…" + (text[-end:] if end else "")


def _escaped(letter: str) -> str:
    return f"\\u{ord(letter):04x}" if ord(letter) < 0x10000 else f"\\U{ord(letter):08x}"


def _tell(letters: Iterable[str]) -> None:
    by_script: dict[str, str] = {}
    for letter in sorted(letters):
        by_script.setdefault(unicodedata.name(letter, "UNNAMED").split()[0].split("-")[0], letter)
    for script, letter in by_script.items():
        if script not in _told:
            _told.add(script)
            symbol = unicodedata.category(letter).startswith("S")
            font = _PACKAGES.get(script, "Noto Emoji" if symbol else f"Noto Sans {script.capitalize()}")
            message = f"no font on this machine has {letter!r}: drawn as {_escaped(letter)}; {font} would have it"
            warnings.warn(message, UserWarning, stacklevel=4)


def _drawable(letter: str) -> bool:
    return letter == " " or (letter.isprintable() and (_plain(letter) or _font_with(letter) is not None))


@lru_cache(maxsize=4096)
def _plain(letter: str) -> bool:
    """Whether DejaVu Sans, matplotlib's own, has it."""
    own = _own()
    return own is not None and _has(own, letter)


@lru_cache(maxsize=4096)
def _font_with(letter: str) -> str | None:
    return next((path for path in _installed() if _has(path, letter)), None)


@lru_cache(maxsize=16384)
def _has(path: str, letter: str) -> bool:
    font = _open(path)
    return font is not None and (letter.isspace() or _glyph(font, letter))


@lru_cache(maxsize=256)
def _open(path: str) -> ImageFont.FreeTypeFont | None:
    try:
        return ImageFont.truetype(path, 16, layout_engine=ImageFont.Layout.BASIC)
    except OSError:  # not a font that FreeType reads, or pictures of a fixed size
        return None


def _glyph(font: ImageFont.FreeTypeFont | ImageFont.ImageFont, letter: str) -> bool:
    """Whether a font draws this letter as something else than its box, and as something at all."""
    try:
        mask: Any = font.getmask(letter)
        box: Any = font.getmask(_MISSING)
    except (OSError, UnicodeError):  # a bitmap font knows Latin-1 alone
        return False
    return mask.getbbox() is not None and (mask.size, bytes(mask)) != (box.size, bytes(box))


@lru_cache(maxsize=1)
def _own() -> str | None:
    try:
        import matplotlib
    except ImportError:
        return None
    return str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))


@lru_cache(maxsize=1)
def _installed() -> tuple[str, ...]:
    """Font files of matplotlib and of the system, upright and of middling weight first."""
    home = Path.home() if "HOME" in os.environ or sys.platform == "win32" else Path("/nonexistent")
    folders = ["/usr/share/fonts", "/usr/local/share/fonts", home / ".fonts", home / ".local/share/fonts"]
    folders += ["/System/Library/Fonts", "/Library/Fonts", Path(os.environ.get("WINDIR", "/nonexistent"), "Fonts")]
    found = [
        p for folder in folders for p in sorted(Path(folder).rglob("*")) if p.suffix.lower() in (".ttf", ".otf", ".ttc")
    ]
    found = [path for path in found if not path.stem.startswith(_LAST_RESORT)]
    found.sort(key=lambda path: not path.stem.endswith(("Sans", "Regular", "-VF")))
    own = _own()
    return tuple(([own] if own else []) + [str(path) for path in found])
