"""Answers to images, and the file that keeps them: a line an image, in which a stop loses nothing."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mobileformer.files.reading import refuse_other_kinds

__all__ = ["Answer", "AnswerFile", "AnswerFileError", "Ranked", "answer_to", "run_key"]

_LONGEST = 1 << 24  # bytes of a line; a longer one is not ours
_BEGINS = b'{"image": '


@dataclass(frozen=True, slots=True)
class Ranked:
    """A class, its name where the classes have names, and its probability."""

    index: int
    label: str | None
    probability: float


@dataclass(frozen=True, slots=True)
class Answer:
    """What a network says of an image: classes, the most probable first; or, in `error`, why it says nothing."""

    name: str
    classes: tuple[Ranked, ...] = ()
    error: str | None = None

    @property
    def best(self) -> Ranked:
        """The most probable class. Raises ValueError with the error where there is none."""
        if not self.classes:
            raise ValueError(self.error or f"{self.name}: no class was asked for")
        return self.classes[0]

    def row(self) -> dict[str, Any]:
        """As plain data: {"image", "predictions": [{"class", "probability", "label"}]} or {"image", "error"}."""
        if self.error is not None:
            return {"image": self.name, "error": self.error}
        rows = [{"class": row.index, "probability": row.probability, "label": row.label} for row in self.classes]
        return {"image": self.name, "predictions": rows}


def answer_to(name: str, logits: np.ndarray, *, labels: Sequence[str] | None, top_k: int) -> Answer:
    """logits (K) -> the `top_k` classes with the largest softmax, in float64; of equal ones the first class first."""
    logits = logits.astype(np.float64)
    if not np.isfinite(logits).all():
        return Answer(name, error=f"{name}: the network's answer is not finite, so there is no class to name")
    shares = np.exp(logits - logits.max())
    shares /= shares.sum()
    order: list[int] = np.argsort(-logits, kind="stable")[:top_k].tolist()
    return Answer(name, tuple(Ranked(i, labels[i] if labels else None, float(shares[i])) for i in order))


def run_key(weights: str | os.PathLike[str], *told: object) -> str:
    """Twelve hexadecimal digits of what decides an answer besides the image: the weights' bytes, and what is told."""
    with open(weights, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(repr(told).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:12]


class AnswerFileError(ValueError):
    """A file of answers that cannot be gone on with; the message names it and says why."""


class AnswerFile:
    """OUT.jsonl: a line an image, {"image", "run", "predictions"} or {"image", "run", "error"}, written as it is known.

    Opened again it goes on: `answered` are the images that have a line. A last line that a stop cut off is dropped.
    One process at a time. `run` is what `run_key` gives: what was answered otherwise is not gone on with.

    Raises OSError, NotRegularError for a device or pipe, and AnswerFileError: another process writes to it, what is
    there is something else, or was answered by another run.
    """

    def __init__(self, path: str | os.PathLike[str], run: str) -> None:
        self.path, self._run = Path(path), run
        self.answered: dict[str, bool] = {}  # image -> whether it failed
        # Not blocking: a FIFO would wait for a reader before it can be told from a file.
        number = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NONBLOCK", 0), 0o666)
        self._file = os.fdopen(number, "r+b")
        try:
            refuse_other_kinds(path, os.fstat(number).st_mode)
            self._lock()
            self._go_on()
        except BaseException:
            self._file.close()
            raise

    def add(self, answer: Answer) -> None:
        """Write a line. Raises OSError where it does not fit; the lines before are kept."""
        row = answer.row()
        line = json.dumps({"image": row["image"], "run": self._run, **row}, allow_nan=False)
        try:
            self._file.write(line.encode("ascii") + b"\n")
            self._file.flush()
        except OSError as error:
            told = f"{error.strerror}; the answers before are kept"
            raise OSError(error.errno, told, os.fspath(self.path)) from error

    def close(self) -> None:
        """Nothing more is written, and another process may."""
        with contextlib.suppress(OSError):  # the same that `add` has told: what did not fit is tried once more
            self._file.close()

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # Windows does not let two write anyway
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise AnswerFileError(f"{self.path}: another process is writing to it") from error

    def _go_on(self) -> None:
        """Read what is there, and stand behind its last whole line."""
        whole = 0
        for number in range(1, 1 << 62):
            line = self._file.readline(_LONGEST)
            if not line:
                break
            if not line.endswith(b"\n") and len(line) < _LONGEST and _BEGINS.startswith(line[: len(_BEGINS)]):
                break  # cut off while it was written
            try:
                row = json.loads(line)
                self.answered[row["image"]] = "error" in row
                run = row["run"]
            except (ValueError, KeyError, TypeError, RecursionError):
                raise AnswerFileError(
                    f"{self.path}: line {number} is no answer of predict; name another file"
                ) from None
            if run != self._run:
                raise AnswerFileError(
                    f"{self.path}: was answered by other weights, or with other options; name another file"
                )
            whole += len(line)
        self._file.seek(whole)
        self._file.truncate()
