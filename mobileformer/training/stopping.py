"""Being asked to stop: Ctrl-C and SIGTERM end the update at hand, then the run; a second one ends it at once."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["Asked", "Interrupted"]


class Interrupted(Exception):
    """The run was asked to stop, by the signal of this number, and is saved."""

    def __init__(self, number: int, path: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; {path} is where the same command goes on")
        self.number = number


class Asked:
    """Whether this process was asked to stop, and by which signal; it hears inside of `listening`."""

    number: int | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Signals are remembered inside, and handled afterwards as before."""

        def ask(number: int, frame: Any) -> None:
            if self.number is not None:
                raise KeyboardInterrupt
            self.number = number

        before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
