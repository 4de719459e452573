"""Decoding and preprocessing: every kind of file becomes what a viewer shows, or an error that names it."""

from __future__ import annotations

import io
import itertools
import math
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from mobileformer.data import (
    ImageError,
    decode_image,
    find_images,
    load_image,
    preprocess,
    sample_photo,
)
from mobileformer.data import image as module

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> io.BytesIO:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    buffer.seek(0)
    return buffer


def corners() -> Image.Image:
    """30 x 20: red, green on top; blue, white below. No symmetry maps it onto itself."""
    image = Image.new("RGB", (30, 20), WHITE)
    image.paste(RED, (0, 0, 15, 10))
    image.paste(GREEN, (15, 0, 30, 10))
    image.paste(BLUE, (0, 10, 15, 20))
    return image


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
    file = encoded(corners(), kind, exif=exif, **options)
    expected = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
    file.seek(0)
    upright = decode_image(file)
    assert upright.size == ((30, 20) if orientation < 5 else (20, 30))
    np.testing.assert_array_equal(np.asarray(upright), np.asarray(expected))


def test_orientation_6_turns_clockwise() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = decode_image(encoded(corners(), exif=exif))
    assert [upright.getpixel(at) for at in ((2, 2), (17, 2), (2, 27), (17, 27))] == [BLUE, RED, WHITE, GREEN]


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow mentions the damage
@pytest.mark.parametrize("bad", range(26))
def test_damaged_exif_does_not_lose_the_picture(bad: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = 1
    data = bytearray(encoded(corners(), "JPEG", exif=exif).getvalue())
    start = data.index(b"Exif\0\0") + 6
    data[start + bad] ^= 0xFF
    assert sorted(decode_image(io.BytesIO(bytes(data))).size) == [20, 30]


def test_grey_bilevel_palette_and_cmyk() -> None:
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    assert decode_image(encoded(grey)).mode == "RGB"
    np.testing.assert_array_equal(np.asarray(decode_image(encoded(grey)))[..., 1], np.asarray(grey))
    bilevel = decode_image(encoded(grey.point(lambda v: 255 * (v > 99), "1")))
    assert set(np.unique(np.asarray(bilevel))) == {0, 255}
    palette = corners().quantize(4)
    assert palette.mode == "P"
    np.testing.assert_array_equal(np.asarray(decode_image(encoded(palette))), np.asarray(corners()))
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    np.testing.assert_allclose(np.asarray(decode_image(encoded(cmyk, "JPEG", quality=95)))[0, 0], RED, atol=3)
    np.testing.assert_array_equal(np.asarray(decode_image(encoded(cmyk, "TIFF")))[0, 0], RED)


def test_transparency_is_composited_on_white() -> None:
    rgba = Image.new("RGBA", (4, 4), (200, 100, 0, 128))
    rgba.putpixel((0, 0), (10, 20, 30, 0))
    rgba.putpixel((1, 0), (10, 20, 30, 255))
    decoded = decode_image(encoded(rgba))
    assert decoded.getpixel((0, 0)) == WHITE
    assert decoded.getpixel((1, 0)) == (10, 20, 30)
    share = 128 / 255
    expected = [round(share * value + (1 - share) * 255) for value in (200, 100, 0)]
    np.testing.assert_allclose(decoded.getpixel((3, 3)), expected, atol=1)

    grey_alpha = Image.new("LA", (2, 1), (0, 255))
    grey_alpha.putpixel((1, 0), (0, 0))
    np.testing.assert_array_equal(np.asarray(decode_image(encoded(grey_alpha)))[0, :, 0], [0, 255])

    palette = corners().quantize(4)
    red_index = palette.getpixel((0, 0))
    keyed = decode_image(encoded(palette, transparency=red_index))
    assert keyed.getpixel((0, 0)) == WHITE
    assert keyed.getpixel((29, 0)) == GREEN
    keyed_rgb = decode_image(encoded(corners(), transparency=GREEN))
    assert keyed_rgb.getpixel((29, 0)) == WHITE
    assert keyed_rgb.getpixel((0, 0)) == RED


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey_keeps_its_range(kind: str) -> None:
    deep = np.array([[0, 256, 257, 385, 386, 32896, 65535]], np.uint16)
    decoded = np.asarray(decode_image(encoded(Image.fromarray(deep), kind)))
    np.testing.assert_array_equal(decoded[0, :, 0], [0, 1, 1, 1, 2, 128, 255])
    np.testing.assert_array_equal(decoded[..., 0], decoded[..., 2])


def test_sixteen_bit_colour_key_and_32_bit() -> None:
    deep = np.array([[0, 300, 65535]], np.uint16)
    keyed = bytearray(encoded(Image.fromarray(deep)).getvalue())
    key = b"tRNS" + struct.pack(">H", 300)
    chunk = struct.pack(">I", 2) + key + struct.pack(">I", zlib.crc32(key))
    at = keyed.index(b"IDAT") - 4
    decoded = decode_image(io.BytesIO(bytes(keyed[:at]) + chunk + bytes(keyed[at:])))
    assert [decoded.getpixel((x, 0))[0] for x in range(3)] == [0, 255, 255]

    wide = Image.fromarray(np.array([[0, 65535]], np.int32))
    assert [decode_image(encoded(wide, "TIFF")).getpixel((x, 0))[0] for x in range(2)] == [0, 255]
    with pytest.raises(ImageError, match="integer values from -1 to 70000"):
        decode_image(encoded(Image.fromarray(np.array([[-1, 70000]], np.int32)), "TIFF"))


def test_float_grey() -> None:
    unit = Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32))
    assert [decode_image(encoded(unit, "TIFF")).getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]
    for bad in (1.5, math.nan, -0.1):
        with pytest.raises(ImageError, match="float values"):
            decode_image(encoded(Image.fromarray(np.array([[0.0, bad]], np.float32)), "TIFF"))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_counts(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    options = {"lossless": True} if kind == "WEBP" else {}
    file = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert decode_image(file).getpixel((4, 4)) == RED


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "PPM", "WEBP", "JPEG2000"])
@pytest.mark.parametrize("share", [0.02, 0.4, 0.95])
def test_truncated_files_are_refused(tmp_path: Path, kind: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    whole = encoded(Image.fromarray(noise), kind).getvalue()
    path = tmp_path / "cut.img"
    path.write_bytes(whole)
    assert decode_image(path).size == (60, 40)
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ImageError, match=r"cut\.img: "):
        decode_image(path)


def test_files_that_are_no_images(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("not a picture, " * 100)
    (tmp_path / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    for name, reason in {
        "empty.png": "empty",
        "text.jpg": "not an image",
        "script.png": "not an image",  # PostScript is a program: Pillow would start Ghostscript
        "missing.png": "no such file",
        ".": "a folder",
    }.items():
        with pytest.raises(ImageError, match=reason):
            decode_image(tmp_path / name)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_refused_by_their_header() -> None:
    for side in (14000, 30000, 2**31 - 1):
        header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
        data = b"IDAT" + zlib.compress(bytes(1000))
        png += struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))
        with pytest.raises(ImageError, match="pixels"):
            decode_image(io.BytesIO(png))


def test_the_limit_does_not_depend_on_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    monkeypatch.setattr(module, "MAX_PIXELS", 599)
    with pytest.raises(ImageError, match="30 x 20 pixels, more than 599"):
        decode_image(encoded(corners()))


def test_one_channel() -> None:
    grey = decode_image(encoded(corners()), channels=1)
    assert grey.mode == "L"
    assert [grey.getpixel(at) for at in ((0, 0), (29, 0), (0, 19), (29, 19))] == [76, 150, 29, 255]
    assert load_image(encoded(corners()), size=32, mean=[0.5], std=[0.25]).shape == (1, 32, 32)
    with pytest.raises(ValueError, match="1 or 3"):
        decode_image(encoded(corners()), channels=4)


def by_hand(image: Image.Image, size: int) -> np.ndarray:
    """The same rule with the filter written out: triangle of width max(scale, 1), in floating point."""

    def weights(source: int, target: int) -> np.ndarray:
        scale = source / target
        reach = max(scale, 1.0)
        centres = (np.arange(target)[:, None] + 0.5) * scale
        triangle = np.maximum(0, 1 - np.abs((np.arange(source) + 0.5 - centres) / reach))
        return triangle / triangle.sum(1, keepdims=True)

    short = size * 8 // 7
    width, height = image.size
    new_w, new_h = (short, short * height // width) if width <= height else (short * width // height, short)
    pixels = np.asarray(image, np.float64)
    pixels = np.einsum("yh,hwc->ywc", weights(height, new_h), pixels)
    pixels = np.einsum("xw,ywc->yxc", weights(width, new_w), pixels)
    top, left = round((new_h - size) / 2), round((new_w - size) / 2)
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize("shape", [(451, 300), (300, 451), (256, 256), (100, 130), (257, 259)])
def test_preprocess_is_resize_256_crop_224(shape: tuple[int, int]) -> None:
    photo = decode_image(sample_photo()).resize(shape)
    array = preprocess(photo, size=224, mean=MEAN, std=STD)
    assert (array.shape, array.dtype, array.flags.c_contiguous) == ((3, 224, 224), np.float32, True)
    pixels = (array.transpose(1, 2, 0) * np.array(STD) + np.array(MEAN)) * 255
    np.testing.assert_allclose(pixels, np.rint(pixels), atol=1e-3)  # 8-bit values, as the recipe's
    assert np.abs(pixels - by_hand(photo, 224)).max() < 1.01  # Pillow rounds after each of its two passes


def test_preprocess_normalises_per_channel() -> None:
    array = preprocess(Image.new("RGB", (50, 50), (255, 0, 51)), size=32, mean=MEAN, std=STD)
    expected = [(1 - MEAN[0]) / STD[0], (0 - MEAN[1]) / STD[1], (0.2 - MEAN[2]) / STD[2]]
    np.testing.assert_allclose(array.reshape(3, -1).T, np.tile(expected, (32 * 32, 1)), rtol=1e-6)


def test_preprocess_sees_the_centre() -> None:
    image = Image.new("RGB", (700, 100), RED)
    image.paste(GREEN, (300, 0, 400, 100))
    array = preprocess(image, size=64, mean=(0, 0, 0), std=(1, 1, 1))
    np.testing.assert_array_equal(array[1], 1)
    np.testing.assert_array_equal(array[0], 0)


@pytest.mark.parametrize("size", [(1, 1), (2, 90000), (90000, 2), (3, 5000)])
def test_extreme_shapes_stay_small(size: tuple[int, int]) -> None:
    array = preprocess(Image.new("RGB", size, WHITE), size=64, mean=(0, 0, 0), std=(1, 1, 1))
    assert array.shape == (3, 64, 64)
    np.testing.assert_array_equal(array, 1)


def test_preprocess_with_another_crop() -> None:
    image = Image.new("L", (64, 64))
    image.paste(255, (8, 8, 56, 56))
    whole = preprocess(image, size=64, mean=[0], std=[1], crop_fraction=1)[0]
    assert np.array_equal(whole, np.asarray(image) / np.float32(255))
    middle = preprocess(image, size=48, mean=[0], std=[1], crop_fraction=0.75)[0]
    assert (middle == 1).all()


def test_preprocess_says_what_does_not_fit() -> None:
    for fraction in (0, 1.1, float("nan")):
        with pytest.raises(ValueError, match="crop_fraction: expected a number"):
            preprocess(corners(), size=32, mean=MEAN, std=STD, crop_fraction=fraction)
    with pytest.raises(ValueError, match="mode 'L' does not fit 3"):
        preprocess(Image.new("L", (9, 9)), mean=MEAN, std=STD)
    with pytest.raises(ValueError, match="equally many"):
        preprocess(corners(), mean=MEAN, std=(1.0,))
    with pytest.raises(ValueError, match="at least 1"):
        preprocess(corners(), size=0, mean=MEAN, std=STD)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    names = ["b.JPG", "a.png", "notes.txt", ".hidden.png", "deep/er/c.webp", ".cache/d.png", "odd[1].png"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "void").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["."], ["./a.png", "./b.JPG", "./deep/er/c.webp", "./odd[1].png"]),
        (["deep", "a.png"], ["deep/er/c.webp", "a.png"]),
        (["*.txt"], ["notes.txt"]),
        (["?.*"], ["a.png", "b.JPG"]),
        (["d*"], ["deep/er/c.webp"]),
        (["**/*.webp"], ["deep/er/c.webp"]),
        (["odd[1].png"], ["odd[1].png"]),
        (["missing.png"], ["missing.png"]),  # named: the decoder says that it is not there
    ],
)
def test_files_folders_and_patterns(tree: Path, arguments: list[str], found: list[str]) -> None:
    assert list(find_images(arguments)) == [(name, None) for name in found]


def test_nothing_found_is_told(tree: Path) -> None:
    problems = [(name, problem) for name, problem in find_images(["void", "*.bmp"])]
    assert [name for name, _ in problems] == ["void", "*.bmp"]
    assert all(problem for _, problem in problems)
    assert "no image in this folder" in str(problems[0][1])
    assert "no file matches" in str(problems[1][1])


def test_an_unreadable_subfolder_is_told(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: object) -> object:
        if str(path).endswith("er"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", denied)
    assert list(find_images(["deep"])) == [("deep/er", "deep/er: Permission denied")]


def test_the_photo_of_the_package() -> None:
    assert sample_photo().stat().st_size < 60_000
    assert "CC0" in sample_photo().with_suffix(".txt").read_text()
    assert decode_image(sample_photo()).size == (451, 300)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")
def test_random_bytes_never_escape_as_another_error() -> None:
    rng = np.random.default_rng(7)
    photo = decode_image(sample_photo()).resize((24, 16))
    outcomes = set()
    for kind, _ in itertools.product(("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"), range(25)):
        data = np.frombuffer(encoded(photo, kind).getvalue(), np.uint8).copy()
        hit = rng.integers(0, min(len(data), 80), 4)
        data[hit] = rng.integers(0, 256, 4)
        try:
            outcomes.add(decode_image(io.BytesIO(data.tobytes())).mode)
        except ImageError:
            outcomes.add("refused")
    assert outcomes == {"RGB", "refused"}
