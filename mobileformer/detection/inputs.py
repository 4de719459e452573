"""What detectors are given: images of any sizes as one batch, and the boxes that are true.

Legend: B images, C channels, H W height and width of the largest, N boxes of one image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mobileformer.config import MIN_SIZE

__all__ = ["Images", "Target", "as_batch", "check_targets"]

Images = Tensor | Sequence[Tensor]
Target = Mapping[str, Tensor]


def as_batch(images: Images, sizes: Tensor | None, in_chans: int) -> tuple[Tensor, list[tuple[int, int]]]:
    """Images as one tensor, padded with zeros at the right and at the bottom, and the height and width of each.

    ========  =====================================================  =========================================
    argument  what                                                   dtype
    ========  =====================================================  =========================================
    images    a list of B images (C,h,w), any h and w >= 32; or one  floating; all of one dtype and one device
              tensor (B,C,H,W) in which each lies at the upper left
    sizes     None for a list; (B,2) for a tensor, the valid height  int64
              and width of each image, None where all of it is
    returns   (B,C,H,W), and B pairs (height, width)                 the images'
    ========  =====================================================  =========================================

    Raises ValueError for a wrong number, shape or size, TypeError for what is no floating tensor or differs.
    """
    if isinstance(images, Tensor):
        _check_image("images", images, 4, in_chans)
        return images, _valid_sizes(images, sizes)
    if sizes is not None:
        raise ValueError("sizes: expected None beside a list of images, each of which has its own, got a value")
    if not isinstance(images, Sequence) or not images:
        raise ValueError(f"images: expected a tensor or a list of at least one image, got {_told(images)}")
    for index, image in enumerate(images):
        _check_image(f"images[{index}]", image, 3, in_chans)
        if image.dtype != images[0].dtype or image.device != images[0].device:
            raise TypeError(
                f"images[{index}]: expected {images[0].dtype} on {images[0].device} like the first image, "
                f"got {image.dtype} on {image.device}"
            )
    own = [(image.shape[1], image.shape[2]) for image in images]
    height, width = (max(sides) for sides in zip(*own, strict=True))
    padded = [F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1])) for image in images]
    return torch.stack(padded), own


def check_targets(targets: Sequence[Target], batch: int, num_classes: int) -> None:
    """Raise ValueError or TypeError, in one line, for targets that nothing can be learned from.

    ========  ======  =======  ==================================================================
    key       shape   dtype    values
    ========  ======  =======  ==================================================================
    boxes     (N,4)   float    corners (x1, y1, x2, y2) in pixels, finite, x1 < x2 and y1 < y2
    labels    (N)     int64    0 to num_classes - 1
    ========  ======  =======  ==================================================================

    One dictionary for each of the `batch` images, with these keys and any others; N may be 0.
    """
    if not isinstance(targets, Sequence) or len(targets) != batch:
        raise ValueError(f"targets: expected a list of {batch}, one for each image, got {_told(targets)}")
    for index, target in enumerate(targets):
        _check_form(f"targets[{index}]", target)
    # All values at once: of tensors on a GPU each question is a wait.
    boxes = torch.cat([target["boxes"] for target in targets])
    labels = torch.cat([target["labels"] for target in targets])
    right = boxes.isfinite().all(1) & (boxes[:, 2:] > boxes[:, :2]).all(1) & (labels >= 0) & (labels < num_classes)
    if bool(right.all()):
        return
    row = int((~right).nonzero()[0])
    box, label = boxes[row].tolist(), int(labels[row])
    index = 0
    while row >= len(targets[index]["boxes"]):
        row -= len(targets[index]["boxes"])
        index += 1
    if not 0 <= label < num_classes:
        raise ValueError(f"targets[{index}]['labels'][{row}]: expected 0 to {num_classes - 1}, got {label}")
    raise ValueError(
        f"targets[{index}]['boxes'][{row}]: expected finite (x1, y1, x2, y2) with x1 < x2 and y1 < y2, got {box}"
    )


def _check_form(name: str, target: Target) -> None:
    missing = [key for key in ("boxes", "labels") if not isinstance(target, Mapping) or key not in target]
    if missing:
        found = list(target) if isinstance(target, Mapping) else type(target).__name__
        raise ValueError(f"{name}: expected a dictionary with boxes and labels, got {found}")
    boxes, labels = target["boxes"], target["labels"]
    if not isinstance(boxes, Tensor) or not boxes.is_floating_point():
        raise TypeError(f"{name}['boxes']: expected a floating tensor, got {_told(boxes)}")
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        raise TypeError(f"{name}['labels']: expected an int64 tensor, got {_told(labels)}")
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"{name}['boxes']: expected shape (N, 4), got {tuple(boxes.shape)}")
    if labels.shape != boxes.shape[:1]:
        raise ValueError(f"{name}['labels']: expected shape ({len(boxes)},), got {tuple(labels.shape)}")


def _check_image(name: str, image: Tensor, ndim: int, in_chans: int) -> None:
    if not isinstance(image, Tensor) or not image.is_floating_point():
        raise TypeError(f"{name}: expected a floating tensor, got {_told(image)}")
    axes = "B, " * (ndim == 4) + f"{in_chans}, H, W"
    if image.ndim != ndim or image.shape[-3] != in_chans or 0 in image.shape:
        raise ValueError(f"{name}: expected shape ({axes}), none of them 0, got {tuple(image.shape)}")
    if min(image.shape[-2:]) < MIN_SIZE:
        raise ValueError(
            f"{name}: expected height and width of at least {MIN_SIZE}, got {image.shape[-2]} x {image.shape[-1]}"
        )


def _valid_sizes(images: Tensor, sizes: Tensor | None) -> list[tuple[int, int]]:
    batch, _, height, width = images.shape
    if sizes is None:
        return [(height, width)] * batch
    if not isinstance(sizes, Tensor) or sizes.dtype != torch.int64:
        raise TypeError(f"sizes: expected an int64 tensor, got {_told(sizes)}")
    if sizes.shape != (batch, 2):
        raise ValueError(f"sizes: expected shape ({batch}, 2), got {tuple(sizes.shape)}")
    own = [(row[0], row[1]) for row in sizes.tolist()]
    for index, (h, w) in enumerate(own):
        if not (MIN_SIZE <= h <= height and MIN_SIZE <= w <= width):
            raise ValueError(
                f"sizes[{index}]: expected {MIN_SIZE} to {height} rows and {MIN_SIZE} to {width} columns, got {h} x {w}"
            )
    return own


def _told(value: object) -> str:
    """What somebody gave instead of what was expected."""
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"a {type(value).__name__} of {len(value)}"
    return type(value).__name__
