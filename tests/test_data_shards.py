"""Webdataset shards: found, counted, streamed the same way every time, read once in evaluation, refused by name."""

from __future__ import annotations

import pickle
import re
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from data_support import encoded, picture, write_shard

from mobileformer.data import (
    Batch,
    DataError,
    EvaluationTransform,
    ImageError,
    ShardSource,
    TrainTransform,
    adopt_source,
    evaluation_batches,
    open_source,
    steps_per_epoch,
    training_batches,
)
from mobileformer.data.sources import some_images

pytest.importorskip("webdataset")

TRAINING = TrainTransform(6, [0.0] * 3, [1.0] * 3, crop="shift", shift=1, erase=0.5)
WHOLE = EvaluationTransform(4, [0.0] * 3, [1.0] * 3, crop_fraction=1.0)


def samples(first: int, count: int, kinds: tuple[str, ...] = ("png",)) -> dict[str, bytes]:
    """Sample k shows k, its class is k modulo 4."""
    members = {}
    for k in range(first, first + count):
        kind = kinds[k % len(kinds)]
        members[f"{k:04}.{kind}"] = encoded(picture(k, size=(4, 4)), {"jpg": "JPEG"}.get(kind, kind.upper()))
        members[f"{k:04}.cls"] = str(k % 4).encode()
    return members


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """3 shards of 10, 7 and 13 to train on, 2 of 5 and 3 to validate."""
    for split, counts in (("train", (10, 7, 13)), ("val", (5, 3))):
        first = 0
        for number, count in enumerate(counts):
            write_shard(tmp_path / f"set-{split}-{number:02}.tar", samples(first, count))
            first += count
    return tmp_path


def epoch(source: object, **options: object) -> list[Batch]:
    given = {"batch_size": 3, "slots": 2, "epoch": 0, "seed": 5, **options}
    return list(training_batches(source, TRAINING, **given))  # type: ignore[arg-type]


def equal(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a.x, b.x) and torch.equal(a.y, b.y) and torch.equal(a.index, b.index) and a.broken == b.broken
        for a, b in zip(one, other, strict=True)
    )


# Finding


def test_shards_are_found_in_a_folder_and_by_a_pattern(shards: Path) -> None:
    for path in (shards, f"{shards}/set-{{train,val}}-{{00..01}}.tar"):
        source = open_source(path, "val")
        assert isinstance(source, ShardSource)
        assert [shard.name for shard in source.shards] == ["set-val-00.tar", "set-val-01.tar"]
        assert (len(source), source.lengths, source.channels) == (8, (5, 3), 3)
        assert source.classes == ("0", "1", "2", "3")
    assert len(open_source(shards, "train")) == 30


def test_shards_are_found_in_folders_of_their_split(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        write_shard(tmp_path / split / "0000.tar", samples(0, 4))
    (tmp_path / "classes.txt").write_text("cat\ndog\nfrog\nhorse\n\n")
    for split in ("train", "val"):
        source = open_source(tmp_path, split, channels=1)
        assert (len(source), source.classes, source.channels) == (4, ("cat", "dog", "frog", "horse"), 1)


def test_a_single_shard_is_a_data_set(tmp_path: Path) -> None:
    assert len(open_source(write_shard(tmp_path / "train.tar", samples(0, 2)), "train")) == 2


def test_shards_say_what_is_missing(shards: Path) -> None:
    with pytest.raises(DataError, match=r"2 of 4 shards are missing, the first is .*set-train-03.tar"):
        open_source(f"{shards}/set-train-{{01..04}}.tar", "train")
    for file in shards.glob("*-val-*"):
        file.rename(file.with_name(file.name.replace("val", "part")))
    with pytest.raises(DataError, match="none of 5 shards is for val: expected it in their names"):
        open_source(shards, "val")
    with pytest.raises(ValueError, match="samples: expected at least 1, got 0"):
        ShardSource(shards, "train", samples=0)


def test_shards_without_webdataset_say_what_to_install(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "webdataset", None)
    for path in (shards, f"{shards}/set-train-{{00..01}}.tar"):
        with pytest.raises(ImportError, match=r"pip install 'mobileformer\[shards\]'"):
            open_source(path, "train")


def test_shards_cannot_be_adopted_as_something_else(shards: Path) -> None:
    source = open_source(shards, "train")
    assert adopt_source(source) is source
    with pytest.raises(ValueError, match="shards take them when they are opened"):
        adopt_source(source, channels=1)


# Evaluation


@pytest.mark.parametrize("kinds", [("png",), ("jpg", "jpeg", "webp")])
def test_evaluation_reads_every_sample_once(tmp_path: Path, kinds: tuple[str, ...]) -> None:
    members = samples(0, 9, kinds)
    members = {name.replace("jpeg", "JPEG"): content for name, content in members.items()}
    write_shard(tmp_path / "val-0.tar", {"__meta__/x.txt": b"", "README": b"", **members, "0008.json": b"{}"})
    write_shard(tmp_path / "val-1.tar", samples(9, 2))
    source = open_source(tmp_path, "val")
    assert source.lengths == (9, 2)  # type: ignore[union-attr]
    batches = list(evaluation_batches(source, WHOLE, batch_size=4))
    index = torch.cat([batch.index for batch in batches])
    assert index.tolist() == list(range(11))
    assert torch.equal(torch.cat([batch.y for batch in batches]), index % 4)
    red = torch.cat([batch.x for batch in batches])[:, 0, 0, 0] * 255
    assert (red - index).abs().max() < 4  # JPEG is not exact


def test_evaluation_is_shared_by_shards(shards: Path) -> None:
    source = open_source(shards, "train")
    alone = {int(k) for batch in evaluation_batches(source, WHOLE, batch_size=4) for k in batch.index}
    shared = [
        [int(k) for batch in evaluation_batches(source, WHOLE, batch_size=4, rank=rank, world=4) for k in batch.index]
        for rank in range(4)
    ]
    assert sorted(chain(*shared)) == sorted(alone) == list(range(30))
    assert shared[3] == []


# Training


def test_an_epoch_is_as_long_as_it_is_told(shards: Path) -> None:
    source = ShardSource(shards, "train", samples=1000)
    assert len(source) == 1000
    assert steps_per_epoch(source, batch_size=3, slots=2) == 166
    batches = epoch(source)
    assert len(batches) == 332
    assert torch.cat([batch.index for batch in batches]).tolist() == list(range(996))
    counts = torch.cat([batch.y for batch in batches]).bincount()
    assert len(counts) == 4
    assert (counts > 150).all()


def test_samples_are_shuffled_and_resampled_but_decided(shards: Path) -> None:
    source = ShardSource(shards, "train")
    one = epoch(source)
    assert equal(one, epoch(pickle.loads(pickle.dumps(source))))
    for options in ({"seed": 6}, {"epoch": 1}, {"rank": 1, "world": 2}):
        assert not torch.equal(epoch(source, **options)[0].x, one[0].x)


def test_a_sample_is_augmented_by_its_position(shards: Path) -> None:
    source = ShardSource(shards, "train")
    stream = source.stream((5, 0, 0, 0))
    for batch in epoch(source)[:3]:
        for x, y, index in zip(batch.x, batch.y, batch.index, strict=True):
            image, label = source.decode(next(stream))
            assert label == y
            assert np.array_equal(TRAINING(image, np.random.default_rng((5, 0, int(index)))), x)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_step_has_the_places_of_all_processes(shards: Path, rank: int) -> None:
    source = ShardSource(shards, "train")
    batches = epoch(source, slots=4, batch_size=2, rank=rank, world=2)
    expected = [(t * 4 + s) * 2 + i for t in range(3) for s in (rank, rank + 2) for i in range(2)]
    assert torch.cat([batch.index for batch in batches]).tolist() == expected


@pytest.mark.parametrize("start", [1, 3, 5])
def test_a_restart_goes_on(shards: Path, start: int) -> None:
    source = ShardSource(shards, "train")
    assert equal(epoch(source, start=start), epoch(source)[2 * start :])


def test_a_restart_goes_on_with_workers(shards: Path) -> None:
    source = ShardSource(shards, "train")
    options = {"batch_size": 2, "slots": 3, "workers": 2}
    whole = epoch(source, **options)
    assert torch.cat([batch.index for batch in whole]).tolist() == list(range(30))
    assert equal(epoch(source, start=1, **options), whole[3:])  # an odd number of batches: the workers swap streams
    batches = list(evaluation_batches(source, WHOLE, batch_size=4, workers=2))
    assert sorted(torch.cat([batch.index for batch in batches]).tolist()) == list(range(30))


def test_some_images_of_shards(shards: Path) -> None:
    assert len(list(some_images(ShardSource(shards, "train"), 12))) == 12
    assert len(list(some_images(ShardSource(shards, "val", samples=5), 12))) == 5


# What is broken


def test_broken_samples_are_left_out_and_named(tmp_path: Path) -> None:
    members = samples(0, 6)
    members["0001.png"] = members["0001.png"][:30]
    del members["0002.png"], members["0003.cls"]
    members["0004.cls"] = b"four"
    file = write_shard(tmp_path / "val.tar", members)
    (batch,) = evaluation_batches(open_source(tmp_path, "val"), WHOLE, batch_size=6)
    assert batch.index.tolist() == [0, 5]
    for message, number, what in zip(
        batch.broken,
        range(1, 5),
        ("not an image in a known format", "no image beside it", "no label beside it", "label b'four' is not a number"),
        strict=True,
    ):
        assert message.startswith(f"{file}: {number:04}: ")
        assert what in message


def test_a_label_outside_the_classes_is_no_broken_image(shards: Path) -> None:
    (shards / "classes.txt").write_text("a\nb\n")
    with pytest.raises(DataError, match=r"set-val-00.tar: 0002: label 2, expected 0 to 1"):
        list(evaluation_batches(open_source(shards, "val"), WHOLE, batch_size=4))


def test_a_damaged_shard_is_named(shards: Path) -> None:
    file = shards / "set-train-01.tar"
    content = file.read_bytes()
    (shards / "classes.txt").write_text("a\nb\nc\nd\n")
    for damaged in (content[:1300], content[:600], content[:1024], b"x" * 2000, bytes(100), b""):
        file.write_bytes(damaged)
        source = ShardSource(shards, "train", samples=300)
        message = f"{re.escape(str(file))}: cannot be read, cut off or damaged"
        with pytest.raises(DataError, match=message):
            list(source.once(1))
        with pytest.raises(DataError, match=message):
            epoch(source)
        with pytest.raises(DataError, match=message):
            len(ShardSource(shards, "train"))


def test_decode_of_a_sample_names_it(shards: Path) -> None:
    source = ShardSource(shards, "train")
    sample = next(iter(source.once(0)))
    image, label = source.decode(sample)
    assert (image.mode, image.size, label) == ("RGB", (4, 4), 0)
    with pytest.raises(ImageError, match=re.escape(sample.name)):
        source.decode(type(sample)(sample.name, b"", sample.label))
