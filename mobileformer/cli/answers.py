"""Answers for people, on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mobileformer.cli.output import print_table

if TYPE_CHECKING:
    from mobileformer.prediction import Answer

__all__ = ["AnswerTable"]

_TABLE = 500  # answers to a table: a million images are no reason to hold a million rows


class AnswerTable:
    """Answers for people: a table after every so many, and one of the rest when it is closed."""

    def __init__(self, *, has_names: bool) -> None:
        self._has_names = has_names
        self._answers: list[Answer] = []

    def add(self, answer: Answer) -> None:
        self._answers.append(answer)
        if len(self._answers) == _TABLE:
            self.close()

    def close(self) -> None:
        rows = [
            (answer.name if rank == 0 else "", row.index, row.label, f"{100 * row.probability:.2f} %")
            for answer in self._answers
            for rank, row in enumerate(answer.classes)
        ]
        self._answers = []
        if rows and self._has_names:
            print_table("", ("image", "class", "name", "probability"), rows)
        elif rows:
            print_table("", ("image", "class", "probability"), [(a, b, d) for a, b, _, d in rows])
