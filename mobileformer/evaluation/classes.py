"""What an evaluation of any task asks first: which class of the data is which of the network, how much is broken."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

__all__ = ["Broken", "EvaluationError", "order_of_classes"]


class EvaluationError(RuntimeError):
    """An evaluation that came to no number; the message says which images, classes or logits are the reason."""


@dataclass(eq=False)
class Broken:
    """Images that could not be read. Raises EvaluationError where there are more than `limit`."""

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


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
