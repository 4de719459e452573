"""Images through a network in a stream: decoded ahead, answered in order, and written where a stop loses nothing."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobileformer.cli.output import CommandError, print_table

if TYPE_CHECKING:
    import numpy as np

    from mobileformer.cli.weights import InputView

__all__ = ["AnswerFile", "AnswerTable", "classify", "run_key"]

Answer = dict[str, Any]
Found = tuple[str, str | None]  # as `mobileformer.data.find_images` gives them

_LONGEST = 1 << 24  # bytes of a line; a longer one is not ours
_BEGINS = b'{"image": '
_TABLE = 500  # answers to a table: a million images are no reason to hold a million rows


def classify(
    network: Callable[[Any], Any],
    found: Iterable[Found],
    *,
    view: InputView,
    names: tuple[str, ...] | list[str] | None,
    top_k: int,
    batch: int,
    workers: int,
) -> Iterator[Answer]:
    """{"image", "predictions"} or {"image", "error"} for every image, in order; batch by batch.

    network: (B,C,size,size) float32 on the CPU -> logits. workers: threads that decode ahead; Pillow lets go of the
    interpreter's lock where it works. What is held at a time is one batch and two images for each worker.
    """
    loaded = _ahead(partial(_load, view=view), found, workers, batch) if workers else (_load(x, view) for x in found)
    while group := list(islice(loaded, batch)):
        answers: list[Answer] = [{"image": name} for name, _ in group]
        arrays = []
        for answer, (_, outcome) in zip(answers, group, strict=True):
            if isinstance(outcome, str):
                answer["error"] = outcome
            else:
                arrays.append(outcome)
        good = [answer for answer in answers if "error" not in answer]
        for answer, outcome in zip(good, _run(network, arrays, top_k), strict=True):
            answer.update(outcome)
            if "error" in outcome:
                answer["error"] = f"{answer['image']}: {outcome['error']}"
            for row in outcome.get("predictions", ()):
                row["label"] = names[row["class"]] if names else None
        yield from answers


def _load(found: Found, view: InputView) -> tuple[str, np.ndarray | str]:
    """(name, the network's input, or what is wrong)."""
    from mobileformer.data import ImageError, load_image

    name, problem = found
    if problem is not None:
        return name, problem
    try:
        return name, load_image(name, **asdict(view))
    except ImageError as error:
        return name, str(error)


def _ahead(load: Callable[[Any], Any], items: Iterable[Any], workers: int, batch: int) -> Iterator[Any]:
    """`map(load, items)` on threads, so far ahead of who takes the results and no further."""
    pending: deque[Future[Any]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for item in items:
            pending.append(pool.submit(load, item))
            if len(pending) > 2 * workers + batch:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _run(network: Callable[[Any], Any], arrays: list[np.ndarray], top_k: int) -> Iterator[Answer]:
    import numpy as np
    import torch

    if not arrays:
        return
    with torch.inference_mode():
        logits = network(torch.from_numpy(np.stack(arrays))).double().cpu()
    for row in logits:
        if not bool(torch.isfinite(row).all()):
            yield {"error": "the network's answer is not finite, so there is no class to name"}
            continue
        top = row.softmax(0).topk(min(top_k, len(row)))
        yield {
            "predictions": [
                {"class": index, "probability": probability}
                for index, probability in zip(top.indices.tolist(), top.values.tolist(), strict=True)
            ]
        }


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
            (answer["image"] if rank == 0 else "", row["class"], row["label"], f"{100 * row['probability']:.2f} %")
            for answer in self._answers
            for rank, row in enumerate(answer.get("predictions", ()))
        ]
        self._answers = []
        if rows and self._has_names:
            print_table("", ("image", "class", "name", "probability"), rows)
        elif rows:
            print_table("", ("image", "class", "probability"), [(a, b, d) for a, b, _, d in rows])


def run_key(weights: Path, *told: object) -> str:
    """Twelve hexadecimal digits of what decides an answer besides the image: the weights' bytes, and what is told."""
    try:
        with weights.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
    except OSError as error:
        raise CommandError(f"{weights}: {error.strerror}") from error
    digest.update(repr(told).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:12]


class AnswerFile:
    """OUT.jsonl: a line an image, {"image", "run", "predictions"} or {"image", "run", "error"}, written as it is known.

    Opened again it goes on: `answered` are the images that have a line. A last line that a stop cut off is dropped.
    One process at a time. Raises CommandError: what is there is something else, or was answered by another network.
    """

    def __init__(self, path: Path, run: str) -> None:
        self.path, self._run = path, run
        self.answered: dict[str, bool] = {}  # image -> whether it failed
        try:
            # Not blocking: a FIFO would wait for a reader before it can be told from a file.
            number = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NONBLOCK", 0), 0o666)
            self._file = os.fdopen(number, "r+b")
        except OSError as error:
            raise CommandError(f"--output {path}: {error.strerror}") from error
        try:
            if not stat.S_ISREG(os.fstat(number).st_mode):
                raise CommandError(f"--output {path}: expected a file, found a device or pipe; --jsonl writes to one")
            self._lock()
            self._go_on()
        except BaseException:
            self._file.close()
            raise

    def add(self, answer: Answer) -> None:
        line = json.dumps({"image": answer["image"], "run": self._run, **answer}, allow_nan=False)
        try:
            self._file.write(line.encode("ascii") + b"\n")
            self._file.flush()
        except OSError as error:
            raise CommandError(f"--output {self.path}: {error.strerror}; the answers before are kept") from error

    def close(self) -> None:
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
            raise CommandError(f"--output {self.path}: another process is writing to it") from error

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
                raise CommandError(
                    f"--output {self.path}: line {number} is no answer of predict; name another file"
                ) from None
            if run != self._run:
                raise CommandError(
                    f"--output {self.path}: was answered by other weights, or with other options; name another file"
                )
            whole += len(line)
        self._file.seek(whole)
        self._file.truncate()
