"""safetensors in numpy alone, and strictly: what is not exactly a file of known arrays is an error with a reason.

A file is 8 bytes of length (little-endian), that many bytes of JSON, then the arrays, one after another:

    {"__metadata__": {text: text, ...}, name: {"dtype": "F32", "shape": [...], "data_offsets": [begin, end]}, ...}

Arrays are float32 (F32) or, where a network is quantised, integers of 8 or 16 bits (I8, I16).
"""

from __future__ import annotations

import json
import math
import os
import shlex
import stat
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mobileformer.files.metadata import DEFAULT_TASK, WeightsError
from mobileformer.files.reading import open_regular

__all__ = ["read_safetensors", "stated_format", "stated_task"]

MAX_HEADER = 16 << 20  # a length beyond this is no length; the names of 20,000 classes take half a million bytes
DTYPES = {"F32": np.dtype("<f4"), "I8": np.dtype("<i1"), "I16": np.dtype("<i2")}
PYTORCH = (b"PK\x03\x04", b"\x80\x02")  # a zip archive, or a pickle as older releases of PyTorch wrote it
LARGEST = np.iinfo(np.intp).max


def read_safetensors(
    path: str | os.PathLike[str], *, form: str | None = None
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(arrays by name, read-only, float32, int8 or int16; text metadata). The values are not looked at.

    `form` is the format that the text metadata must name; a file of another one, or a checkpoint of PyTorch, is told
    apart by its first bytes and its metadata alone.

    The header is checked against the size of the file before any array is read: every byte belongs to exactly one.
    Raises OSError, and WeightsError naming the file and what is wrong with it.
    """
    path = Path(path)
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):  # a pipe would be waited for
        raise WeightsError(f"{path}: expected a file, got {'a folder' if stat.S_ISDIR(mode) else 'a pipe or device'}")
    with path.open("rb") as file:
        try:
            entries, metadata, size = _read_header(file, form)
        except _Damage as damage:
            raise WeightsError(f"{path}: {damage}") from None
        except _Unfolded as found:
            raise WeightsError(
                f"{path}: not a folded network but {found}; `mobileformer convert --fold {shlex.quote(str(path))} "
                "OUT.safetensors` makes one from weights"
            ) from None
        content = file.read(size)
    if len(content) != size:
        raise WeightsError(f"{path}: the file became shorter while it was read")
    arrays = {}
    for name, (shape, begin, dtype) in entries.items():
        values = np.frombuffer(content, dtype=dtype, count=math.prod(shape), offset=begin).reshape(shape)
        # in the machine's own order of bytes, and where compiled code may read them: behind an odd number of int8
        # there are floats at addresses that are no multiple of their size
        arrays[name] = np.require(values, dtype.newbyteorder("="), ["C_CONTIGUOUS", "ALIGNED"])
        arrays[name].flags.writeable = False
    return arrays, metadata


def stated_format(path: str | os.PathLike[str]) -> str | None:
    """The format that a file's text metadata names, or None: names none, is no safetensors, cannot be read.

    For choosing who opens a file. That one then says what is wrong with it.
    """
    return _stated(path, "format")


def stated_task(path: str | os.PathLike[str]) -> str:
    """The task that a file's text metadata names; classification where `stated_format` would be None."""
    return _stated(path, "task") or DEFAULT_TASK


def _stated(path: str | os.PathLike[str], key: str) -> str | None:
    try:
        with open_regular(path) as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length <= MAX_HEADER else {}
        found = header["__metadata__"][key]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if isinstance(found, str) else None


class _Damage(Exception):
    """What is wrong with a file."""


class _Unfolded(Exception):
    """What a file holds that is no folded network."""


def _read_header(
    file: BinaryIO, form: str | None = None
) -> tuple[dict[str, tuple[tuple[int, ...], int, np.dtype]], dict[str, str], int]:
    """({name: (shape, offset, dtype)}, text metadata, bytes of all arrays); leaves the file where the arrays begin."""
    size = os.fstat(file.fileno()).st_size
    if size == 0:
        raise _Damage("the file is empty")
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if form is not None and prefix.startswith(PYTORCH):
        raise _Unfolded("a checkpoint of PyTorch")
    if len(prefix) < 8 or length < 2 or length > MAX_HEADER:
        raise _Damage("not a safetensors file")
    if length > size - 8:
        raise _Damage(f"cut off, or not a safetensors file: {size} bytes, and a header of {length}")
    text = file.read(length)
    if len(text) != length or not text.startswith(b"{"):
        raise _Damage("not a safetensors file")
    try:
        header = json.loads(text.decode(), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise _Damage(f"its header is damaged ({error})") from None
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _Damage("its header is damaged (__metadata__: expected text)")
    if form is not None and metadata.get("format") != form:
        raise _Unfolded("a safetensors file of other contents")
    rows = sorted((_entry(name, value) for name, value in header.items()), key=lambda row: row[:3])
    at = 0
    for begin, end, name, *_ in rows:
        if begin != at:
            raise _Damage(f"its header is damaged ({name:.100}: begins at byte {begin}, the array before ends at {at})")
        at = end
    if at != size - 8 - length:
        cut = "cut off" if at > size - 8 - length else "something follows the arrays"
        raise _Damage(f"{cut}: its header tells of {at} bytes of arrays, the file has {size - 8 - length}")
    return {name: (shape, begin, dtype) for begin, _, name, shape, dtype in rows}, metadata, at


def _entry(name: str, value: Any) -> tuple[int, int, str, tuple[int, ...], np.dtype]:
    """(begin, end, name, shape, dtype) of one row of the header."""
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise _Damage(f"its header is damaged ({name:.100}: expected dtype, shape and data_offsets)")
    dtype = DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        raise _Damage(f"{name:.100}: expected dtype F32, I8 or I16, got {value['dtype']!r:.40}")
    shape, offsets = value["shape"], value["data_offsets"]
    if not (_is_numbers(shape) and _is_numbers(offsets) and len(offsets) == 2):
        raise _Damage(f"its header is damaged ({name:.100}: expected lists of whole numbers from 0)")
    begin, end = offsets
    # The size first: a shape may be long, and a product of large numbers longer.
    if len(shape) > 8 or max(shape, default=0) > LARGEST or math.prod(shape) * dtype.itemsize != end - begin:
        raise _Damage(f"its header is damaged ({name:.100}: {end - begin} bytes for the shape {shape!r:.80})")
    return begin, end, name, tuple(shape), dtype


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands there twice")
    return found
