"""Images in, arrays out: decoding and the evaluation preprocessing. Needs Pillow and numpy, not torch."""

from __future__ import annotations

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

__all__ = [
    "CROP_FRACTION",
    "MAX_PIXELS",
    "SUFFIXES",
    "ImageError",
    "decode_image",
    "find_images",
    "load_image",
    "preprocess",
    "sample_photo",
]
