"""Images in, arrays out: decoding, data sets, augmentation, batches.

Needs Pillow and numpy; what is listed under `_HOME` needs torch and is loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mobileformer.data.base import ArraySource, DataError, Source
from mobileformer.data.coco import CocoSource
from mobileformer.data.folder import FolderSource
from mobileformer.data.image import (
    CROP_FRACTION,
    MAX_PIXELS,
    SUFFIXES,
    ImageError,
    decode_image,
    find_images,
    load_image,
    preprocess,
    sample_photo,
)
from mobileformer.data.mnist import mnist_5k_source
from mobileformer.data.shards import ShardSource
from mobileformer.data.sources import adopt_source, open_source
from mobileformer.data.transforms import EvaluationTransform, TrainTransform

if TYPE_CHECKING:
    from mobileformer.data.batch import Batch as Batch
    from mobileformer.data.loading import evaluation_batches as evaluation_batches
    from mobileformer.data.loading import steps_per_epoch as steps_per_epoch
    from mobileformer.data.loading import training_batches as training_batches

_HOME = {
    "Batch": "mobileformer.data.batch",
    "evaluation_batches": "mobileformer.data.loading",
    "steps_per_epoch": "mobileformer.data.loading",
    "training_batches": "mobileformer.data.loading",
}

__all__ = [
    "CROP_FRACTION",
    "MAX_PIXELS",
    "SUFFIXES",
    "ArraySource",
    "Batch",
    "CocoSource",
    "DataError",
    "EvaluationTransform",
    "FolderSource",
    "ImageError",
    "ShardSource",
    "Source",
    "TrainTransform",
    "adopt_source",
    "decode_image",
    "evaluation_batches",
    "find_images",
    "load_image",
    "mnist_5k_source",
    "open_source",
    "preprocess",
    "sample_photo",
    "steps_per_epoch",
    "training_batches",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
