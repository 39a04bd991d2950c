"""Images read by threads while the network computes, in order, a bounded number ahead."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from ..images import BrokenImage

__all__ = ["read_ahead"]

S = TypeVar("S")
T = TypeVar("T")


def read_ahead(
    files: Iterable[S], read: Callable[[S], T], ahead: int
) -> Generator[tuple[S, T | BrokenImage], None, None]:
    """Each file with what ``read`` makes of it, or the error for one that can't be read, in order.

    Decoding and resizing leave Python's lock, so threads overlap them with computing. Whatever ends the iteration
    ends the threads; files that were not begun are left alone.

    Args:
        files: What to read: names, or what else ``read`` takes.
        read: From one of these to what is wanted; called from several threads.
        ahead: How many files may be read before they are asked for.
    """

    def attempt(file: S) -> T | BrokenImage:
        try:
            return read(file)
        except BrokenImage as error:
            return error

    pool = ThreadPoolExecutor(min(os.cpu_count() or 1, ahead), thread_name_prefix="reader")
    waiting: deque[tuple[S, Future[T | BrokenImage]]] = deque()
    todo = iter(files)
    try:
        waiting.extend((file, pool.submit(attempt, file)) for file in islice(todo, ahead))
        while waiting:
            file, future = waiting.popleft()
            found = future.result()
            waiting.extend((further, pool.submit(attempt, further)) for further in islice(todo, 1))
            yield file, found
    finally:
        pool.shutdown(cancel_futures=True)
