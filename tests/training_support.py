"""Small data sets and recipes for the tests of training."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mobileformer.training import Recipe

# Small enough that an update takes 50 ms on one core.
TINY: dict[str, Any] = {
    "variant": "26m", "epochs": 2, "warmup_epochs": 0, "cooldown_epochs": 0, "schedule": "step", "global_batch": 8,
    "micro_batch": 4, "learning_rate": 1e-3, "weight_decay": 0.05, "clip_norm": 1.0, "mixup": 0.2, "dropout": 0.1,
    "sizes": [[0, 32]], "crop": "shift", "shift": 2, "interpolation": "bilinear", "erase": 0.5, "mean": [0.3],
    "std": [0.3], "crop_fraction": 1.0, "seed": 3,
}  # fmt: skip


def tiny(**values: Any) -> Recipe:
    return Recipe(**{**TINY, **values})


def smaller(**values: Any) -> Recipe:
    """Of the network that only a process inside `tiny_support.tiny_variants` knows: a run takes a third."""
    return tiny(**{"variant": "tiny", **values})


class Blobs:
    """Three classes of grey images that a network can tell apart: where the bright square is."""

    classes = ("left", "middle", "right")
    channels = 1

    def __init__(self, images: int = 32, seed: int = 0) -> None:
        self.pixels = blobs(images, seed)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]), index % 3


def blobs(images: int, seed: int) -> np.ndarray:
    """(images, 28, 28) uint8; the class of image i is i % 3."""
    pixels = np.random.default_rng(seed).integers(0, 60, (images, 28, 28), dtype=np.uint8)
    for index in range(images):
        column = 2 + 9 * (index % 3)
        pixels[index, 10:18, column : column + 6] += 180
    return pixels


def write_idx(folder: Path, images: int = 32) -> Path:
    """The same blobs as the four files that MNIST comes in, 32 training images and 12 others."""
    folder.mkdir(exist_ok=True)
    for name, count, seed in (("train", images, 0), ("t10k", 12, 1)):
        pixels, labels = blobs(count, seed), np.arange(count, dtype=np.uint8) % 3
        shape = struct.pack(">4I", 0x803, count, 28, 28)
        (folder / f"{name}-images-idx3-ubyte").write_bytes(shape + pixels.tobytes())
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, count) + labels.tobytes())
    return folder
