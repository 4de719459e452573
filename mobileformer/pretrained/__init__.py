"""Weights that come with the package, and a few images they have never been trained on. Needs Pillow, not torch.

52m-fashion-mnist.safetensors   Mobile-Former 52M, one channel, ten classes, values in half precision
fashion-mnist-test.png          the first twelve images of the test set, whatever the network makes of them
"""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path

from PIL import Image

__all__ = ["sample_images", "shipped_weights"]

_SIDE = 28
# The test set's own labels, in the classes' names.
_SHOWN = (
    "Ankle boot", "Pullover", "Trouser", "Trouser", "Shirt", "Trouser", "Coat", "Shirt", "Sandal", "Sneaker", "Coat",
    "Sandal",
)  # fmt: skip


def shipped_weights() -> Path:
    """Path of the weights in the package: 52m for Fashion-MNIST, trained by its `fashion-mnist` recipe."""
    with as_file(files(__name__).joinpath("52m-fashion-mnist.safetensors")) as path:
        return path


def sample_images() -> list[tuple[Image.Image, str]]:
    """Twelve grey 28 x 28 images of Fashion-MNIST's test set, each with the name of what it shows."""
    with as_file(files(__name__).joinpath("fashion-mnist-test.png")) as path, Image.open(path) as strip:
        strip.load()
        return [(strip.crop((_SIDE * index, 0, _SIDE * (index + 1), _SIDE)), name) for index, name in enumerate(_SHOWN)]
