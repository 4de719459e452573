"""Images in, arrays out: decoding, data sets, augmentation, batches.

Needs Pillow and numpy; what is listed under `_HOME` needs torch and is loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mobileformer.data.base import ArraySource, DataError, Source
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
from mobileformer.data.sources import open_source
from mobileformer.data.transforms import EvaluationTransform, TrainTransform

if TYPE_CHECKING:
    from mobileformer.data.loading import Batch as Batch
    from mobileformer.data.loading import evaluation_batches as evaluation_batches
    from mobileformer.data.loading import steps_per_epoch as steps_per_epoch
    from mobileformer.data.loading import training_batches as training_batches

_HOME = {
    "Batch": "mobileformer.data.loading",
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
    "DataError",
    "EvaluationTransform",
    "ImageError",
    "Source",
    "TrainTransform",
    "decode_image",
    "evaluation_batches",
    "find_images",
    "load_image",
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
