"""A set for object detection made of two others: items of Fashion-MNIST on crops of photos, in COCO's format.

| of an image | drawn from |
|---|---|
| background | 128 x 128 pixels anywhere in a photo of the split |
| objects | 1 to 6 items of the split, cut to the pixels above 24, long side log-uniform in 20 to 56 pixels |
| colour | grey value times 0.6 to 1, for each of the three channels by itself |
| opacity | grey value / 32, at most 1 |
| place | anywhere inside; no two boxes share more than 30 % of the smaller one, or the item is left out |

A box is the rectangle of the cut and resized item. An image depends on the seed, its split and its number alone. No
photo and no item is in two splits:

| split | items | photos of scikit-image | photos of a folder |
|---|---|---|---|
| train | the first nine tenths of the training file | 11 | seven tenths |
| val | the last tenth of it | 3 | one tenth |
| test | the test file (t10k) | 4 | two tenths |

Sources, none of which is copied into this package. Photos: the image files in an installed scikit-image (BSD-3-Clause;
each photo's author and licence, public domain or CC0 for most, stand in the documentation of `skimage.data`). Nothing
of it is imported. Items: Fashion-MNIST (H. Xiao, K. Rasul, R. Vollgraf, 2017; MIT licence), as its four IDX files from
github.com/zalandoresearch/fashion-mnist or Debian's package dataset-fashion-mnist.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL
from PIL import Image

from mobileformer.data.base import DataError
from mobileformer.data.idx import open_idx
from mobileformer.data.image import decode_image, find_images

__all__ = [
    "DEBIAN_ITEMS",
    "RECIPE",
    "SCIKIT_IMAGE",
    "SPLITS",
    "Items",
    "Photo",
    "compose",
    "compose_image",
    "read_items",
    "read_photos",
]

SPLITS = ("train", "val", "test")
RECIPE = "recipe.json"
SCIKIT_IMAGE = "scikit-image"
DEBIAN_ITEMS = "/usr/share/datasets/fashion-mnist"
# By scene: the two of the motorcycle are one.
PHOTOS = {
    "train": (
        "astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "coffee.png", "grass.png", "ihc.png",
        "moon.png", "motorcycle_left.png", "motorcycle_right.png",
    ),
    "val": ("clock_motion.png", "page.png", "retina.jpg"),
    "test": ("coins.png", "gravel.png", "hubble_deep_field.jpg", "rocket.jpg"),
}  # fmt: skip
SIDE = 128
OBJECTS = 6
LONG_SIDE = (20, 56)
DARKEST = 24  # of an item's pixels, that count as its outline
OPAQUE = 32
TINT = (0.6, 1.0)
OVERLAP = 0.3
ATTEMPTS = 20  # to find a place
# Photos are held in memory: larger ones are made smaller, and a folder with more of them is a slip.
LARGEST, MOST = 1024, 2000


@dataclass(frozen=True, eq=False)
class Photo:
    """name and SHA-256 of the file; pixels (H, W, 3) uint8, at least 128 each way."""

    name: str
    digest: str
    pixels: npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Items:
    """images (N, h, w) uint8, dark where nothing is; labels (N), positions in `classes`; SHA-256 of both."""

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]
    digest: str


def read_photos(places: Sequence[str | os.PathLike[str]] = (SCIKIT_IMAGE,)) -> dict[str, list[Photo]]:
    """The photos of each split: of folders, searched below, and of "scikit-image", which is what it has installed.

    A folder's photos are shared out by what is in them, and copies of one count once.

    Raises:
        DataError: scikit-image is not installed or lacks a photo; a folder has none, one that is too small, fewer than
            three or more than 2000.
        ImageError: a photo cannot be read.
    """
    found: dict[str, list[Photo]] = {split: [] for split in SPLITS}
    for place in places:
        named = _of_scikit_image() if os.fspath(place) == SCIKIT_IMAGE else _of_folder(Path(place))
        for split, photos in named.items():
            known = {photo.digest for others in found.values() for photo in others}
            found[split] += [photo for photo in photos if photo.digest not in known]
    return found


def read_items(folder: str | os.PathLike[str]) -> dict[str, Items]:
    """The items of each split: of a folder of IDX files, as Fashion-MNIST's are.

    Raises DataError as `open_idx`, and where a split has no item with a pixel above 24.
    """
    training, test = open_idx(folder, "train", channels=1), open_idx(folder, "test", channels=1)
    border = len(training) * 9 // 10
    parts = {"train": (training, slice(0, border)), "val": (training, slice(border, None)), "test": (test, slice(None))}
    found = {}
    for split, (source, part) in parts.items():
        images, labels = source.images[part], np.asarray(source.labels[part], np.int64)
        drawn = images.max(axis=(1, 2), initial=0) > DARKEST
        if not drawn.any():
            raise DataError(f"{source.name}: no item for {split}, which needs a pixel above {DARKEST}")
        digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
        found[split] = Items(images[drawn], labels[drawn], source.classes, digest)
    return found


def compose(
    folder: Path,
    photos: Mapping[str, Sequence[Photo]],
    items: Mapping[str, Items],
    counts: Mapping[str, int],
    *,
    seed: int,
    watch: Callable[[Iterable[int], str], Iterable[int]] = lambda numbers, split: numbers,
) -> dict[str, Any]:
    """Write the set into a folder that is there and empty -> what it was made from, which is `recipe.json` too.

    | written | what |
    |---|---|
    | train/000001.jpg ... | images, JPEG of quality 95 without subsampling of colours |
    | train.json, val.json, test.json | annotations in COCO's format; `open_source` opens the folder |
    | recipe.json | seed, counts, digests of all that went in and of the annotations that came out |

    watch: told of every split's numbers as they are gone through.
    """
    recipe: dict[str, Any] = {"seed": seed, "side": SIDE, "pillow": PIL.__version__, "numpy": np.__version__}
    recipe["splits"] = {}
    for number, split in enumerate(SPLITS):
        (folder / split).mkdir()
        document = _empty(items[split].classes)
        for index in watch(range(counts[split]), split):
            rng = np.random.default_rng((seed, number, index))
            pixels, boxes, labels = compose_image(photos[split], items[split], rng)
            name = f"{index + 1:06}.jpg"
            Image.fromarray(pixels).save(folder / split / name, quality=95, subsampling=0)
            _note(document, name, boxes, labels)
        text = json.dumps(document).encode()
        (folder / f"{split}.json").write_bytes(text)
        recipe["splits"][split] = {
            "images": counts[split],
            "objects": len(document["annotations"]),
            "photos": {photo.name: photo.digest for photo in photos[split]},
            "items": len(items[split].labels),
            "items_sha256": items[split].digest,
            "annotations_sha256": hashlib.sha256(text).hexdigest(),
        }
    (folder / RECIPE).write_text(json.dumps(recipe, indent=2) + "\n")
    return recipe


def compose_image(
    photos: Sequence[Photo], items: Items, rng: np.random.Generator
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """One image: pixels (128, 128, 3) uint8, boxes (N, 4) int64 as left, top, width, height, labels (N); N 1 to 6."""
    photo = photos[int(rng.integers(len(photos)))].pixels
    top, left = (int(rng.integers(side - SIDE, endpoint=True)) for side in photo.shape[:2])
    pixels = photo[top : top + SIDE, left : left + SIDE].astype(np.float32)
    boxes: list[tuple[int, int, int, int]] = []
    labels: list[int] = []
    for _ in range(int(rng.integers(1, OBJECTS, endpoint=True))):
        chosen = int(rng.integers(len(items.labels)))
        grey = _resized(items.images[chosen], math.exp(rng.uniform(math.log(LONG_SIDE[0]), math.log(LONG_SIDE[1]))))
        colour = rng.uniform(*TINT, size=3).astype(np.float32)
        box = _place(grey.shape[1], grey.shape[0], boxes, rng)
        if box is None:
            continue
        x, y, width, height = box
        under = pixels[y : y + height, x : x + width]
        alpha = np.minimum(grey / OPAQUE, 1)[:, :, None]
        under += alpha * (grey[:, :, None] * colour - under)
        boxes.append(box)
        labels.append(int(items.labels[chosen]))
    return np.rint(pixels).astype(np.uint8), np.array(boxes), np.array(labels)


def _resized(item: npt.NDArray[np.uint8], long_side: float) -> npt.NDArray[np.float32]:
    rows, columns = (np.flatnonzero((item > DARKEST).any(axis)) for axis in (1, 0))
    cut = item[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = long_side / max(cut.shape)
    height, width = (max(1, round(side * scale)) for side in cut.shape)
    return np.asarray(Image.fromarray(cut).resize((width, height), Image.Resampling.BILINEAR), np.float32)


def _place(
    width: int, height: int, boxes: Sequence[tuple[int, int, int, int]], rng: np.random.Generator
) -> tuple[int, int, int, int] | None:
    for _ in range(ATTEMPTS):
        x, y = (int(rng.integers(SIDE - side, endpoint=True)) for side in (width, height))
        if all(_shared((x, y, width, height), other) <= OVERLAP for other in boxes):
            return x, y, width, height
    return None


def _shared(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    """The part of the smaller box that lies in the other one."""
    wide = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    high = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(0, wide) * max(0, high) / min(a[2] * a[3], b[2] * b[3])


def _empty(classes: Sequence[str]) -> dict[str, Any]:
    categories = [{"id": number + 1, "name": name} for number, name in enumerate(classes)]
    return {"images": [], "annotations": [], "categories": categories}


def _note(document: dict[str, Any], name: str, boxes: npt.NDArray[np.int64], labels: npt.NDArray[np.int64]) -> None:
    image = len(document["images"]) + 1
    document["images"].append({"id": image, "file_name": name, "width": SIDE, "height": SIDE})
    for box, label in zip(boxes.tolist(), labels.tolist(), strict=True):
        document["annotations"].append(
            {
                "id": len(document["annotations"]) + 1,
                "image_id": image,
                "category_id": label + 1,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
            }
        )


def _of_scikit_image() -> dict[str, list[Photo]]:
    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        raise DataError(
            f"{SCIKIT_IMAGE}: not installed, which carries the photos; pip install 'mobileformer[detection]' brings "
            "it, or give a folder of your own"
        )
    folder = Path(spec.origin).with_name("data")
    return {split: [_read(folder / name) for name in names] for split, names in PHOTOS.items()}


def _of_folder(folder: Path) -> dict[str, list[Photo]]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder, expected photos in it")
    paths = []
    for path, problem in find_images([folder]):
        if problem is not None:
            raise DataError(problem)
        paths.append(path)
    if len(paths) > MOST:
        raise DataError(f"{folder}: {len(paths)} photos, expected at most {MOST}: they are held in memory")
    photos = {photo.digest: photo for photo in map(_read, map(Path, paths))}
    if len(photos) < len(SPLITS):
        raise DataError(
            f"{folder}: {len(photos)} different photos, expected at least {len(SPLITS)}: one for each split"
        )
    # By what is in them, so that no name and no seed moves a photo from one split to another.
    order = [photos[digest] for digest in sorted(photos)]
    val, test = max(1, len(order) // 10), max(1, len(order) // 5)
    return {"val": order[:val], "test": order[val : val + test], "train": order[val + test :]}


def _read(path: Path) -> Photo:
    image = decode_image(path)
    image.thumbnail((LARGEST, LARGEST))
    if min(image.size) < SIDE:
        raise DataError(f"{path}: {image.width} x {image.height} pixels, expected at least {SIDE} each way")
    return Photo(path.name, hashlib.sha256(path.read_bytes()).hexdigest(), np.asarray(image))
