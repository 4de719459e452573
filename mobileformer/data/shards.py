"""Webdataset shards: tar files in which 0001.jpg (or jpeg, png, webp) and 0001.cls, a number as text, are a sample.

Shards are read from the front, which is what disks and networks do best, so there are no positions to permute.
Training draws shards with replacement and shuffles the samples in a buffer; an epoch is a number of samples. Evaluation
reads every sample once.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import random
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from mobileformer.data.base import DataError, Split, check_channels
from mobileformer.data.folder import SPLIT_FOLDERS, find_split
from mobileformer.data.image import ImageError, decode_image
from mobileformer.files.reading import is_regular, open_regular, read_regular

__all__ = ["Encoded", "ShardSource", "find_shards"]

IMAGES = ("jpg", "jpeg", "png", "webp")
LABEL = "cls"
MOST_CLASSES = 100_000  # that labels alone may ask for
LABEL_BYTES = 64  # a label's text is shorter
META = r"__[^/]*__($|/)"  # names that webdataset keeps for itself
CLASSES_FILE = "classes.txt"
CLASSES_BYTES = 2**26
BUFFER = 1000  # samples, encoded, that a stream shuffles among: some 0.1 GB of ImageNet's
DAMAGES = (tarfile.TarError, EOFError, OSError, zlib.error)


@dataclass(frozen=True, slots=True)
class Encoded:
    """A sample as it lies in a shard: its name, the image's bytes, the label's text; None: not there."""

    name: str
    image: bytes | None
    label: bytes | None


class ShardSource:
    """One split of a set of shards. It has no `__getitem__`: `training_batches` and `evaluation_batches` know that.

    Which split a shard belongs to says a word in its name, or else the name of its folder: train-0000.tar,
    imagenet-validation-00.tar, val/0000.tar.

    classes: names of the classes; None takes the lines of a file classes.txt beside the shards (or one folder up),
    or else "0", "1", ... up to the largest label in the shards of both splits. channels: 3 unless given. samples:
    length of a training epoch; None takes the number in the shards. To count, or to find the largest label, every
    shard is read once from header to header.

    Raises:
        DataError: no shard for the split, one that is missing or damaged, a label outside the classes.
        ImportError: webdataset is not installed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        split: Split,
        *,
        channels: int | None = None,
        classes: Sequence[str] | None = None,
        samples: int | None = None,
    ) -> None:
        _webdataset()
        shards = find_shards(path)
        splits = {shard: _split_of(shard) for shard in shards}
        wanted = "test" if split == "val" and "val" not in splits.values() else split
        self.shards: tuple[Path, ...] = tuple(shard for shard in shards if splits[shard] == wanted)
        if not self.shards:
            raise DataError(
                f"{os.fspath(path)}: none of {len(shards)} shards is for {split}: expected it in their names, or in "
                f"their folder's, e.g. {split}-0000.tar or {split}/0000.tar"
            )
        if samples is not None and samples < 1:
            raise ValueError(f"samples: expected at least 1, got {samples}")
        first, *rest = self.shards
        self.name = f"{first} and {len(rest)} more" if rest else str(first)
        self.channels = check_channels(channels) or 3
        self._samples = samples
        self._scans: dict[Path, tuple[int, int]] = {}
        if classes is None:
            classes = _read_classes(first)
        self._named = classes is not None
        if classes is None:
            largest = max(self._scan(shard)[1] for shard in shards if splits[shard] is not None)
            classes = [str(label) for label in range(largest + 1)]
        if not classes:
            raise DataError(f"{os.fspath(path)}: no class: neither {CLASSES_FILE} nor a label in the shards")
        self.classes = tuple(classes)

    def __len__(self) -> int:
        return self._samples or sum(self.lengths)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Samples of each shard."""
        return tuple(self._scan(shard)[0] for shard in self.shards)

    def stream(self, seed: tuple[int, ...]) -> Iterator[Encoded]:
        """Samples without end for training: shards with replacement, shuffled in a buffer. Decided by `seed` alone."""
        wds = _webdataset()
        first, second = map(int, np.random.SeedSequence(seed).generate_state(2))
        urls = [str(shard) for shard in self.shards]
        pipeline = wds.DataPipeline(
            wds.ResampledShards(urls, seed=first, worker_seed=lambda: 0, deterministic=True),
            _read_shards,
            wds.shuffle(BUFFER, rng=random.Random(second)),
        )
        return iter(pipeline)

    def once(self, number: int) -> Iterator[Encoded]:
        """Every sample of the shard of this number, as they lie."""
        return _read_shards([{"url": str(self.shards[number])}])

    def _scan(self, shard: Path) -> tuple[int, int]:
        if shard not in self._scans:
            self._scans[shard] = _count(shard, bounded=not self._named)
        return self._scans[shard]

    def digest(self) -> str:
        """Of the shards' names and sizes."""
        told = "\n".join(f"{shard.name} {shard.stat().st_size}" for shard in self.shards)
        return hashlib.sha256(os.fsencode(told)).hexdigest()

    def decode(self, sample: Encoded) -> tuple[Image.Image, int]:
        """The image and its label. Raises ImageError where one of them is missing or cannot be read."""
        if sample.image is None:
            raise ImageError(f"{sample.name}: no image beside it (looked for {' '.join(IMAGES)})")
        label = _number(sample)
        if not 0 <= label < len(self.classes):
            raise DataError(f"{sample.name}: label {label}, expected 0 to {len(self.classes) - 1}: so many classes")
        try:
            return decode_image(io.BytesIO(sample.image), channels=self.channels), label
        except ImageError as error:
            raise ImageError(f"{sample.name}: {error}") from error


def find_shards(path: str | os.PathLike[str]) -> list[Path]:
    """The shards that a pattern (`{0000..0146}`, `{train,val}`), a file, or a folder and those of its splits hold.

    Raises DataError where a pattern names a file that is not there. An empty list: `path` is nothing of the kind.
    """
    text = os.fspath(path)
    if "{" in text and not os.path.exists(text):
        _webdataset()
        from braceexpand import braceexpand  # which webdataset brings

        shards = [Path(name) for name in braceexpand(text)]
        missing = [str(shard) for shard in shards if not is_regular(shard)]
        if missing:
            raise DataError(f"{text}: {len(missing)} of {len(shards)} shards are missing, the first is {missing[0]}")
        return shards
    root = Path(path)
    if root.is_file():
        return [root] if root.suffix == ".tar" else []
    folders = [root, *filter(None, (_split_folder(root, name) for name in SPLIT_FOLDERS))]
    return [shard for folder in folders for shard in sorted(folder.glob("*.tar")) if is_regular(shard)]


def _split_folder(root: Path, split: Split) -> Path | None:
    folder = find_split(root, split) if root.is_dir() else None
    return None if folder is None or (split == "val" and folder == find_split(root, "test")) else folder


def _webdataset() -> Any:
    try:
        import webdataset
    except ImportError as error:
        raise ImportError(
            "webdataset is not installed, which reads shards: pip install 'mobileformer[shards]'"
        ) from error
    return webdataset


def _split_of(shard: Path) -> Split | None:
    for words in (re.split("[^a-z]+", shard.name.lower()), [shard.parent.name.lower()]):
        found: list[Split] = [split for split, names in SPLIT_FOLDERS.items() if set(words) & set(names)]
        if len(found) == 1:
            return found[0]
    return None


def _read_classes(shard: Path) -> list[str] | None:
    for folder in (shard.parent, shard.parent.parent):
        file = folder / CLASSES_FILE
        if file.exists():
            try:  # utf-8-sig: without the mark that some editors put first
                lines = read_regular(file, CLASSES_BYTES).decode("utf-8-sig").splitlines()
            except (OSError, ValueError) as error:
                raise DataError(f"{file}: cannot be read: {error}") from error
            return [line.strip() for line in lines if line.strip()]
    return None


def _read_shards(shards: Iterable[dict[str, str]]) -> Iterator[Encoded]:
    """A stage of a webdataset pipeline: shards -> their samples."""
    from webdataset.tariterators import group_by_keys

    for shard in shards:
        path = shard["url"]
        try:
            with open_regular(path) as stream:
                for sample in group_by_keys(_members(path, stream)):
                    image = next((sample[suffix] for suffix in IMAGES if suffix in sample), None)
                    yield Encoded(f"{path}: {sample['__key__']}", image, sample.get(LABEL))
        except (*DAMAGES, ValueError) as error:  # the last: two files of one name in a sample
            raise DataError(f"{path}: cannot be read, cut off or damaged: {error.args[0]}") from error


def _members(path: str, stream: BinaryIO) -> Iterator[dict[str, Any]]:
    """Name and bytes of every file in the archive that is not webdataset's own."""
    with tarfile.open(fileobj=_whole(stream), mode="r:") as archive:
        size = os.fstat(stream.fileno()).st_size
        for member in archive:
            setattr(archive, "members", [])  # noqa: B010 - else it remembers every header; typeshed does not know it
            if not member.isreg() or re.match(META, member.name):
                continue
            if member.size > size:  # a sparse member may claim any number of zeros
                raise tarfile.ReadError(f"{member.name}: {member.size} bytes in an archive of {size}")
            content = archive.extractfile(member)
            assert content is not None  # a regular file has one
            label = member.name.lower().endswith(f".{LABEL}")
            data = content.read(LABEL_BYTES if label else member.size)
            yield {"fname": member.name, "data": data, "__url__": path}


def _whole(stream: BinaryIO) -> BinaryIO:
    """The stream; or tarfile.ReadError, where it does not end as an archive: tarfile takes a cut one for whole."""
    size = stream.seek(0, os.SEEK_END)
    stream.seek(max(0, size - tarfile.BLOCKSIZE))
    if stream.read() != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("no block of zeros at its end")
    stream.seek(0)
    return stream


def _count(shard: Path, *, bounded: bool) -> tuple[int, int]:
    """Samples, and the largest label or -1, from header to header without reading the images."""
    from webdataset.tariterators import base_plus_ext

    samples, largest, last = 0, -1, None
    try:
        with open_regular(shard) as stream, tarfile.open(fileobj=_whole(stream), mode="r:") as archive:
            for member in archive:
                key, suffix = base_plus_ext(member.name)
                if not member.isreg() or key is None or suffix is None or re.match(META, member.name):
                    continue
                samples += key != last
                last = key
                if suffix.lower() == LABEL:
                    content = archive.extractfile(member)
                    assert content is not None  # a regular file has one
                    with contextlib.suppress(ImageError):  # counted where it is read
                        label = _number(Encoded(f"{shard}: {key}", None, content.read(LABEL_BYTES)))
                        if bounded and label >= MOST_CLASSES:
                            raise DataError(
                                f"{shard}: {key}: label {label}, expected less than {MOST_CLASSES}: names of more "
                                f"classes stand in {CLASSES_FILE}"
                            )
                        largest = max(largest, label)
    except DAMAGES as error:
        raise DataError(f"{shard}: cannot be read, cut off or damaged: {error}") from error
    return samples, largest


def _number(sample: Encoded) -> int:
    if sample.label is None:
        raise ImageError(f"{sample.name}: no label beside it (looked for .{LABEL})")
    try:
        return int(sample.label)
    except ValueError:
        raise ImageError(f"{sample.name}: label {sample.label[:20]!r} is not a number") from None
