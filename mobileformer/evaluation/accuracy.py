"""How right a network is on a split of a data set: counts of images, which no batch size changes.

An image counts by the rank of its class: how many classes have a larger logit, or an equal one and come before. So an
accuracy is a count of images divided by another, and nothing is averaged over batches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

if TYPE_CHECKING:
    from mobileformer.data.batch import Batch

__all__ = ["Agreement", "EvaluationError", "Report", "Score", "evaluate", "order_of_classes", "ranks_of"]

Network = Callable[[Tensor], Tensor]


class EvaluationError(RuntimeError):
    """An evaluation that came to no number; the message says which images, classes or logits are the reason."""


@dataclass(frozen=True, eq=False)
class Score:
    """What a network got right. K classes, in the network's order.

    =========  ======  ===================================================================================
    field      shape   meaning
    =========  ======  ===================================================================================
    confusion  (K,K)   int64: images of the class of the row that were taken for the class of the column
    top5       (K)     int64: images of a class that is among the five with the largest logits
    seconds            in the network, without loading the images
    =========  ======  ===================================================================================
    """

    confusion: npt.NDArray[np.int64]
    top5: npt.NDArray[np.int64]
    seconds: float

    @property
    def images(self) -> int:
        """Images that were classified."""
        return int(self.confusion.sum())

    @property
    def top1_correct(self) -> int:
        """Images whose class has the largest logit."""
        return int(np.trace(self.confusion))

    @property
    def top5_correct(self) -> int:
        """Images whose class is among the five with the largest logits."""
        return int(self.top5.sum())

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
class _Tally:
    """One network's counts so far."""

    confusion: Tensor
    top5: Tensor
    seconds: float = 0.0
    differently: int = 0
    difference: float = 0.0

    def count(self, logits: Tensor, y: Tensor) -> None:
        taken_for = _first_largest(logits)
        classes = len(self.top5)
        self.confusion += torch.bincount(y * classes + taken_for, minlength=classes**2).view(classes, classes)
        self.top5 += torch.bincount(y[ranks_of(logits, y) < 5], minlength=classes)

    def score(self) -> Score:
        return Score(self.confusion.numpy(), self.top5.numpy(), self.seconds)


@dataclass(eq=False)
class _Broken:
    """Images that could not be read, up to a limit."""

    limit: int
    messages: list[str] = field(default_factory=list)

    def add(self, messages: Sequence[str]) -> None:
        self.messages += messages
        if len(self.messages) > self.limit:
            named = "".join(f"\n  {message}" for message in self.messages[:10])
            more = f"\n  and {len(self.messages) - 10} more" if len(self.messages) > 10 else ""
            raise EvaluationError(
                f"max_broken: {len(self.messages)} images could not be read, more than {self.limit}{named}{more}"
            )


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
    order        position of each of the data's classes among the network's, see `order_of_classes`; None
                 where they are the same
    max_broken   images that may be unreadable; they count for nothing
    ===========  ==========================================================================================

    The first batch goes through each network once before its time counts. Raises ValueError without networks and for
    logits of another width; EvaluationError where more images are unreadable, where not one is left, and for logits
    that are NaN or infinite.
    """
    if not networks:
        raise ValueError("networks: expected at least one")
    tallies = {name: _empty(num_classes) for name in networks}
    places = torch.arange(num_classes) if order is None else torch.as_tensor(order)
    broken, largest, images = _Broken(max_broken), 0.0, 0
    for batch in batches:
        broken.add(batch.broken)
        if not len(batch.y):
            continue
        first, y = None, places[batch.y]
        for (name, network), tally in zip(networks.items(), tallies.values(), strict=True):
            if not images:
                network(batch.x)
            logits = _timed(network, batch.x, tally)
            _check(name, logits, batch, num_classes)
            tally.count(logits, y)
            if first is None:
                first, largest = logits, max(largest, logits.abs().max().item())
            else:
                tally.difference = max(tally.difference, (logits - first).abs().max().item())
                tally.differently += int((_first_largest(logits) != _first_largest(first)).sum())
        images += len(y)
    if not images:
        raise EvaluationError(f"no image to evaluate on: the split is empty, or all {len(broken.messages)} are broken")
    return Report(
        {name: tally.score() for name, tally in tallies.items()},
        {name: Agreement(tally.differently, tally.difference, largest) for name, tally in list(tallies.items())[1:]},
        tuple(broken.messages),
    )


def order_of_classes(
    classes: Sequence[str], labels: Sequence[str] | None, num_classes: int, *, present: Collection[str] | None = None
) -> list[int]:
    """The position of each of the data's classes among the network's.

    classes: names in the order of the data. labels: names in the order of the network, or None where it has none.
    present: the classes that there are images of, where they may be a part of the network's; None: all, and the
    network has no others. A class that is not present and the network does not know has position 0.

    With labels, classes are found by name. Without, the orders are taken to be the same, except where sorting mixed
    them up: names that are the numbers 0 to num_classes - 1 are the positions. A part of other names than numbers has
    no positions then, and numbers from elsewhere on, whose order as text is another one, could mean either.

    Raises EvaluationError where the sets do not fit, with the first name that only one of them has, and where the
    order cannot be known.
    """
    if labels is None:
        return _unnamed(classes, num_classes, partial=present is not None)
    if list(classes) == list(labels):
        return list(range(num_classes))
    for names, where, other, elsewhere in (
        (classes, "data", set(labels), "weights"),
        (labels, "weights", set(classes), "data"),
    ):
        if present is not None:
            names = [name for name in classes if name in present] if where == "data" else []
        missing = next((name for name in names if name not in other), None)
        if missing is not None:
            raise EvaluationError(
                f"{missing!r} is a class of the {where} and none of the {elsewhere}: {len(classes)} in the data "
                f"({_some(classes)}), {len(labels)} in the weights ({_some(labels)})"
            )
    position = {name: index for index, name in enumerate(labels)}
    for names, where in ((labels, "weights"), (classes, "data")):
        if len(set(names)) != len(names):
            twice = next(name for index, name in enumerate(names) if name in names[:index])
            raise EvaluationError(
                f"the class {twice!r} is in the {where} twice, and the orders differ: which is which?"
            )
    return [position.get(name, 0) for name in classes]


def _unnamed(classes: Sequence[str], num_classes: int, *, partial: bool) -> list[int]:
    """`order_of_classes` for a network that does not name its classes."""
    numbers = [int(name) if name.isascii() and name.isdecimal() and len(name) < 10 else -1 for name in classes]
    in_range = min(numbers, default=-1) >= 0 and max(numbers) < num_classes and len(set(numbers)) == len(numbers)
    if in_range and (partial or len(classes) == num_classes):
        return numbers
    if len(classes) != num_classes:
        raise EvaluationError(
            f"the data has {len(classes)} classes, the weights {num_classes} without names: --labels gives them"
        )
    if min(numbers, default=-1) >= 0 and numbers != sorted(numbers):
        raise EvaluationError(
            f"the data's classes are numbers, {_some(classes)}, in the order of text, and the weights have no names: "
            "which is the first class? --labels tells"
        )
    return list(range(num_classes))


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


def _timed(network: Network, x: Tensor, tally: _Tally) -> Tensor:
    start = time.perf_counter()
    logits = network(x).float().cpu()  # the copy waits for a GPU to be done
    tally.seconds += time.perf_counter() - start
    return logits


def _check(name: str, logits: Tensor, batch: Batch, num_classes: int) -> None:
    if logits.shape != (len(batch.y), num_classes):
        raise ValueError(f"networks: {name}: expected logits {(len(batch.y), num_classes)}, got {tuple(logits.shape)}")
    finite = torch.isfinite(logits).all(dim=1)
    if not bool(finite.all()):
        image = batch.index[~finite][0].item()
        raise EvaluationError(f"{name}: the network's answer to image {image} is not finite, so it cannot be counted")


def _empty(num_classes: int) -> _Tally:
    return _Tally(torch.zeros(num_classes, num_classes, dtype=torch.int64), torch.zeros(num_classes, dtype=torch.int64))


def _share(part: npt.NDArray[np.int64], of: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    return np.divide(part, of, out=np.full(part.shape, np.nan), where=of > 0)


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
