"""Weights that come with the package, and a few images they have never been trained on. Needs Pillow, not torch.

52m-fashion-mnist.safetensors           Mobile-Former 52M, one channel, ten classes, values in half precision
fashion-mnist-test.png                  the first twelve images of the test set, whatever the network makes of them
26m-retinanet-clothes.safetensors       RetinaNet on 26M, the same classes on photos, values in half precision
clothes-on-photos-test.png, .json       twelve images of its test set, and the boxes that are there
"""

from __future__ import annotations

import json
from importlib.resources import as_file, files
from pathlib import Path

from PIL import Image

__all__ = ["sample_images", "sample_scenes", "shipped_weights"]

_WEIGHTS = {"classification": "52m-fashion-mnist.safetensors", "detection": "26m-retinanet-clothes.safetensors"}
_SIDE, _SCENE = 28, 128
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
    strip = _strip("fashion-mnist-test.png", _SIDE)
    return list(zip(strip, _SHOWN, strict=True))


def sample_scenes() -> list[tuple[Image.Image, list[tuple[str, list[float]]]]]:
    """Twelve 128 x 128 photos with clothes on them, each with (name, [x1, y1, x2, y2] in pixels) of everything there.

    The first of the test set of `make-detection-data`, whatever a detector makes of them.
    """
    told = json.loads(files(__name__).joinpath("clothes-on-photos-test.json").read_text(encoding="utf-8"))
    objects = [[(row["label"], row["box"]) for row in rows] for rows in told]
    return list(zip(_strip("clothes-on-photos-test.png", _SCENE), objects, strict=True))


def _strip(name: str, side: int) -> list[Image.Image]:
    """The square images that lie side by side in a file."""
    with as_file(files(__name__).joinpath(name)) as path, Image.open(path) as strip:
        strip.load()
        return [strip.crop((left, 0, left + side, side)) for left in range(0, strip.width, side)]
