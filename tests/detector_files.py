"""For tests of what uses a trained detector: files of small ones that find something, and images with boxes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from detection_support import SMALL
from PIL import Image

import mobileformer.config
import mobileformer.files.metadata
from mobileformer.data import sample_photo
from mobileformer.detection import EndToEnd, RetinaNet
from mobileformer.weights.detectors import save_detector

NAMES = ["ant", "bee [old]", "cat"]
SIZE = 64  # short side


@contextlib.contextmanager
def small_variant() -> Iterator[None]:
    """ "small" is a variant inside the block, for files too: a file of it is opened in a third of the time."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (mobileformer.config, mobileformer.files.metadata):
            patch.setattr(module, "VARIANTS", MappingProxyType({**module.VARIANTS, "small": SMALL}))
        yield


def save_retinanet(path: Path, *, names: list[str] | None = NAMES, classes: int = 3, in_chans: int = 3) -> Path:
    """Random weights, made larger where the classes are told: some twenty boxes of scores from 0.05 to 1."""
    torch.manual_seed(0)
    heads = {"width": 16, "head_depth": 1, "levels": 3, "norm": "group", "detections": 20}
    model = RetinaNet("small", classes, in_chans=in_chans, **heads)  # type: ignore[arg-type]
    with torch.no_grad():
        model.class_head.predict.weight *= 40
        model.class_head.predict.bias.add_(4)  # type: ignore[union-attr]
        model.box_head.predict.weight *= 10
    told: dict[str, Any] = {"mean": [0.4], "std": [0.3]} if in_chans == 1 else {}
    save_detector(model.eval(), path, labels=names, input_size=SIZE, **told)
    return path


def save_end_to_end(path: Path) -> Path:
    """Random weights: six queries, whose scores are in the middle."""
    torch.manual_seed(1)
    model = EndToEnd("small", 3, 6, width=32, feature_width=32, hidden=32, depth=[1, 1, 1], preset="focal")
    with torch.no_grad():
        model.head.classes.bias.add_(4.6)
    save_detector(model.eval(), path, labels=NAMES, input_size=SIZE)
    return path


def save_images(folder: Path) -> Path:
    """Three photos of different shapes and kinds."""
    folder.mkdir(parents=True, exist_ok=True)
    photo = Image.open(sample_photo())
    photo.save(folder / "a.png")
    photo.rotate(90, expand=True).save(folder / "b.jpg")
    photo.crop((100, 50, 200, 150)).save(folder / "c.png")
    return folder


def save_boxed(root: Path, categories: tuple[str, ...]) -> Path:
    """Images in COCO's format, split val: image k has a box for each category but the last, on images of two shapes."""
    folder = root / "val"
    folder.mkdir(parents=True)
    images, annotations = [], []
    for number in range(3):
        width, height = (80, 64) if number % 2 else (64, 80)
        Image.new("RGB", (width, height), (90 * number, 80, 40)).save(folder / f"{number}.png")
        images.append({"id": number + 1, "file_name": f"{number}.png", "width": width, "height": height})
        for label in range(len(categories) - 1):
            box = [5 + 20 * label, 10 + 7 * number, 15, 30]
            row = {"id": len(annotations) + 1, "image_id": number + 1, "category_id": label + 1, "bbox": box}
            annotations.append(row | {"area": 450, "iscrowd": 0})
    listed = [{"id": label + 1, "name": name} for label, name in enumerate(categories)]
    document = {"images": images, "annotations": annotations, "categories": listed}
    (root / "val.json").write_text(json.dumps(document))
    return root
