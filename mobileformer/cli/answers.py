"""Answers for people, on a terminal."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Generic, TypeVar

from mobileformer.cli.output import print_table

if TYPE_CHECKING:
    from mobileformer.prediction import Answer, Found

__all__ = ["AnswerTable", "BoxTable"]

_TABLE = 500  # answers to a table: a million images are no reason to hold a million rows
Kind = TypeVar("Kind")


class _Table(ABC, Generic[Kind]):
    """A table after every so many answers, and one of the rest when it is closed."""

    def __init__(self) -> None:
        self._answers: list[Kind] = []

    def add(self, answer: Kind) -> None:
        self._answers.append(answer)
        if len(self._answers) == _TABLE:
            self.close()

    def close(self) -> None:
        answers, self._answers = self._answers, []
        self._show(answers)

    @abstractmethod
    def _show(self, answers: list[Kind]) -> None: ...


class AnswerTable(_Table["Answer"]):
    """Classes and their probabilities."""

    def __init__(self, *, has_names: bool) -> None:
        super().__init__()
        self._has_names = has_names

    def _show(self, answers: list[Answer]) -> None:
        rows = [
            (answer.name if rank == 0 else "", row.index, row.label, f"{100 * row.probability:.2f} %")
            for answer in answers
            for rank, row in enumerate(answer.classes)
        ]
        if rows and self._has_names:
            print_table("", ("image", "class", "name", "probability"), rows)
        elif rows:
            print_table("", ("image", "class", "probability"), [(a, b, d) for a, b, _, d in rows])


class BoxTable(_Table["Found"]):
    """Boxes, their classes and scores; an image without one has a row as well. `names` are those of the classes."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self._names = names

    def _show(self, answers: list[Found]) -> None:
        rows: list[tuple[object, ...]] = []
        for answer in answers:
            if answer.error is not None:
                continue
            rows += [
                (
                    "" if place else answer.name,
                    self._names[found.index],
                    f"{100 * found.score:.1f} %",
                    " ".join(f"{side:.0f}" for side in found.box),
                )
                for place, found in enumerate(answer.boxes)
            ] or [(answer.name, "nothing", "", "")]
        if rows:
            print_table("", ("image", "name", "score", "left top right bottom"), rows)
