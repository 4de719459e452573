"""Work done ahead on threads, in order and in bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

__all__ = ["groups"]

Given = TypeVar("Given")
Made = TypeVar("Made")


def groups(load: Callable[[Given], Made], items: Iterable[Given], workers: int, batch: int) -> Iterator[list[Made]]:
    """`map(load, items)` in lists of `batch`, made on so many threads; 0 makes an item when it is asked for.

    It is no further ahead of who takes the results than one list and two items for each worker. Closing the iterator
    stops it.
    """
    made = _ahead(load, items, workers, batch) if workers else map(load, items)
    while group := list(islice(made, batch)):
        yield group


def _ahead(load: Callable[[Given], Made], items: Iterable[Given], workers: int, batch: int) -> Iterator[Made]:
    """Pillow lets go of the interpreter's lock where it works."""
    pending: deque[Future[Made]] = deque()
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
