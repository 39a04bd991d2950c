"""Calls of gradio that leave no event loop behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

__all__ = ["in_event_loop"]

P = ParamSpec("P")
R = TypeVar("R")


def in_event_loop(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """The result of ``function``, which is called while an event loop runs: the caller's, as in Jupyter, or a new one.

    Where none runs gradio makes one for each of its locks, makes it the thread's current one and never closes it. The
    garbage collector, which training sets off sooner, may close such a loop's sockets before the loop itself; the loop
    then fails with "Invalid file descriptor: -1" while it is deleted.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        pass
    else:
        return function(*args, **kwargs)

    async def call() -> R:
        return function(*args, **kwargs)

    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(call())
    finally:
        loop.close()
