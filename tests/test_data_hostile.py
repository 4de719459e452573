"""Data sets as people have them and as nobody should: names of splits, links, FIFOs, files that promise too much."""

from __future__ import annotations

import gzip
import os
import re
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_support import encoded, idx, picture, write_folder, write_idx, write_shard
from PIL import Image

from mobileformer.data import DataError, ImageError, decode_image, find_images, open_source


def moved(root: Path, **names: str) -> Path:
    for old, new in names.items():
        (root / old).rename(root / new)
    return root


def opened(*arguments: Any, **more: Any) -> Any:
    return open_source(*arguments, **more)


def peak(call: Callable[[], None]) -> int:
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# Which folder is which split


@pytest.mark.parametrize("name", ["valid", "Valid", "validation", "VAL"])
def test_validation_comes_before_test(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path / "a")
    write_folder(tmp_path / "b", each=2)
    moved(tmp_path / "a", val=name)
    (tmp_path / "b" / "val").rename(tmp_path / "a" / "Test")
    validation, test = (opened(tmp_path / "a", split) for split in ("val", "test"))
    assert (len(validation), validation.name) == (6, str(tmp_path / "a" / name))
    assert (len(test), test.name) == (4, str(tmp_path / "a" / "Test"))


def test_two_folders_of_one_split_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "valid").mkdir()
    with pytest.raises(DataError, match="several folders for val, keep one: val, valid"):
        opened(tmp_path, "val")


@pytest.mark.parametrize("layout", ["set-{}-0.tar", "{}/0.tar", "{}/set-0.tar"])
@pytest.mark.parametrize("word", ["valid", "val", "Validation"])
def test_shards_keep_validation_and_test_apart(tmp_path: Path, layout: str, word: str) -> None:
    pytest.importorskip("webdataset")
    for split, count in (("train", 3), (word, 2), ("test", 1)):
        members: dict[str, bytes] = {}
        for number in range(count):
            members |= {f"{number}.png": encoded(picture(number)), f"{number}.cls": b"1"}
        write_shard(tmp_path / layout.format(split), members)
    assert [len(opened(tmp_path, split)) for split in ("train", "val", "test")] == [3, 2, 1]


def test_folders_of_classes_alone_are_split_the_same_way_at_every_call(tmp_path: Path) -> None:
    write_folder(tmp_path, each=10)
    root = tmp_path / "train"
    training, validation, whole = (opened(root, split) for split in ("train", "val", "all"))
    assert (len(training), len(validation), len(whole)) == (16, 4, 20)

    def shown(source: Any) -> list[tuple[int, int]]:
        return [(source[index][0].getpixel((0, 0))[0], source[index][1]) for index in range(len(source))]

    assert sorted(shown(training) + shown(validation)) == sorted(shown(whole))
    assert shown(opened(root, "val")) == shown(validation)
    assert [label for _, label in shown(validation)] == [0, 0, 1, 1]
    assert "a fifth of each class" in validation.name
    with pytest.raises(DataError, match="no folder for test"):
        opened(root, "test")
    for number in range(1, 10):
        (root / "cat" / f"{number}.png").unlink()
    with pytest.raises(DataError, match="cat: 1 image in this class, a split into training and validation needs 2"):
        opened(root, "train")


def test_part_of_the_classes(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "train" / "cow").mkdir()
    (tmp_path / "val" / "owl").mkdir()
    source = opened(tmp_path, "val", partial=True)
    assert source.classes == ("cat", "cow", "dog", "owl")
    assert source.present == {"cat", "dog"}
    assert [source[index][1] for index in range(6)] == [0, 0, 0, 2, 2, 2]


# Links


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    write_folder(tmp_path / "data", classes=("cat",))
    outside = tmp_path / "outside" / "deep"
    outside.mkdir(parents=True)
    for number in range(5):
        picture(100 + number).save(outside / f"{number}.png")
    here = tmp_path / "data" / "train" / "cat"
    (here / "more").symlink_to(tmp_path / "outside")
    assert len(opened(tmp_path / "data", "train")) == 8
    assert len(list(find_images([here]))) == 8
    (here / "again").symlink_to(outside)
    assert len(opened(tmp_path / "data", "train")) == 8
    (outside / "back").symlink_to(here)
    with pytest.raises(DataError, match=r"back: a link that leads back to a folder it lies in$"):
        opened(tmp_path / "data", "train")
    assert any("leads back" in (problem or "") for _, problem in find_images([here]))


@pytest.mark.parametrize("place", ["train/owl", "train/cat/more"])
def test_links_that_lead_nowhere_are_told(tmp_path: Path, place: str) -> None:
    write_folder(tmp_path)
    (tmp_path / place).symlink_to(tmp_path / "unmounted")
    with pytest.raises(DataError, match=f"{place}: a link that leads nowhere"):
        opened(tmp_path, "train")


# Files that are none


def test_a_fifo_or_a_device_is_a_broken_image(tmp_path: Path) -> None:
    write_folder(tmp_path, classes=("cat",))
    os.mkfifo(tmp_path / "train" / "cat" / "x.jpg")
    (tmp_path / "train" / "cat" / "z.png").symlink_to("/dev/zero")
    source = opened(tmp_path, "train")
    assert len(source) == 5
    with pytest.raises(ImageError, match=r"x\.jpg: expected a regular file, got a FIFO"):
        source[3]
    with pytest.raises(ImageError, match=r"z\.png: expected a regular file, got a character device"):
        source[4]


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz", "set-train-0.tar"])
def test_a_fifo_in_place_of_a_data_set_is_refused(tmp_path: Path, name: str) -> None:
    write_idx(tmp_path / "data")
    (tmp_path / "data" / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "data" / name)
    if name.endswith(".tar"):
        assert len(opened(tmp_path / "data", "train")) == 20  # no shard there: the IDX files are read
    else:
        with pytest.raises(DataError, match="are missing"):
            opened(tmp_path / "data", "train")


# Sizes


def test_idx_reads_what_its_head_says_and_no_more(tmp_path: Path) -> None:
    write_idx(tmp_path)
    file = tmp_path / "train-images-idx3-ubyte.gz"
    with gzip.open(file) as unpacked:
        whole = unpacked.read()
    zeros = bytes(2**20)
    with gzip.open(file, "wb", compresslevel=1) as packed:
        packed.write(whole)
        for _ in range(64):
            packed.write(zeros)

    def refused() -> None:
        with pytest.raises(DataError, match=r"more than 720 bytes after the head, expected 20 x 6 x 6 = 720"):
            opened(tmp_path, "train")

    assert peak(refused) < 2**22
    head = (0x803).to_bytes(4, "big") + (20).to_bytes(4, "big") + (2**30).to_bytes(4, "big") * 2
    for content in (head, gzip.compress(head)):
        file.write_bytes(content)
        with pytest.raises(DataError, match="after the head, expected 20 x 1073741824 x 1073741824"):
            opened(tmp_path, "train")


def test_idx_compares_the_heads_before_it_reads(tmp_path: Path) -> None:
    write_idx(tmp_path)
    count = 2**26
    with gzip.open(tmp_path / "train-labels-idx1-ubyte.gz", "wb", compresslevel=1) as packed:
        packed.write(idx(np.zeros(0, np.uint8))[:4] + count.to_bytes(4, "big"))
        for _ in range(64):
            packed.write(bytes(2**20))

    def refused() -> None:
        with pytest.raises(DataError, match=f"20 images, but train-labels.* has {count} labels"):
            opened(tmp_path, "train")

    assert peak(refused) < 2**22


@pytest.mark.parametrize("label", [b"20000000", b"9" * 5000, b"1" + b"0" * 40])
def test_a_label_of_a_shard_takes_no_memory(tmp_path: Path, label: bytes) -> None:
    pytest.importorskip("webdataset")
    image = encoded(picture(1))
    write_shard(tmp_path / "train-0.tar", {"0.png": image, "0.cls": b"1", "1.png": image, "1.cls": label})

    def refused() -> None:
        with pytest.raises(DataError, match=r"train-0\.tar: 1: label \d+, expected less than 100000: .*classes\.txt"):
            opened(tmp_path, "train")

    assert peak(refused) < 2**22


def test_a_shards_member_is_no_larger_than_its_archive(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    shard = write_shard(tmp_path / "train-0.tar", {"0.png": encoded(picture(1)), "0.cls": b"0"})
    with tarfile.open(shard, "a") as archive:  # a sparse file of 2^40 zeros, none of which is there
        member = tarfile.TarInfo("1.png")
        member.pax_headers = {"GNU.sparse.map": "0,0", "GNU.sparse.size": str(2**40), "GNU.sparse.numblocks": "1"}
        archive.addfile(member)
    (tmp_path / "classes.txt").write_text("one\n")
    source = opened(tmp_path, "train")
    with pytest.raises(DataError, match=rf"1\.png: {2**40} bytes in an archive of "):
        list(source.once(0))


def test_the_mark_of_utf8_is_no_part_of_a_class(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    write_shard(tmp_path / "train-0.tar", {"0.png": encoded(picture(1)), "0.cls": b"0"})
    (tmp_path / "classes.txt").write_bytes("\ufeffant\r\nbee\r\n".encode())
    assert opened(tmp_path, "train").classes == ("ant", "bee")
    (tmp_path / "classes.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(DataError, match=re.escape(str(tmp_path / "classes.txt")) + ": cannot be read: 'utf-8' codec"):
        opened(tmp_path, "train")


# Decoding


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF"])
@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1), ("L", 3), ("RGB", 1)])
def test_an_image_is_its_own_when_its_file_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, mode: str, channels: int
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(tmp_path / "x", kind)
    copies: list[str] = []
    convert = Image.Image.convert

    def counted(self: Image.Image, *arguments: object, **more: object) -> Image.Image:
        copies.append(self.mode)
        return convert(self, *arguments, **more)  # type: ignore[arg-type]

    with Image.open(tmp_path / "x") as image:
        wanted = image.convert("RGB").convert({1: "L", 3: "RGB"}[channels])
        stored = image.mode
    monkeypatch.setattr(Image.Image, "convert", counted)
    decoded = decode_image(tmp_path / "x", channels=channels)
    (tmp_path / "x").unlink()
    assert bool(copies) == (stored != decoded.mode)
    decoded.load()
    np.testing.assert_array_equal(np.asarray(decoded), np.asarray(wanted))
    assert decoded.crop((1, 1, 5, 5)).resize((8, 8)).size == (8, 8)
