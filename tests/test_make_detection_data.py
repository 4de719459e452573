"""`mobileformer make-detection-data`: what is drawn, that the splits share nothing, that OUT appears whole or not."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_support import refusal, run, run_json
from data_support import idx
from PIL import Image

from mobileformer.data import DataError, compose, open_source

COUNTS = {"train": 12, "val": 4, "test": 6}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of one dark grey each; items that are bright rectangles, whose place says which file they are from."""
    root = tmp_path_factory.mktemp("sources")
    (root / "photos" / "deep").mkdir(parents=True)
    for number in range(12):
        name = f"{number}.png" if number % 2 else f"deep/{number}.png"
        Image.new("RGB", (150 + number, 140), (2 * number,) * 3).save(root / "photos" / name)
    (root / "items").mkdir()
    for number, (stem, count) in enumerate((("train", 40), ("t10k", 20))):
        images = np.zeros((count, 28, 28), np.uint8)
        images[:, 4:24, 10:20] = 255
        images[:, 5 + number, 12] = 200
        labels = np.arange(count, dtype=np.uint8) % 10
        for kind, rank, array in (("images", 3, images), ("labels", 1, labels)):
            (root / "items" / f"{stem}-{kind}-idx{rank}-ubyte.gz").write_bytes(gzip.compress(idx(array)))
    return root


def arguments(sources: Path, out: Path, **more: Any) -> list[object]:
    options = {"photos": sources / "photos", "items": sources / "items", **COUNTS, **more}
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return ["make-detection-data", out, *flags]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def made(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("made") / "set"
    return out, run_json(*arguments(sources, out))


def test_the_set_is_one_that_can_be_opened(made: tuple[Path, Any]) -> None:
    out, told = made
    assert told["out"] == str(out)
    grounds: dict[str, set[int]] = {}
    for split, count in COUNTS.items():
        source: Any = open_source(out, split)  # type: ignore[arg-type]
        assert (len(source), told["splits"][split]["images"], len(source.classes)) == (count, count, 10)
        assert not source.problems.count
        objects, grounds[split] = 0, set()
        for image, target in (source[index] for index in range(count)):
            assert image.size == (128, 128)
            boxes, labels = target["boxes"], target["labels"]
            assert 1 <= len(boxes) <= 6
            objects += len(boxes)
            sides = boxes[:, 2:] - boxes[:, :2]
            assert (sides.max(1) >= 20).all()
            assert (sides.max(1) <= 56).all()
            assert (abs(sides[:, 1] / sides[:, 0] - 2) < 0.15).all()  # cut to what is drawn: 20 x 10 of 28 x 28
            assert (boxes == boxes.round()).all()
            assert set(labels.tolist()) <= set(range(10))
            grey = np.asarray(image).astype(int)
            outside = np.ones((128, 128), bool)
            for number, (x1, y1, x2, y2) in enumerate(boxes.astype(int)):
                outside[max(0, y1 - 8) : y2 + 8, max(0, x1 - 8) : x2 + 8] = False  # JPEG's blocks
                assert np.median(grey[y1:y2, x1:x2].max(2)) > 0.55 * 255
                for other in boxes[:number].astype(int):
                    low, high = np.maximum((x1, y1), other[:2]), np.minimum((x2, y2), other[2:])
                    smaller = min((x2 - x1) * (y2 - y1), (other[2:] - other[:2]).prod())
                    assert (high - low).clip(0).prod() <= 0.3 * smaller
            grounds[split] |= {round(float(np.median(grey[outside])) / 2)}
        assert told["splits"][split]["objects"] == objects
    assert len(set.union(*grounds.values())) == sum(map(len, grounds.values()))  # no photo is in two splits


def test_the_recipe_says_what_it_was_made_from(made: tuple[Path, Any]) -> None:
    out, told = made
    recipe = json.loads((out / "recipe.json").read_text())
    assert {"out": str(out), **recipe} == told
    assert recipe["seed"] == 0
    photos = [set(recipe["splits"][split]["photos"].values()) for split in COUNTS]
    assert [len(some) for some in photos] == [9, 1, 2]
    assert len(set.union(*photos)) == 12
    assert [recipe["splits"][split]["items"] for split in COUNTS] == [36, 4, 20]
    assert len({recipe["splits"][split]["items_sha256"] for split in COUNTS}) == 3


def test_an_image_depends_on_seed_split_and_number_alone(sources: Path, made: tuple[Path, Any], tmp_path: Path) -> None:
    first = files(made[0])
    run(*arguments(sources, tmp_path / "same", train=5))
    for name, content in files(tmp_path / "same").items():
        assert name in ("train.json", "recipe.json") or content == first[name]
    run(*arguments(sources, tmp_path / "other", seed=1))
    other = files(tmp_path / "other")
    assert sorted(other) == sorted(first)
    assert [name for name in first if other[name] == first[name]] == []


def test_items_of_the_test_file_are_in_test_alone(sources: Path) -> None:
    found = compose.read_items(sources / "items")
    assert [bool((some.images[:, 5, 12] == 200).all()) for some in found.values()] == [True, True, False]
    assert [len(some.labels) for some in found.values()] == [36, 4, 20]


def test_out_is_not_replaced_unless_it_was_made_here(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "set"
    out.mkdir()
    (out / "mine.txt").write_text("dear")
    call = arguments(sources, out)
    assert "exists already; --force replaces it" in run(*call, code=1).stderr
    assert "not made by this command (no recipe.json in it)" in run(*call, "--force", code=1).stderr
    assert files(out) == {"mine.txt": b"dear"}
    (out / "mine.txt").unlink()
    run(*call, "--force")
    before = files(out)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compose, "_note", full)
    for target in (out, tmp_path / "new"):
        assert "No space left" in run(*arguments(sources, target, seed=1), "--force", code=1).stderr
    assert files(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["set"]  # nothing half made is left
    monkeypatch.undo()
    run(*arguments(sources, out, seed=1), "--force")
    assert files(out) != before
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    (tmp_path / "link").symlink_to(out)
    run(*arguments(sources, tmp_path / "link"), "--force")
    assert (tmp_path / "link").is_symlink()
    assert files(out) == before


def test_sources_that_are_not_there(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"items": tmp_path}, "no IDX files here, expected e.g. train-images-idx3-ubyte.gz"),
        ({"photos": tmp_path / "none"}, "none: no such folder, expected photos in it"),
        ({"photos": sources / "items"}, "no image in this folder"),
    ]
    (tmp_path / "few").mkdir()
    for number in range(3):
        Image.new("RGB", (130, 130), (number // 2,) * 3).save(tmp_path / "few" / f"{number}.png")
    cases.append(({"photos": tmp_path / "few"}, "few: 2 different photos, expected at least 3: one for each split"))
    (tmp_path / "small").mkdir()
    Image.new("RGB", (200, 127)).save(tmp_path / "small" / "a.png")
    cases.append(({"photos": tmp_path / "small"}, "a.png: 200 x 127 pixels, expected at least 128 each way"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "b.png").write_text("no")
    cases.append(({"photos": tmp_path / "broken"}, "b.png: not an image in a known format"))
    for more, message in cases:
        assert message in run_json(*arguments(sources, out, **more), code=1)["error"]
    assert "--val" in refusal(*arguments(sources, out, val=0))
    assert "does not exist" in run(*arguments(sources, tmp_path / "a" / "b"), code=1).stderr
    monkeypatch.setattr(compose, "DEBIAN_ITEMS", str(tmp_path / "nowhere"))
    told = run("make-detection-data", out, code=1).stderr
    assert "--items: expected a folder with Fashion-MNIST's four files" in told
    monkeypatch.setattr(compose, "find_spec", lambda name: None)
    told = run(*arguments(sources, out, photos="scikit-image"), code=1).stderr
    assert "scikit-image: not installed, which carries the photos; pip install 'mobileformer[detection]'" in told
    assert not out.exists()


def test_blank_items_are_never_chosen(sources: Path, tmp_path: Path) -> None:
    shutil.copytree(sources / "items", tmp_path / "items")
    images = np.zeros((40, 28, 28), np.uint8)
    images[7, 3:9, 3:9] = 99
    file = tmp_path / "items" / "train-images-idx3-ubyte.gz"
    file.write_bytes(gzip.compress(idx(images)))
    with pytest.raises(DataError, match="no item for val, which needs a pixel above 24"):
        compose.read_items(tmp_path / "items")
    images[38, 3:9, 3:9] = 99
    file.write_bytes(gzip.compress(idx(images)))
    found = compose.read_items(tmp_path / "items")
    assert (found["train"].labels.tolist(), found["val"].labels.tolist()) == ([7], [8])


def test_the_photos_of_scikit_image_are_there_and_apart() -> None:
    pytest.importorskip("skimage")
    names = [name for split in compose.SPLITS for name in compose.PHOTOS[split]]
    assert len(set(names)) == len(names) == 18
    found = compose.read_photos()
    assert {split: tuple(photo.name for photo in photos) for split, photos in found.items()} == compose.PHOTOS
    assert len({photo.digest for photos in found.values() for photo in photos}) == 18
    assert all(photo.pixels.shape[2] == 3 and min(photo.pixels.shape[:2]) >= 128 for p in found.values() for photo in p)
