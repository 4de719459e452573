"""What a run tells: a line of JSON for each event, TensorBoard where it is installed, a bar for who watches."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mobileformer.files.replacing import replacing

__all__ = ["Log", "read_log"]


class Log:
    """log.jsonl in the run's folder, and the same scalars for TensorBoard. Silent in any process but the first."""

    def __init__(self, folder: Path, *, leads: bool, updates: int, total: int) -> None:
        """updates: of the checkpoint the run goes on from; later lines in the file are of updates done again."""
        self._file = self._board = self._bar = None
        if not leads:
            return
        path = folder / "log.jsonl"
        if path.exists():
            kept = [line for line in read_log(path) if line["update"] <= updates] if updates else []
            with replacing(path) as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=updates)
        except ImportError:
            self.say("tensorboard is not installed (pip install 'mobileformer[train]'): log.jsonl alone is written")
        from tqdm import tqdm

        self._bar = tqdm(total=total, initial=updates, unit="update", disable=None, file=sys.stderr)

    def write(self, kind: str, update: int, **values: Any) -> None:
        """One event. Numbers also become TensorBoard scalars named kind/key."""
        if self._file is None:
            return
        self._file.write(json.dumps({"kind": kind, "update": update, **values}) + "\n")
        self._file.flush()
        for key, value in values.items():
            if self._board is not None and isinstance(value, int | float) and not isinstance(value, bool):
                self._board.add_scalar(f"{kind}/{key}", value, update)

    def advance(self, updates: int, shown: dict[str, str]) -> None:
        """So many updates more are done; `shown` stands behind the bar."""
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(updates)

    def say(self, message: str) -> None:
        """A line for who watches, above the bar."""
        if self._file is None:
            return
        from tqdm import tqdm

        tqdm.write(message, file=sys.stderr)

    def close(self) -> None:
        for each in (self._bar, self._board, self._file):
            if each is not None:
                each.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The events of a log. A last line that was cut off by a crash is left out."""
    events = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return events
