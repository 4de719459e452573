"""Throws damaged files at the reader of folded networks: it may say WeightsError, and nothing else.

    python tests/fuzz_folded_file.py [SECONDS]

With atheris installed, libFuzzer picks what to damage further, by what the reader did with it; otherwise a seeded loop
damages whole files.
Exit code 0 when the time is over, 1 with the bytes' place when the reader let anything else out.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np

try:
    import atheris
except ImportError:
    atheris = None

with nullcontext() if atheris is None else atheris.instrument_imports(include=["mobileformer"]):
    from mobileformer.files.metadata import Metadata, WeightsError, encode
    from mobileformer.files.safetensors import read_safetensors
    from mobileformer.inference.folded import FORMAT, FoldedNetwork, array_shapes

FOLDER = Path(tempfile.mkdtemp(prefix="fuzz", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
WORDS = [
    b"-1",
    b"0",
    b"4",
    b"1e9",
    b"null",
    b"true",
    b'""',
    b"[]",
    b"{}",
    b"NaN",
    b"18446744073709551616",
    b"F16",
    b"I8",
    b"I16",
    b"\xff",
]


def seeds() -> Iterator[bytes]:
    """Whole files: a few arrays, and networks without their zeros, one of floats and one with integers."""
    rows = {
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "F32", "shape": [], "data_offsets": [24, 28]},
        "c": {"dtype": "F32", "shape": [0, 7], "data_offsets": [28, 28]},
        "d": {"dtype": "I8", "shape": [3], "data_offsets": [28, 31]},
        "e": {"dtype": "I16", "shape": [1, 2], "data_offsets": [31, 35]},
    }
    yield pack(rows, bytes(35))
    metadata = Metadata("26m", 1, 3, labels=("cat",), mean=(0.5,) * 3, std=(0.5,) * 3)
    yield pack(network_rows(metadata, {}), b"")
    yield pack(network_rows(metadata, INTEGERS), np.ones(SCALES, "<f4").tobytes())


def network_rows(metadata: Metadata, integers: dict[str, str]) -> dict:
    """The header of a network, whose scales come first."""
    shapes = array_shapes(metadata)
    scales = {f"{name}.scale": shapes[name][:1] for name in integers}
    rows, at = {"__metadata__": encode(metadata, form=FORMAT, version=2 if integers else 1)}, 0
    for name, shape in {**scales, **shapes}.items():
        dtype = integers.get(name, "F32")
        size = ITEM[dtype] * int(np.prod(shape))
        rows[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    return rows


def pack(rows: dict, content: bytes) -> bytes:
    text = json.dumps(rows, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text + content


def damage(content: bytes, chance: random.Random) -> bytes:
    """A few bytes changed, words put in, stretches cut out or doubled, the length of the header kept true or not."""
    begin = 8 + int.from_bytes(content[:8], "little")
    head, rest = bytearray(content[8:begin]), content[begin:]
    for _ in range(chance.choice((1, 1, 2, 5))):
        at = chance.randrange(len(head) + 1)
        end = min(len(head), at + chance.choice((1, 2, 8, 60)))
        kind = chance.randrange(6)
        if kind == 0 and at < len(head):
            head[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            head[at:end] = b""
        elif kind == 2:
            head[at:at] = head[at:end]
        elif kind == 3:
            head[at:end] = chance.choice(WORDS)
        elif kind == 4:
            digits = [i for i, byte in enumerate(head) if 48 <= byte <= 57]
            if digits:
                head[chance.choice(digits)] = 48 + chance.randrange(10)
        elif rest:
            rest = rest[: chance.randrange(len(rest) + 1)] + chance.randbytes(chance.choice((0, 0, 4)))
    length = len(head) if chance.random() < 0.9 else chance.choice((0, 1, len(head) + 1, 2**31, 2**63, 2**64 - 1))
    return struct.pack("<Q", length) + bytes(head) + rest


def attempt(content: bytes) -> bool:
    """Whether the file was taken. What comes out must then be what was promised; any other error goes through."""
    path = FOLDER / "file"
    path.write_bytes(content)
    length = int.from_bytes(content[:8], "little")
    if b"__metadata__" in content and length < len(content):  # the network's zeros, which take no place on a disk
        os.truncate(path, 8 + length + (TOTAL_OF_INTEGERS if b'"I16"' in content else TOTAL))
    try:
        for name, array in read_safetensors(path)[0].items():
            assert isinstance(name, str)
            assert array.dtype in (np.float32, np.int8, np.int16)
            assert array.flags.aligned
            float(array.sum())
        network = FoldedNetwork.load(path)
        assert all(np.isfinite(array).all() for array in network.arrays.values())
    except WeightsError as error:
        told = str(error)
    else:
        return True
    assert told.startswith(str(path)), told
    assert len(told) < 100_000
    return False


def total(integers: dict[str, str]) -> int:
    rows = network_rows(Metadata("26m", 1, 3), integers)
    return max(row["data_offsets"][1] for name, row in rows.items() if name != "__metadata__")


ITEM = {"F32": 4, "I8": 1, "I16": 2}
INTEGERS = {"blocks.0.project.weight": "I8", "blocks.1.project.weight": "I16"}  # of 12 channels each
SCALES = 24
TOTAL, TOTAL_OF_INTEGERS = total({}), total(INTEGERS)


def fuzz_with_loop(seconds: float) -> None:
    chance, known, taken, tried = random.Random(0), list(seeds()), 0, 0
    for content in known[1:]:
        assert attempt(content), "the fuzzer's own network is refused: it would see nothing"
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        content = damage(chance.choice(known), chance)
        try:
            taken += attempt(content)
        except BaseException:
            kept = Path(tempfile.gettempdir(), "fuzz_folded_file.found")
            kept.write_bytes(content)
            print(f"the file is kept as {kept}", file=sys.stderr)
            raise
        tried += 1
    print(f"{tried} files, {taken} of them whole")


def fuzz_with_atheris(seconds: float) -> None:
    """In a process of its own, which libFuzzer ends when it is done."""
    corpus = FOLDER / "corpus"
    corpus.mkdir()
    for index, content in enumerate(seeds()):
        (corpus / str(index)).write_bytes(content)

    def mutate(content: bytes, max_size: int, seed: int) -> bytes:
        return damage(content, random.Random(seed))[:max_size]

    child = os.fork()
    if child == 0:
        limits = [f"-max_total_time={int(seconds)}", "-max_len=65536", f"-artifact_prefix={tempfile.gettempdir()}/"]
        arguments = [sys.argv[0], *limits, str(corpus)]
        atheris.Setup(arguments, lambda content: attempt(content) and None, custom_mutator=mutate)
        atheris.Fuzz()
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status != 0:
        sys.exit(status)


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    try:
        (fuzz_with_loop if atheris is None else fuzz_with_atheris)(seconds)
    finally:
        shutil.rmtree(FOLDER, ignore_errors=True)


if __name__ == "__main__":
    main()
