"""Weights that come with the package, and a few images they have never been trained on. Needs Pillow, not torch.

52m-fashion-mnist.safetensors           Mobile-Former 52M, one channel, ten classes, values in half precision
fashion-mnist-test.png                  the first twelve images of the test set, whatever the network makes of them
26m-retinanet-clothes.safetensors       RetinaNet on 26M, the same classes on photos, values in half precision
clothes-on-photos-test.png, .json       twelve images of its test set, and the boxes that are there
"""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path

from PIL import Image

__all__ = ["sample_images", "shipped_weights"]

_WEIGHTS = {"classification": "52m-fashion-mnist.safetensors", "detection": "26m-retinanet-clothes.safetensors"}
_SIDE = 28
# The test set's own labels, in the classes' names.
_SHOWN = (
    "Ankle boot", "Pullover", "Trouser", "Trouser", "Shirt", "Trouser", "Coat", "Shirt", "Sandal", "Sneaker", "Coat",
    "Sandal",
)  # fmt: skip


def shipped_weights(task: str = "classification") -> Path:
    """Path of the weights in the package for a task.

    classification: 52m for Fashion-MNIST, trained by its `fashion-mnist` recipe. detection: RetinaNet on 26m for the
    set of `make-detection-data`, trained by `retinanet-tiny`.

    Raises FileNotFoundError where there are none.
    """
    name = _WEIGHTS.get(task, f"weights for {task}")
    with as_file(files(__name__).joinpath(name)) as path:
        if not path.is_file():
            raise FileNotFoundError(f"{name}: not in this package")
        return path


def sample_images() -> list[tuple[Image.Image, str]]:
    """Twelve grey 28 x 28 images of Fashion-MNIST's test set, each with the name of what it shows."""
    with as_file(files(__name__).joinpath("fashion-mnist-test.png")) as path, Image.open(path) as strip:
        strip.load()
        return [(strip.crop((_SIDE * index, 0, _SIDE * (index + 1), _SIDE)), name) for index, name in enumerate(_SHOWN)]
