"""Decoding of image files and the evaluation preprocessing of the published recipe.

Decoding ends in 8-bit "RGB" (or "L" where the weights have one input channel), upright, opaque:

| in the file                 | becomes                                                                      |
|-----------------------------|------------------------------------------------------------------------------|
| orientation in EXIF or XMP  | the picture as a viewer shows it                                             |
| alpha, palette, colour key  | composited on white, as a page shows it                                      |
| grey, palette, bilevel,     | Pillow's conversion; embedded colour profiles are not applied, as they are   |
| CMYK, YCbCr, HSV            | not in training on ImageNet                                                  |
| 16-bit grey (I;16, I)       | value / 257, rounded: the range is 0 .. 65535, nothing is stretched          |
| 32-bit float grey (F)       | value * 255, rounded, if all values lie in 0 .. 1; else refused              |
| several frames or pages     | the first                                                                    |

Preprocessing: short side to floor(size / crop fraction) by Pillow's bilinear filter (which averages when it shrinks),
centre crop size x size, y = (x / 255 - mean) / std. For size 224 and the published 0.875 the short side is 256.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

from mobileformer.files.reading import NotRegularError, open_regular

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
    "walk_images",
]

# A fixed list: for some formats Pillow starts another program (Ghostscript for EPS), which no image may do.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
# fmt: off
SUFFIXES = frozenset((
    ".jpg", ".jpeg", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".avif",
))
# fmt: on
# Pillow's own limit of refusal, kept here because the host program may have lifted Pillow's: 0.5 GB as RGB.
MAX_PIXELS = 178_956_970
CROP_FRACTION = 0.875
# The crop sees a square in the middle: no more than this is resized, or a 1 x 100000 image would need 20 GB.
MAX_ASPECT = 32
MODES = {1: "L", 3: "RGB"}

# EXIF orientation -> the operation that makes the picture upright (EXIF 2.32, tag 0x0112).
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(ValueError):
    """An image file that cannot be used; the message starts with its name and says why."""


def decode_image(source: str | os.PathLike[str] | BinaryIO, *, channels: int = 3) -> Image.Image:
    """Decode one image file to an upright, opaque 8-bit image: "RGB" for 3 channels, "L" for 1.

    Args:
        source: a path, or an open binary file.
        channels: 3, or 1 for ITU-R 601 luma, L = (299 R + 587 G + 114 B) / 1000.

    Raises:
        ImageError: no such file, empty, not an image, cut off, damaged, over `MAX_PIXELS`, unknown range.
        ValueError: `channels` is neither 1 nor 3.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels: an image has 1 or 3 of them, got {channels}")
    name = os.fspath(source) if isinstance(source, str | os.PathLike) else "image"
    with contextlib.ExitStack() as stack:
        file = source if not isinstance(source, str | os.PathLike) else stack.enter_context(_opened(source, name))
        try:
            image = stack.enter_context(Image.open(file, formats=FORMATS))
            if image.width * image.height > MAX_PIXELS:
                size = f"{image.width} x {image.height}"
                raise ImageError(f"{name}: {size} pixels, more than {MAX_PIXELS} are refused")
            image.load()  # the first frame
            upright = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
            flat = with_channels(image, channels, name)
        except ImageError:
            raise
        except Image.DecompressionBombError as error:
            raise ImageError(f"{name}: more than {MAX_PIXELS} pixels are refused") from error
        except UnidentifiedImageError as error:
            raise ImageError(f"{name}: not an image in a known format ({', '.join(FORMATS)})") from error
        except Exception as error:  # damaged bytes lead Pillow's decoders to almost any exception
            raise ImageError(f"{name}: cannot be decoded: {type(error).__name__}: {error}") from error
    if upright is not None:
        flat = flat.transpose(upright)
    return flat


def with_channels(image: Image.Image, channels: int, name: str) -> Image.Image:
    """An image of any mode as 8-bit "L" (1) or "RGB" (3), by the table above; itself where it is that already.

    Raises ImageError, which begins with `name`, for values of unknown range.
    """
    if image.mode == MODES[channels] and "transparency" not in image.info:
        return image
    flat = _to_rgb(image, name)
    return flat if channels == 3 else flat.convert("L")


def preprocess(
    image: Image.Image,
    *,
    size: int = 224,
    mean: Sequence[float],
    std: Sequence[float],
    crop_fraction: float = CROP_FRACTION,
) -> npt.NDArray[np.float32]:
    """Short side to floor(size / crop_fraction), centre crop, y = (x / 255 - mean) / std.

    | name | shape | dtype, unit |
    |---|---|---|
    | image | W x H, any | 8-bit "RGB" with 3 means, "L" with 1 |
    | mean, std | C | of values in 0 .. 1 |
    | crop_fraction | scalar | size over short side, in (0, 1] |
    | result | (C, size, size) | float32 |

    Sizes and crop round as torchvision's evaluation transforms do on Pillow images.
    Source: the evaluation recipe of the published checkpoints (timm 0.3.4: crop fraction 0.875, bilinear).

    Raises:
        ValueError: the mode does not fit the number of means, or `mean`, `std` differ in length, or size < 1, or
            the fraction is out of range.
    """
    if len(mean) != len(std):
        raise ValueError(f"mean and std: expected equally many values, got {len(mean)} and {len(std)}")
    if size < 1:
        raise ValueError(f"size: expected at least 1 pixel, got {size}")
    if not 0 < crop_fraction <= 1:
        raise ValueError(f"crop_fraction: expected a number in (0, 1], got {crop_fraction}")
    wanted = MODES.get(len(mean))
    if image.mode != wanted:
        raise ValueError(f"image: mode {image.mode!r} does not fit {len(mean)} means, expected {wanted!r}")
    return normalised(np.asarray(centre_square(image, size, crop_fraction)), mean, std)


def centre_square(image: Image.Image, size: int, crop_fraction: float) -> Image.Image:
    """The size x size pixels that a network sees: short side to floor(size / crop_fraction), then the middle."""
    width, height = image.size
    if width > MAX_ASPECT * height:
        image = _centre_crop(image, MAX_ASPECT * height, height)
    elif height > MAX_ASPECT * width:
        image = _centre_crop(image, width, MAX_ASPECT * width)
    width, height = image.size
    short = math.floor(size / crop_fraction)
    if width <= height:
        resized = (short, int(short * height / width))
    else:
        resized = (int(short * width / height), short)
    return _centre_crop(image.resize(resized, Image.Resampling.BILINEAR), size, size)


def normalised(pixels: npt.NDArray[np.uint8], mean: Sequence[float], std: Sequence[float]) -> npt.NDArray[np.float32]:
    """(x / 255 - mean) / std: one image (H,W,C), of one channel (H,W) too, or many (B,H,W,C) -> (...,C,H,W) float32."""
    channels = len(mean)
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.shape[-1] != channels:
        raise ValueError(f"pixels: expected {channels} channels, one for each mean, got shape {pixels.shape}")
    values = pixels.astype(np.float32) / np.float32(255)
    values = (values - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return np.ascontiguousarray(np.moveaxis(values, -1, -3))


def load_image(
    source: str | os.PathLike[str] | BinaryIO,
    *,
    size: int = 224,
    mean: Sequence[float],
    std: Sequence[float],
    crop_fraction: float = CROP_FRACTION,
) -> npt.NDArray[np.float32]:
    """`decode_image` with as many channels as there are means, then `preprocess`: (C, size, size) float32."""
    image = decode_image(source, channels=len(mean))
    return preprocess(image, size=size, mean=mean, std=std, crop_fraction=crop_fraction)


def find_images(arguments: Sequence[str | os.PathLike[str]]) -> Iterator[tuple[str, str | None]]:
    """Every image that files, folders and patterns stand for: pairs (path, None) or (name, what is wrong).

    A file is taken whatever it is called. A folder gives its files with a suffix in `SUFFIXES`, subfolders
    and links to folders included, hidden names left out. A pattern (`*`, `?`, `[...]`, `**`) counts where no
    file has that very name. Folders and patterns give sorted files, arguments stay in the order given.
    """
    for argument in [os.fspath(argument) for argument in arguments]:
        if os.path.isdir(argument):
            yield from _from_folder(argument)
        elif os.path.lexists(argument) or not glob.has_magic(argument):
            yield argument, None
        elif not (matches := sorted(glob.glob(argument, recursive=True))):
            yield argument, f"{argument}: no file matches this pattern"
        else:
            for match in matches:
                if os.path.isfile(match):
                    yield match, None
                elif "**" not in argument:  # there the folder's files are matches of their own
                    yield from _from_folder(match)


def sample_photo() -> Path:
    """Path of the photo in the package: a cat, 451 x 300, CC0; chelsea.txt beside it has the source."""
    return Path(__file__).with_name("chelsea.jpg")


def _opened(path: str | os.PathLike[str], name: str) -> BinaryIO:
    """A regular file that is not empty. Raises ImageError."""
    try:
        file = open_regular(path)
    except FileNotFoundError as error:
        raise ImageError(f"{name}: no such file") from error
    except NotRegularError as error:
        if os.path.isdir(path):
            raise ImageError(f"{name}: a folder, expected an image file") from error
        raise ImageError(str(error)) from error
    except (OSError, ValueError) as error:
        raise ImageError(f"{name}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if os.fstat(file.fileno()).st_size == 0:
        file.close()
        raise ImageError(f"{name}: the file is empty")
    return file


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _deep_grey_to_rgb(image, name)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        opaque = Image.new("RGBA", image.size, "white")
        straight = image.convert("LA") if image.mode == "La" else image
        opaque.alpha_composite(straight.convert("RGBA"))
        return opaque.convert("RGB")
    return image.convert("RGB")


def _deep_grey_to_rgb(image: Image.Image, name: str) -> Image.Image:
    values = np.asarray(image).astype(np.float64)
    low, high = values.min(), values.max()
    top, kind = (1.0, "float") if image.mode == "F" else (65535.0, "integer")
    if not (low >= 0 and high <= top):  # written so that NaN is refused too
        raise ImageError(f"{name}: {kind} values from {low:g} to {high:g}, expected 0 to {top:g}")
    grey = np.rint(values * (255 / top)).astype(np.uint8)
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey).convert("RGB")


def _centre_crop(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def walk_images(folder: str, unreadable: Callable[[OSError], None] | None = None) -> Iterator[str]:
    """The files below a folder with an image's suffix, in no order; hidden names and what lies below them left out.

    Links to folders are followed, and a folder that is reached twice is read once. OSErrors, with the file they are
    of, go to `unreadable`, or are raised where that is None: a folder that cannot be listed, a link that leads nowhere,
    a link to a folder that it lies in.
    """

    def tell(error: OSError) -> None:
        if unreadable is None:
            raise error
        unreadable(error)

    done: set[tuple[int, int]] = set()
    pending: list[tuple[str, frozenset[tuple[int, int]]]] = [(folder, frozenset())]
    while pending:
        here, above = pending.pop()
        try:
            status = os.stat(here)
            identity = (status.st_dev, status.st_ino)
            if identity in above:
                raise OSError(errno.ELOOP, "a link that leads back to a folder it lies in", here)
            if identity in done:
                continue
            done.add(identity)
            with os.scandir(here) as scanned:
                entries = [entry for entry in scanned if not entry.name.startswith(".")]
        except OSError as error:
            tell(error)
            continue
        for entry in entries:
            if entry.is_dir():
                pending.append((entry.path, above | {identity}))
            elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:
                yield entry.path  # whatever it is: who opens it says so
            elif entry.is_symlink() and not os.path.exists(entry.path):
                tell(OSError(errno.ENOENT, "a link that leads nowhere", entry.path))


def _from_folder(folder: str) -> Iterator[tuple[str, str | None]]:
    unreadable: list[OSError] = []
    found = sorted(walk_images(folder, unreadable.append))
    for error in unreadable:
        yield str(error.filename), f"{error.filename}: {error.strerror}"
    if not found and not unreadable:
        yield folder, f"{folder}: no image in this folder (looked for {' '.join(sorted(SUFFIXES))})"
    for path in found:
        yield path, None
