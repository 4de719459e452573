"""Images with boxes: a folder of images and a JSON file in COCO's format for each split."""

from __future__ import annotations

import hashlib
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from mobileformer.data.annotations import read_annotations
from mobileformer.data.base import DataError, Split, check_channels
from mobileformer.data.folder import SPLIT_FOLDERS, find_split, has_class_folders
from mobileformer.data.image import ImageError, decode_image

__all__ = ["CocoSource", "find_coco", "open_coco"]

LOOKED_AT = 8  # images that are looked for when a set is opened


class CocoSource:
    """The images that a JSON file in COCO's format names, with their boxes. What is held in memory are arrays.

    annotations: the file. images: the folder that its `file_name`s are in. channels: 3 unless given.

    `source[index]` is (image, target):

    | of a target | shape | dtype, unit |
    |---|---|---|
    | boxes | (N, 4) | float32 corners (x1, y1, x2, y2) in pixels; N may be 0 |
    | labels | (N) | int64, positions in `classes` |
    | areas | (N) | float32, pixels of the object's outline, which decide whether it is small or large |
    | crowd | (M, 4) | as boxes: each around many objects; not trained on, and no error to find something there |
    | crowd_labels | (M) | int64 |
    | image_id | | of the file, an int |

    | of the source | shape | what |
    |---|---|---|
    | classes | K | names of the categories in the order of their ids |
    | category_ids | (K) | int64: the id of each class in the file |
    | aspects | (number of images) | float64, width / height: `training_batches` puts those of like shape together |
    | problems | | broken entries of the file, counted and named; see `read_annotations` |

    A UserWarning tells of broken entries. Image files are opened one by one when they are read.

    Raises:
        DataError: `read_annotations` says for what; or the folder is missing, or has none of the images.
        ImageError: of `[]`: the file is missing or broken, or has another size than the annotations say.
    """

    def __init__(
        self,
        annotations: str | os.PathLike[str],
        images: str | os.PathLike[str],
        *,
        channels: int | None = None,
    ) -> None:
        self._all = read_annotations(annotations)
        self.folder = Path(images)
        if not self.folder.is_dir():
            raise DataError(f"{self.folder}: no such folder, expected the images of {os.fspath(annotations)}")
        some = np.linspace(0, len(self) - 1, min(LOOKED_AT, len(self))).astype(int).tolist()
        if not any(os.path.exists(self._path(index)) for index in some):
            raise DataError(
                f"{self._path(0)}: no such file, nor others of {os.fspath(annotations)} that were looked for"
            )
        self.channels = check_channels(channels) or 3
        self.name = os.fspath(annotations)
        self.classes = self._all.classes
        self.category_ids = self._all.category_ids
        self.problems = self._all.problems
        if self.problems.count:
            warnings.warn(str(self.problems), UserWarning, stacklevel=3)

    def __len__(self) -> int:
        return len(self._all.image_ids)

    def __getitem__(self, index: int) -> tuple[Image.Image, dict[str, Any]]:
        path = self._path(index)
        image = decode_image(path, channels=self.channels)
        height, width = self._all.sizes[index].tolist()
        if image.size != (width, height):
            turned = (
                ", and they are of the image as it is without its orientation" if image.size == (height, width) else ""
            )
            raise ImageError(
                f"{path}: {image.width} x {image.height} pixels, the annotations say {width} x {height}{turned}"
            )
        return image, self.target(index)

    def target(self, index: int) -> dict[str, Any]:
        """What `source[index]` has beside the image, without reading that."""
        mine = slice(self._all.starts[index], self._all.starts[index + 1])
        boxes, labels, crowd = self._all.boxes[mine], self._all.labels[mine], self._all.crowd[mine]
        return {
            "boxes": boxes[~crowd],
            "labels": labels[~crowd],
            "areas": self._all.areas[mine][~crowd],
            "crowd": boxes[crowd],
            "crowd_labels": labels[crowd],
            "image_id": int(self._all.image_ids[index]),
        }

    @property
    def aspects(self) -> npt.NDArray[np.float64]:
        return self._all.sizes[:, 1] / self._all.sizes[:, 0]

    def digest(self) -> str:
        """Of the images' names and sizes, their boxes and classes."""
        found = hashlib.sha256(self._all.names.text)
        for array in (self._all.sizes, self._all.starts, self._all.boxes, self._all.labels, self._all.crowd):
            found.update(array.tobytes())
        return found.hexdigest()

    def _path(self, index: int) -> str:
        return os.path.join(self.folder, os.fsdecode(self._all.names[index]))


def open_coco(root: str | os.PathLike[str], split: Split, *, channels: int | None = None) -> CocoSource:
    """One split of a folder that `find_coco` knows. Raises DataError where it has no annotations for the split."""
    found = find_coco(root, split)
    if found is None:
        raise DataError(
            f"{os.fspath(root)}: no annotations for {split}, expected {split}.json beside {split}/, or COCO's "
            f"annotations/instances_{split}*.json"
        )
    return CocoSource(*found, channels=channels)


def find_coco(root: str | os.PathLike[str], split: Split | None = None) -> tuple[Path, Path] | None:
    """(annotations, folder of the images) of a split, or of any; None where there are none.

    | annotations | images |
    |---|---|
    | train.json, val.json, test.json | train/, val/, test/ |
    | annotations/instances_train2017.json and so on | train2017/, or images/train2017/ |

    A folder whose split folders hold class folders is one of images by class, whatever else lies in it. Raises
    DataError where a split has several annotations.
    """
    folder = Path(root)
    if not folder.is_dir():
        return None
    splits: list[Split] = [split] if split else list(SPLIT_FOLDERS)
    found = [pair for which in splits for pair in [_find(folder, which)] if pair]
    if not found:
        return None
    by_class = any(
        below and has_class_folders(below) for below in (find_split(folder, which) for which in SPLIT_FOLDERS)
    )
    return None if by_class else found[0]


def _find(folder: Path, split: Split) -> tuple[Path, Path] | None:
    pairs = [(folder / f"{split}.json", folder / split)]
    for file in sorted((folder / "annotations").glob(f"instances_{split}*.json")):
        name = file.stem.removeprefix("instances_")
        places = [folder / name, folder / "images" / name]
        pairs.append((file, next((place for place in places if place.is_dir()), places[0])))
    found = [pair for pair in pairs if pair[0].is_file()]
    if len(found) > 1:
        raise DataError(f"{folder}: several annotations for {split}, keep one: {', '.join(str(a) for a, _ in found)}")
    return found[0] if found else None
