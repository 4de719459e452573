"""The attention of one image as one HTML page that opens offline: everything it shows is inside the file."""

from __future__ import annotations

import base64
import html
import io
import json
import os
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from mobileformer.files.replacing import replacing
from mobileformer.visualize import shades
from mobileformer.visualize.attention import BlockAttention, token_similarity

__all__ = ["write_page"]

# A stored number n is a weight of 2^(n / STEPS - RANGE) times the uniform one: from 2^-16 to 2^16, within 0.04 %.
RANGE, STEPS = 16, 2047


def write_page(
    blocks: Sequence[BlockAttention],
    photo: npt.NDArray[np.uint8],
    path: str | os.PathLike[str],
    *,
    title: str,
    notes: Sequence[str] = (),
    index: int = 0,
) -> None:
    """Write a page on which block, head and token are chosen, and weights are read off under the pointer.

    ========  ===============================================================================================
    argument  meaning
    ========  ===============================================================================================
    blocks    what `attention_maps` gave
    photo     (H,W,3) uint8, the image as the network saw it
    title     one line, in large letters; also the window's
    notes     lines below it
    index     which sample of the batch
    ========  ===============================================================================================

    The page loads nothing from anywhere: maps are numbers inside it, the photo is a data URI. Raises ValueError without
    blocks. The file appears whole or not at all.
    """
    if not blocks:
        raise ValueError("blocks: expected at least one")
    document = {
        "title": title,
        "notes": list(notes),
        "photo": _data_uri(photo),
        "underlay": _data_uri(shades.underlay(photo)),
        "size": [photo.shape[0], photo.shape[1]],
        "range": RANGE,
        "steps": STEPS,
        "octaves": shades.OCTAVES,
        "shades": shades.shade_table().tolist(),
        "similarity": shades.SIMILARITY,
        "colours": shades.TOKEN_COLOURS,
        "blocks": [_block(block, index) for block in blocks],
    }
    # In a script element nothing is an entity, and only "</" and "<!--" would end it or change how it is read.
    data = json.dumps(document, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    template = files("mobileformer.visualize").joinpath("page.html").read_text(encoding="utf-8")
    before, _, rest = template.partition("{{title}}")
    between, _, after = rest.partition("{{data}}")
    page = before + html.escape(title) + between + data + after
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _block(block: BlockAttention, index: int) -> dict[str, Any]:
    looks = block.mobile_to_former[index].cpu().numpy()
    heads, tokens, height, width = looks.shape
    takes = None if block.former_to_mobile is None else block.former_to_mobile[index].cpu().numpy()
    return {
        "name": block.name,
        "kind": block.kind,
        "heads": heads,
        "tokens": tokens,
        "looks": _maps(looks, 1 / (height * width)),
        "takes": None if takes is None else _maps(takes, 1 / tokens),
        "similarity": token_similarity(block.tokens[index : index + 1])[0].double().cpu().numpy().round(4).tolist(),
    }


def _maps(attention: npt.NDArray[np.floating], uniform: float) -> dict[str, Any]:
    """Maps (N,M,H,W) as little-endian uint16 in base64, in that order."""
    logs = np.clip(shades.relative(attention, uniform), -RANGE, RANGE)
    numbers = np.rint((logs + RANGE) * STEPS).astype("<u2")
    return {
        "size": list(attention.shape[2:]),
        "uniform": uniform,
        "numbers": base64.b64encode(numbers.tobytes()).decode("ascii"),
    }


def _data_uri(photo: npt.NDArray[np.uint8]) -> str:
    file = io.BytesIO()
    Image.fromarray(photo).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
