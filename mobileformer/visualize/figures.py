"""The attention of one image as one picture: a row for each block, a tile for each head and token."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from mobileformer.visualize import shades
from mobileformer.visualize.attention import BlockAttention, token_similarity
from mobileformer.visualize.canvas import FAINT, Canvas

__all__ = ["draw_attention"]

Pixels = npt.NDArray[np.uint8]

TILE, GAP, WIDE_GAP, MARGIN, LABELS, HEADER, SCALE = 96, 4, 40, 36, 150, 344, 440
WORDS = 98  # height of what is written beside a block
HEADINGS = (470, 620)  # width of what is written over the first two sections
FEW_TOKENS = 4  # up to so many, heads stand side by side; above, one below the other


@dataclass(frozen=True)
class _Layout:
    """Where tiles stand, in pixels. Sections from left to right: tokens that look, pixels that take, similarity."""

    heads: int
    tokens: int
    height: int  # of a tile; its width is TILE

    @property
    def beside(self) -> bool:
        return self.tokens <= FEW_TOKENS

    @property
    def rows(self) -> int:
        return 1 if self.beside else self.heads

    @property
    def pitch(self) -> int:
        """From the top of one row to that of the next: beside rows of heads stand their names."""
        return (self.height if self.beside else max(self.height, 50)) + GAP

    @property
    def block_height(self) -> int:
        return max(self.rows * self.pitch + 14, WORDS)

    def section(self, columns: int) -> int:
        """Width of a section with so many tiles a head."""
        heads = self.heads if self.beside else 1
        return heads * columns * (TILE + GAP) + (heads - 1) * 3 * GAP

    @property
    def starts(self) -> tuple[int, int, int]:
        first = MARGIN + LABELS
        second = first + max(HEADINGS[0], self.section(self.tokens)) + WIDE_GAP
        return first, second, second + max(HEADINGS[1], self.section(self.tokens + 1)) + WIDE_GAP

    @property
    def matrix(self) -> int:
        """Side of the similarity matrix."""
        return self.rows * (min(self.height, TILE) + GAP) - GAP

    @property
    def width(self) -> int:
        return self.starts[2] + max(self.matrix, TILE) + MARGIN

    def tile(self, section: int, columns: int, head: int, column: int) -> tuple[int, int]:
        """Upper left corner of a tile, from the top of its block."""
        x = self.starts[section] + column * (TILE + GAP)
        if self.beside:
            return x + head * (columns * (TILE + GAP) + 3 * GAP), 0
        return x, head * self.pitch


def draw_attention(
    blocks: Sequence[BlockAttention],
    photo: Pixels,
    path: str | os.PathLike[str],
    *,
    title: str,
    notes: Sequence[str] = (),
    index: int = 0,
) -> None:
    """Write the attention of one image as a PNG.

    ======  =================================================================================================
    argument  meaning
    ======  =================================================================================================
    blocks  what `attention_maps` gave
    photo   (H,W,3) uint8, the image as the network saw it
    title   one line, in large letters
    notes   up to five lines below it
    index   which sample of the batch
    ======  =================================================================================================

    Raises ValueError without blocks; ImportError where matplotlib is missing, with the extra that brings it. The file
    appears whole or not at all.
    """
    if not blocks:
        raise ValueError("blocks: expected at least one")
    _, heads, tokens = blocks[0].mobile_to_former.shape[:3]
    layout = _Layout(heads, tokens, max(8, round(TILE * photo.shape[0] / photo.shape[1])))
    canvas = Canvas(layout.width, HEADER + len(blocks) * layout.block_height + MARGIN)
    _header(canvas, layout, photo, title, notes)
    base = _resized(shades.underlay(photo), layout.height)
    for row, block in enumerate(blocks):
        _block(canvas, layout, HEADER + row * layout.block_height, block, base, index)
    canvas.save(path)


def _header(canvas: Canvas, layout: _Layout, photo: Pixels, title: str, notes: Sequence[str]) -> None:
    side = 200
    width = min(2 * side, round(side * photo.shape[1] / photo.shape[0]))
    canvas.paste(MARGIN, MARGIN, np.asarray(Image.fromarray(photo).resize((width, side), Image.Resampling.LANCZOS)))
    left = MARGIN + width + 32
    room, scale = layout.width - MARGIN - left, layout.width - MARGIN - SCALE
    canvas.write(left, MARGIN - 4, title, 30, weight="bold", room=room)
    for line, note in enumerate(notes[:5]):
        beside = MARGIN + 46 + 24 * (line + 1) > MARGIN + 162 - 24  # the scale
        canvas.write(left, MARGIN + 46 + 24 * line, note, 17, room=scale - 40 - left if beside else room)
    _scale_bar(canvas, scale, MARGIN + 162)
    into, out, similar = layout.starts
    top = HEADER - 82
    canvas.write(into, top, "Mobile → Former: where each token looks", 19, weight="bold")
    canvas.write(out, top, "Mobile ← Former: which token each position takes from", 19, weight="bold")
    canvas.write(similar, top, "cosine of", 15, weight="bold")
    canvas.write(similar, top + 18, "tokens", 15, weight="bold")
    for section, columns in ((0, layout.tokens), (1, layout.tokens + 1)):
        for head in range(layout.heads if layout.beside else 1):
            if layout.beside:
                canvas.write(layout.tile(section, columns, head, 0)[0], HEADER - 50, f"head {head}", 14, colour=FAINT)
            for column in range(columns):
                x, _ = layout.tile(section, columns, head, column)
                told = "strongest" if column == layout.tokens else f"token {column}"
                canvas.write(x, HEADER - 28, told, 14, colour=FAINT)
                if section == 1 and column < layout.tokens:
                    colour = _rgb(shades.TOKEN_COLOURS[column % len(shades.TOKEN_COLOURS)])
                    canvas.paste(x, HEADER - 8, np.full((4, TILE, 3), colour, dtype=np.uint8))


def _scale_bar(canvas: Canvas, x: int, y: int) -> None:
    """The colours of weights, over the grey of a middling photo."""
    width, height = 420, 18
    logs = np.linspace(-shades.OCTAVES, shades.OCTAVES, width, dtype=np.float32)
    canvas.paste(x, y, shades.laid(np.full((height, width, 3), 110, np.uint8), np.tile(logs, (height, 1))))
    for octave in range(-shades.OCTAVES, shades.OCTAVES + 1, 2):
        at = x + (octave + shades.OCTAVES) / (2 * shades.OCTAVES) * width
        told = "uniform" if octave == 0 else f"×{2**octave}" if octave > 0 else f"×1/{2**-octave}"
        canvas.write(at, y + height + 4, told, 14, colour=FAINT, ha="center")
    canvas.write(x, y - 22, "weight, as a multiple of the uniform one", 15)


def _block(canvas: Canvas, layout: _Layout, top: int, block: BlockAttention, base: Pixels, index: int) -> None:
    looks = block.mobile_to_former[index].cpu().numpy()
    places = looks.shape[2:]
    told = [block.kind, f"reads {places[0]} × {places[1]}"]
    if not layout.beside:
        for head in range(layout.heads):
            y = top + head * layout.pitch + layout.height / 2
            canvas.write(
                MARGIN + LABELS - 10, y, f"head {head}", 13, colour=FAINT, rotation=90, ha="center", va="center"
            )
    _tiles(canvas, layout, top, 0, shades.relative(looks, 1 / (places[0] * places[1])), base, None)
    if block.former_to_mobile is None:
        canvas.write(layout.starts[1], top + 2, "no way back: the classifier reads token 0", 14, colour=FAINT)
    else:
        takes = block.former_to_mobile[index].cpu().numpy()
        told.append(f"writes {takes.shape[2]} × {takes.shape[3]}")
        _tiles(canvas, layout, top, 1, shades.relative(takes, 1 / layout.tokens), base, takes)
    canvas.write(MARGIN, top, block.name, 20, weight="bold", room=LABELS - 20)
    for line, text in enumerate(told if block.kind != "last" else told[1:]):
        canvas.write(MARGIN, top + 28 + 20 * line, text, 14, colour=FAINT)
    _similarity(canvas, layout, top, token_similarity(block.tokens[index : index + 1])[0].cpu())


def _tiles(
    canvas: Canvas,
    layout: _Layout,
    top: int,
    section: int,
    logs: npt.NDArray[np.float32],
    base: Pixels,
    takes: npt.NDArray[np.floating] | None,
) -> None:
    columns = layout.tokens + (section == 1)
    for head in range(layout.heads):
        for token in range(layout.tokens):
            x, y = layout.tile(section, columns, head, token)
            canvas.paste(x, top + y, shades.laid(base, logs[head, token]))
        if takes is not None:
            x, y = layout.tile(section, columns, head, layout.tokens)
            canvas.paste(x, top + y, _strongest(base, takes[head]))


def _similarity(canvas: Canvas, layout: _Layout, top: int, cosine: torch.Tensor) -> None:
    side = layout.matrix // layout.tokens
    x, values = layout.starts[2], cosine.double().numpy()
    colours = shades.similarity_colours(values)
    canvas.paste(x, top, colours.repeat(side, axis=0).repeat(side, axis=1))
    for row in range(layout.tokens):
        for column in range(layout.tokens):
            value = values[row, column]
            told = f"{value:.2f}".replace("0.", ".").replace("-", "−") if row != column else "1"
            canvas.write(
                x + (column + 0.5) * side,
                top + (row + 0.5) * side,
                told,
                min(13, side * 0.42),
                colour="white" if abs(value) > 0.6 else "#1f2933",
                ha="center",
                va="center_baseline",
            )


def _strongest(base: Pixels, takes: npt.NDArray[np.floating]) -> Pixels:
    """The colour of the token that each position takes most from, the paler the closer to an even mixture."""
    tokens = takes.shape[0]
    winner = takes.argmax(axis=0)
    lead = np.clip((takes.max(axis=0) * tokens - 1) / (tokens - 1), 0, 1) if tokens > 1 else np.ones(winner.shape)
    palette = np.array([_rgb(colour) for colour in shades.TOKEN_COLOURS], dtype=np.uint8)
    nearest = (base.shape[1], base.shape[0])
    colours = np.asarray(Image.fromarray(palette[winner % len(palette)]).resize(nearest, Image.Resampling.NEAREST))
    opacity = np.asarray(Image.fromarray(lead.astype(np.float32)).resize(nearest, Image.Resampling.NEAREST))
    return shades.over(base, colours, 0.9 * opacity**0.5)


def _resized(photo: Pixels, height: int) -> Pixels:
    return np.asarray(Image.fromarray(photo).resize((TILE, height), Image.Resampling.LANCZOS))


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
