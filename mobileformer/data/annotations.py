"""Annotations in COCO's JSON format, read into arrays: what is broken in them is named, counted and left out.

A file is an object with the lists `images` (id, file_name, width, height), `categories` (id, name) and `annotations`
(image_id, category_id, bbox = [left, top, width, height] in pixels; iscrowd and area where they are given). All else in
it, outlines of objects above all, is dropped while it is read: of COCO's 860 000 annotations of 118 000 images 30 MB
remain.

Source: T.-Y. Lin et al., "Microsoft COCO: Common Objects in Context", and the format's page at cocodataset.org.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mobileformer.data.base import DataError
from mobileformer.files.reading import NotRegularError, open_regular

__all__ = ["MAX_BYTES", "Annotations", "Problems", "read_annotations"]

# COCO's largest file has 0.45 GB, LVIS's 1.1 GB; the text and what is made of it are in memory at the same time.
MAX_BYTES = 2**31
MAX_SIDE = 2**20  # pixels, of an image
MAX_NAME = 1024  # bytes of a file's name, folders included
SHOWN = 5  # messages that are told
KEPT = 100  # messages that are kept


class _Entry(NamedTuple):
    """What is kept of an object in the file; None where it has no such key."""

    id: Any
    image_id: Any
    category_id: Any
    bbox: Any
    iscrowd: Any
    area: Any
    file_name: Any
    width: Any
    height: Any
    name: Any


@dataclass
class Problems:
    """Broken entries of one file: how many, and the first of the messages."""

    file: str
    count: int = 0
    messages: list[str] = field(default_factory=list)

    def add(self, message: str) -> None:
        self.count += 1
        if len(self.messages) < KEPT:
            self.messages.append(message)

    def __str__(self) -> str:
        told = "; ".join(self.messages[:SHOWN])
        more = f"; and {self.count - SHOWN} more" if self.count > SHOWN else ""
        return f"{self.file}: {self.count} broken entries are left out: {told}{more}"


@dataclass(frozen=True, eq=False)
class Annotations:
    """One split: N images in the order of the file, M boxes sorted by image, K categories by id.

    | name | shape | dtype, unit |
    |---|---|---|
    | names | (N) | paths below the folder of the images, as bytes |
    | image_ids | (N) | int64 |
    | sizes | (N, 2) | int32, height and width in pixels |
    | starts | (N + 1) | int64: the boxes of image i are starts[i] to starts[i + 1] |
    | boxes | (M, 4) | float32 corners (x1, y1, x2, y2) in pixels, inside the image |
    | labels | (M) | int64, positions in `classes` |
    | crowd | (M) | bool: a box around many objects, which are not told apart |
    | areas | (M) | float32: of the object's outline in pixels where the file says it, else of the box |
    | classes, category_ids | K | names; (K) int64, rising |
    """

    names: Names
    image_ids: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int64]
    boxes: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    crowd: npt.NDArray[np.bool_]
    areas: npt.NDArray[np.float32]
    classes: tuple[str, ...]
    category_ids: npt.NDArray[np.int64]
    problems: Problems


class Names:
    """Names one after another in one string of bytes: an array of equally long ones would be as wide as the longest."""

    def __init__(self, names: Iterable[bytes]) -> None:
        names = list(names)
        self.text = b"".join(names)
        self._ends = np.cumsum([0, *map(len, names)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> bytes:
        return self.text[self._ends[index] : self._ends[index + 1]]


def read_annotations(path: str | os.PathLike[str]) -> Annotations:
    """Everything in the file that can be used; `problems` has what cannot.

    | left out, and named | |
    |---|---|
    | image | without an id, a name inside the folder, or a size of 1 to 2^20 pixels; its boxes go with it |
    | annotation | without four finite numbers as bbox; width or height not above 0; wholly outside its image; of an |
    | | image or a category that is not there |

    Boxes that reach over an edge are cut there. Images without boxes stay.

    Raises:
        DataError: what cannot be meant at all: a file that is missing, too large, no JSON, nested too deeply, or
            without one of the lists; two images or two categories of one id, two categories of one name; no category,
            no usable image, or annotations of which not one is usable.
    """
    name = os.fspath(path)
    document = _parse(name)
    lists = {}
    for key in ("images", "annotations", "categories"):
        if not isinstance(document.get(key), list):
            raise DataError(f"{name}: expected a list {key!r}, as COCO's files have it, got {_kind(document.get(key))}")
        lists[key] = document[key]
    problems = Problems(name)
    category_ids, classes = _categories(lists["categories"], name)
    image_ids, names, sizes, left_out = _images(lists["images"], problems)
    before = problems.count
    image, rows = _boxes(lists["annotations"], image_ids, left_out, sizes, category_ids, problems)
    if lists["annotations"] and not len(image):
        first = "; ".join(problems.messages[before:][:SHOWN]) or "; ".join(problems.messages[:SHOWN])
        raise DataError(f"{name}: not one of {len(lists['annotations'])} annotations can be used: {first}")
    order = np.argsort(image, kind="stable")
    return Annotations(
        names=Names(names),
        image_ids=image_ids,
        sizes=sizes,
        starts=np.searchsorted(image[order], np.arange(len(image_ids) + 1)),
        boxes=rows[order, :4].astype(np.float32),
        labels=rows[order, 4].astype(np.int64),
        crowd=rows[order, 5] > 0,
        areas=rows[order, 6].astype(np.float32),
        classes=classes,
        category_ids=category_ids,
        problems=problems,
    )


def _parse(name: str) -> dict[str, Any]:
    try:
        with open_regular(name) as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_BYTES:
                raise DataError(f"{name}: {size} bytes, more than {MAX_BYTES} are refused")
            # Before a gigabyte is read: whether it begins as an object does, behind the mark of UTF-8 if there is one.
            if not file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{"):
                raise DataError(f"{name}: not a JSON object, which begins with {{")
            file.seek(0)
            document = json.loads(file.read(), object_hook=_kept)
    except FileNotFoundError as error:
        raise DataError(f"{name}: no such file") from error
    except NotRegularError as error:
        raise DataError(str(error)) from error
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror}") from error
    except RecursionError as error:
        raise DataError(f"{name}: nested too deeply") from error
    except DataError:
        raise
    except ValueError as error:  # no JSON, no UTF-8, or an integer of thousands of digits
        raise DataError(f"{name}: not JSON: {error}") from error
    if not isinstance(document, dict):
        raise DataError(f"{name}: expected an object with images, annotations and categories, got {_kind(document)}")
    return document


def _kept(found: dict[str, Any]) -> Any:
    """Called for every object as soon as it is read: a list with hundreds of numbers for an outline is gone at once."""
    if "annotations" in found or "images" in found:
        return found
    return _Entry(*map(found.get, _Entry._fields))


def _categories(entries: list[Any], name: str) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    if not entries:
        raise DataError(f"{name}: no category in it")
    names: dict[int, str] = {}
    for number, entry in enumerate(entries):
        where = f"{name}: category {number} of the list"
        if not isinstance(entry, _Entry) or not _is_id(entry.id) or not isinstance(entry.name, str) or not entry.name:
            raise DataError(f"{where}: expected an object with an integer as id and a text as name")
        if entry.id in names:
            raise DataError(f"{where}: the id {entry.id} has another one already, {names[entry.id]!r}")
        if entry.name in names.values():
            raise DataError(f"{where}: a second one of the name {entry.name!r}")
        names[entry.id] = entry.name
    ids = sorted(names)
    return np.array(ids, np.int64), tuple(names[key] for key in ids)


def _images(
    entries: list[Any], problems: Problems
) -> tuple[npt.NDArray[np.int64], list[bytes], npt.NDArray[np.int32], set[int]]:
    """(ids, names, sizes (height, width)) of those that can be used, and the ids of the others."""
    found: dict[int, tuple[bytes, int, int]] = {}
    left_out: set[int] = set()
    for number, entry in enumerate(entries):
        if not isinstance(entry, _Entry) or not _is_id(entry.id):
            problems.add(f"image {number} of the list: expected an object with an integer as id")
            continue
        if entry.id in found or entry.id in left_out:
            other = os.fsdecode(found[entry.id][0]) if entry.id in found else "one that cannot be used"
            raise DataError(f"{problems.file}: two images of the id {entry.id}: {other} and {_brief(entry.file_name)}")
        file = _file_name(entry.file_name)
        if file is None:
            problems.add(
                f"image {entry.id}: expected the name of a file inside the folder, got {_brief(entry.file_name)}"
            )
        elif not (_is_side(entry.width) and _is_side(entry.height)):
            size = f"{_brief(entry.width)} x {_brief(entry.height)}"
            problems.add(f"image {entry.id}: expected a width and a height of 1 to {MAX_SIDE} pixels, got {size}")
        else:
            found[entry.id] = (file, int(entry.height), int(entry.width))
            continue
        left_out.add(entry.id)
    if not found:
        told = "; ".join(problems.messages[:SHOWN])
        raise DataError(f"{problems.file}: no image in it{f' that can be used: {told}' if told else ''}")
    sizes = np.array([size for _, *size in found.values()], np.int32)
    return np.array(list(found), np.int64), [file for file, *_ in found.values()], sizes, left_out


def _boxes(
    entries: list[Any],
    image_ids: npt.NDArray[np.int64],
    left_out: set[int],
    sizes: npt.NDArray[np.int32],
    category_ids: npt.NDArray[np.int64],
    problems: Problems,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Position of the image of each usable annotation, and its row: four corners, label, whether crowd, area."""
    positions = {int(key): place for place, key in enumerate(image_ids)}
    labels = {int(key): place for place, key in enumerate(category_ids)}
    images = np.empty(len(entries), np.int64)
    rows = np.empty((len(entries), 7), np.float64)
    count = 0
    for number, entry in enumerate(entries):
        if not isinstance(entry, _Entry):
            problems.add(f"annotation {number} of the list: expected an object, got {_kind(entry)}")
            continue
        where = f"annotation {entry.id}" if _is_id(entry.id) else f"annotation {number} of the list"
        place = positions.get(entry.image_id) if _is_id(entry.image_id) else None
        label = labels.get(entry.category_id) if _is_id(entry.category_id) else None
        if place is None:
            known = _is_id(entry.image_id) and entry.image_id in left_out
            problems.add(f"{where}: {'unusable' if known else 'unknown'} image {_brief(entry.image_id)}")
        elif label is None:
            problems.add(f"{where}: unknown category {_brief(entry.category_id)}")
        elif isinstance(corners := _corners(entry.bbox, *sizes[place].tolist()), str):
            problems.add(
                f"{where}: {corners}, got {_brief(entry.bbox)} in an image of {sizes[place][1]} x {sizes[place][0]}"
            )
        elif entry.iscrowd not in (None, 0, 1):
            problems.add(f"{where}: iscrowd: expected 0 or 1, got {_brief(entry.iscrowd)}")
        else:
            images[count] = place
            area = entry.area if _is_number(entry.area) and entry.area > 0 else entry.bbox[2] * entry.bbox[3]
            rows[count] = (*corners, label, bool(entry.iscrowd), area)
            count += 1
    return images[:count], rows[:count]


def _corners(box: Any, height: int, width: int) -> tuple[float, float, float, float] | str:
    """Cut at the edges of the image; or what was expected."""
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        return "bbox: expected four finite numbers"
    left, top, wide, high = box
    if wide <= 0 or high <= 0:
        return "bbox: expected a width and a height above 0"
    corners = max(left, 0), max(top, 0), min(left + wide, width), min(top + high, height)
    # In float32, in which the boxes are kept: a sliver of 1e-9 pixels has no size there.
    x1, y1, x2, y2 = np.array(corners, np.float32).tolist()
    if x1 >= x2 or y1 >= y2:
        return "bbox: expected a box that is at least partly inside"
    return corners


def _file_name(name: Any) -> bytes | None:
    """The name as bytes; None for what is no text, too long, absolute, or leads out of the folder."""
    if not isinstance(name, str) or not name or "\0" in name or os.path.isabs(name):
        return None
    if ".." in name.replace("\\", "/").split("/"):
        return None
    try:
        encoded = os.fsencode(name)
    except UnicodeEncodeError:  # half of a surrogate pair
        return None
    return encoded if len(encoded) <= MAX_NAME else None


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _is_number(value: Any) -> bool:
    """A finite one; integers beyond every float are none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e30 and math.isfinite(value)


def _is_side(value: Any) -> bool:
    return _is_number(value) and 1 <= value <= MAX_SIDE and value == int(value)


def _brief(value: Any) -> str:
    text = repr(value) if not isinstance(value, _Entry) else "an object"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _kind(value: Any) -> str:
    if value is None:
        return "none"
    return "an object" if isinstance(value, _Entry | dict) else f"{type(value).__name__} {_brief(value)}"
