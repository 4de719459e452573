"""What a detector says of an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

__all__ = ["Found", "FoundBox", "found_in"]


@dataclass(frozen=True, slots=True)
class FoundBox:
    """A class, its name where the classes have names, how sure of it, and (x1, y1, x2, y2) in pixels of the file."""

    index: int
    label: str | None
    score: float
    box: tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Found:
    """The boxes in an image, the highest score first; or, in `error`, why there is no answer.

    | name | what |
    |---|---|
    | name | of the image, for files their path |
    | width, height | in pixels, upright: as a viewer shows it |
    | boxes | any number of `FoundBox` |
    | error | None, or one line |
    | image | the picture itself, upright and opaque, where the predictor keeps it |
    """

    name: str
    width: int = 0
    height: int = 0
    boxes: tuple[FoundBox, ...] = ()
    error: str | None = None
    image: Image.Image | None = None

    def row(self) -> dict[str, Any]:
        """As plain data; these keys stay.

        {"path", "width", "height", "boxes": [{"label", "class", "score", "box": [x1, y1, x2, y2]}]}, label `None`
        where the weights have no names; or {"path", "error"}.
        """
        if self.error is not None:
            return {"path": self.name, "error": self.error}
        rows = [
            {"label": found.label, "class": found.index, "score": found.score, "box": list(found.box)}
            for found in self.boxes
        ]
        return {"path": self.name, "width": self.width, "height": self.height, "boxes": rows}

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """boxes (n, 4) float64, labels (n) int64, scores (n) float64: what pictures are drawn from."""
        return {
            "boxes": np.array([found.box for found in self.boxes], np.float64).reshape(-1, 4),
            "labels": np.array([found.index for found in self.boxes], np.int64),
            "scores": np.array([found.score for found in self.boxes], np.float64),
        }


def found_in(
    name: str,
    image: Image.Image | None,
    size: tuple[int, int],
    answer: Mapping[str, Any],
    *,
    labels: Sequence[str] | None = None,
    threshold: float = 0.0,
) -> Found:
    """The boxes of an answer with a score of `threshold` or more, cut at the edges of the image.

    size: its (width, height). answer: boxes (n, 4) in pixels of the image, labels (n), scores (n) falling.
    """
    width, height = size
    boxes, scores = np.asarray(answer["boxes"], np.float64), np.asarray(answer["scores"], np.float64)
    if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
        return Found(name, error=f"{name}: the network's answer is not finite, so there is no box to tell")
    boxes = np.clip(boxes, 0, [width, height, width, height]).tolist()
    indices: list[int] = np.asarray(answer["labels"]).tolist()
    rows = zip(indices, scores.tolist(), boxes, strict=True)
    found = tuple(
        FoundBox(index, None if labels is None else labels[index], score, (box[0], box[1], box[2], box[3]))
        for index, score, box in rows
        if score >= threshold
    )
    return Found(name, width, height, found, image=image)
