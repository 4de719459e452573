"""One section's results: a file that is whole after every row, and says what is not in it.

Needs neither torch nor a card: the driver writes with it too, where a section could not.
"""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reading import load, rounded

from mobileformer.files.replacing import replacing

AGAIN = 75  # exit code of a section that cannot go on in its process and can in another


class OutOfTime(BaseException):
    """The section's time is over. No `Exception`: whatever catches those on the way must not keep it."""


class BrokenDevice(BaseException):
    """The device answers with an error to everything from now on, in this process."""


class Section:
    """`<folder>/<name>.json`, with `rows`, `failed` rows with their reasons, and `left_out` of what was planned."""

    def __init__(self, name: str, folder: Path, *, resume: bool = False, **header: Any) -> None:
        self.path = folder / f"{name}.json"
        kept = load(self.path) if resume and self.path.is_file() else {}
        self.rows: list[dict[str, Any]] = kept.pop("rows", [])
        self.failed: list[dict[str, Any]] = kept.pop("failed", [])
        self.left_out: dict[str, str] = kept.pop("left_out", {})  # label -> why
        self.error: str | None = kept.pop("error", None)
        self._seconds = kept.pop("seconds", 0.0)
        self.header: dict[str, Any] = {"format": 1, "section": name, **kept, **header}
        self._started = time.monotonic()

    @property
    def ok(self) -> bool:
        return self.error is None and not self.failed

    def done(self, label: str) -> bool:
        """Whether a row is there or has failed, in an earlier process too."""
        return any(row["label"] == label for row in (*self.rows, *self.failed))

    def plan(self, labels: list[str], why: str = "the section's time was over") -> None:
        """What is to come: until it does, it counts as left out."""
        self.left_out |= {label: why for label in labels if not self.done(label)}
        self.save()

    def add(self, label: str, row: dict[str, Any]) -> None:
        self._take(self.rows, {"label": label, **row})

    def fail(self, label: str, row: dict[str, Any], error: str) -> None:
        self._take(self.failed, {"label": label, **row, "error": error})

    def skip(self, label: str, why: str) -> None:
        self.left_out[label] = why
        self.save()

    def _take(self, rows: list[dict[str, Any]], row: dict[str, Any]) -> None:
        self.left_out.pop(row["label"], None)
        rows.append(rounded(row))
        self.save()

    def save(self) -> None:
        """JSON with a row a line, so that two results can be compared as text."""
        head = {
            **self.header,
            "seconds": round(self._seconds + time.monotonic() - self._started, 1),
            "error": self.error,
            "left_out": self.left_out,
        }
        lists = "".join(
            f',\n "{name}": [' + ",".join(f"\n{json.dumps(row)}" for row in rows) + "\n]"
            for name, rows in (("failed", self.failed), ("rows", self.rows))
        )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as temporary:
            temporary.write_text(json.dumps(head, indent=1)[:-2] + lists + "\n}\n", encoding="utf-8")


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the main thread when the time is over, compilers and all."""

    def stop(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
