"""How right a network is on a split of a data set: counts of images, which no batch size changes.

An image counts by the rank of its class: how many classes have a larger logit, or an equal one and come before. So an
accuracy is a count of images divided by another, and nothing is averaged over batches. Training and `evaluate` count by
the same `Tally`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from mobileformer.evaluation.classes import Broken, EvaluationError

if TYPE_CHECKING:
    from mobileformer.data.batch import Batch

__all__ = [
    "TOP",
    "Agreement",
    "Report",
    "Score",
    "Tally",
    "evaluate",
    "ranks_of",
]

Network = Callable[[Tensor], Tensor]
TOP = 5  # the classes with the largest logits, among which the right one counts for top-5


@dataclass(slots=True)
class Tally:
    """Images by the rank of their class, and the sum of their losses: what batches and processes add up to.

    ============  ====================================================================
    field         meaning
    ============  ====================================================================
    top1_correct  images whose class has the largest logit
    top5_correct  images whose class is among the five with the largest logits
    loss_sum      cross entropy in nats, summed over the images
    images        images that were counted
    ============  ====================================================================

    Over processes each field is summed by itself: `Tally(*world.sum(*tally.sums))`.
    """

    top1_correct: float = 0
    top5_correct: float = 0
    loss_sum: float = 0.0
    images: float = 0

    def add(self, logits: Tensor, y: Tensor) -> Tensor:
        """Count a batch: logits (B,K), y (B) int64 on the same device -> the rank of each image's class, (B) int64."""
        ranks = ranks_of(logits, y)
        self.top1_correct += int((ranks < 1).sum())
        self.top5_correct += int((ranks < TOP).sum())
        self.loss_sum += float(F.cross_entropy(logits, y, reduction="sum"))
        self.images += len(y)
        return ranks

    @property
    def sums(self) -> tuple[float, float, float, float]:
        """The fields, in the order in which `Tally` takes them."""
        return self.top1_correct, self.top5_correct, self.loss_sum, self.images

    @property
    def top1_percent(self) -> float:
        """Per cent of the images whose class has the largest logit. ZeroDivisionError where there are no images."""
        return 100 * self.top1_correct / self.images

    @property
    def top5_percent(self) -> float:
        """Per cent of the images whose class is among the five. ZeroDivisionError where there are no images."""
        return 100 * self.top5_correct / self.images

    @property
    def mean_loss(self) -> float:
        """Cross entropy of an image, in nats. ZeroDivisionError where there are no images."""
        return self.loss_sum / self.images


@dataclass(frozen=True, eq=False)
class Score:
    """What a network got right. K classes, in the network's order.

    =========  ======  ===================================================================================
    field      shape   meaning
    =========  ======  ===================================================================================
    confusion  (K,K)   int64: images of the class of the row that were taken for the class of the column
    top5       (K)     int64: images of a class that is among the five with the largest logits
    tally              the same over all classes, and the loss
    seconds            in the network, without loading the images
    =========  ======  ===================================================================================
    """

    confusion: npt.NDArray[np.int64]
    top5: npt.NDArray[np.int64]
    tally: Tally
    seconds: float

    @property
    def images(self) -> int:
        """Images that were classified."""
        return int(self.tally.images)

    @property
    def top1_correct(self) -> int:
        """Images whose class has the largest logit."""
        return int(self.tally.top1_correct)

    @property
    def top5_correct(self) -> int:
        """Images whose class is among the five with the largest logits."""
        return int(self.tally.top5_correct)

    @property
    def images_of_class(self) -> npt.NDArray[np.int64]:
        """(K) images there are of a class."""
        return self.confusion.sum(axis=1)

    @property
    def recall(self) -> npt.NDArray[np.float64]:
        """(K) share of a class's images that were found; NaN where there are none."""
        return _share(self.confusion.diagonal(), self.images_of_class)

    @property
    def precision(self) -> npt.NDArray[np.float64]:
        """(K) share of the images taken for a class that are of it; NaN where none were."""
        return _share(self.confusion.diagonal(), self.confusion.sum(axis=0))

    def mistakes(self) -> list[tuple[int, int, int]]:
        """(class, what it was taken for, images) of every pair that was mixed up, the most frequent first."""
        rows, columns = np.nonzero(self.confusion)
        found = [(int(a), int(b), int(self.confusion[a, b])) for a, b in zip(rows, columns, strict=True) if a != b]
        return sorted(found, key=lambda pair: (-pair[2], pair[:2]))


@dataclass(frozen=True)
class Agreement:
    """One network's logits beside those of the first.

    ================  ==============================================================
    field             meaning
    ================  ==============================================================
    differently       images that the two take for different classes
    difference        largest difference of a logit
    largest           largest logit of the first, by magnitude
    ================  ==============================================================
    """

    differently: int
    difference: float
    largest: float

    @property
    def relative(self) -> float:
        """The largest difference over the largest logit."""
        return self.difference / self.largest if self.largest else self.difference


@dataclass(frozen=True, eq=False)
class Report:
    """Scores by name, in the order given; agreements of all but the first; images that could not be read."""

    scores: Mapping[str, Score]
    agreements: Mapping[str, Agreement]
    broken: tuple[str, ...]


@dataclass(eq=False)
class _Counts:
    """One network's counts so far."""

    confusion: Tensor
    top5: Tensor
    tally: Tally = field(default_factory=Tally)
    seconds: float = 0.0
    differently: int = 0
    difference: float = 0.0

    def add(self, logits: Tensor, y: Tensor) -> None:
        ranks, taken_for = self.tally.add(logits, y), _first_largest(logits)
        classes = len(self.top5)
        self.confusion += torch.bincount(y * classes + taken_for, minlength=classes**2).view(classes, classes)
        self.top5 += torch.bincount(y[ranks < TOP], minlength=classes)

    def score(self) -> Score:
        return Score(self.confusion.numpy(), self.top5.numpy(), self.tally, self.seconds)


@torch.no_grad()
def evaluate(
    networks: Mapping[str, Network],
    batches: Iterable[Batch],
    *,
    num_classes: int,
    order: Sequence[int] | None = None,
    max_broken: int = 0,
) -> Report:
    """Run every network on every batch and count.

    ===========  ==========================================================================================
    argument     meaning
    ===========  ==========================================================================================
    networks     name -> function from x (B,C,H,W) on the CPU to logits (B, num_classes), on any device
    batches      what `mobileformer.data.loading.evaluation_batches` gives
    num_classes  K, width of the logits
    order        position of each of the data's classes among the network's, as `order_of_classes` of
                 classes.py finds them; None where they are the same
    max_broken   images that may be unreadable; they count for nothing
    ===========  ==========================================================================================

    The first batch goes through each network once before its time counts. Raises ValueError without networks and for
    logits of another width; EvaluationError where more images are unreadable, where not one is left, and for logits
    that are NaN or infinite.
    """
    if not networks:
        raise ValueError("networks: expected at least one")
    counted = {name: _empty(num_classes) for name in networks}
    places = torch.arange(num_classes) if order is None else torch.as_tensor(order)
    broken, largest, images = Broken(max_broken), 0.0, 0
    for batch in batches:
        broken.add(batch.broken)
        if not len(batch.y):
            continue
        first, y = None, places[batch.y]
        for (name, network), counts in zip(networks.items(), counted.values(), strict=True):
            if not images:
                network(batch.x)
            logits = _timed(network, batch.x, counts)
            _check(name, logits, batch, num_classes)
            counts.add(logits, y)
            if first is None:
                first, largest = logits, max(largest, logits.abs().max().item())
            else:
                counts.difference = max(counts.difference, (logits - first).abs().max().item())
                counts.differently += int((_first_largest(logits) != _first_largest(first)).sum())
        images += len(y)
    if not images:
        raise EvaluationError(f"no image to evaluate on: the split is empty, or all {len(broken.messages)} are broken")
    return Report(
        {name: counts.score() for name, counts in counted.items()},
        {name: Agreement(counts.differently, counts.difference, largest) for name, counts in list(counted.items())[1:]},
        tuple(broken.messages),
    )


def ranks_of(logits: Tensor, y: Tensor) -> Tensor:
    """How many classes come before the right one: logits (B,K), y (B) -> (B) int64. Every accuracy is counted by it.

    A class comes before where its logit is larger, or equal and its position is lower. NaN comes before every number;
    where the right class has NaN, all others do.
    """
    own = logits.gather(1, y[:, None])
    place = torch.arange(logits.shape[1], device=logits.device)
    # Written so that NaN comes before everything, whosever it is: no image is right by it.
    behind = (logits < own) | ((logits == own) & (place > y[:, None])) | (place == y[:, None])
    return (~behind).sum(dim=1)


def _first_largest(logits: Tensor) -> Tensor:
    """The class of rank 0. Torch leaves open which of several equal ones its argmax names, numpy does not."""
    return torch.from_numpy(logits.numpy().argmax(axis=1))


def _timed(network: Network, x: Tensor, counts: _Counts) -> Tensor:
    start = time.perf_counter()
    logits = network(x).float().cpu()  # the copy waits for a GPU to be done
    counts.seconds += time.perf_counter() - start
    return logits


def _check(name: str, logits: Tensor, batch: Batch, num_classes: int) -> None:
    if logits.shape != (len(batch.y), num_classes):
        raise ValueError(f"networks: {name}: expected logits {(len(batch.y), num_classes)}, got {tuple(logits.shape)}")
    finite = torch.isfinite(logits).all(dim=1)
    if not bool(finite.all()):
        image = batch.index[~finite][0].item()
        raise EvaluationError(f"{name}: the network's answer to image {image} is not finite, so it cannot be counted")


def _empty(num_classes: int) -> _Counts:
    top5 = torch.zeros(num_classes, dtype=torch.int64)
    return _Counts(top5.new_zeros(num_classes, num_classes), top5)


def _share(part: npt.NDArray[np.int64], of: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    return np.divide(part, of, out=np.full(part.shape, np.nan), where=of > 0)
