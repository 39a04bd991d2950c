"""Importing large libraries in less time."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["gc_paused"]


@contextmanager
def gc_paused() -> Iterator[None]:
    """Import PyTorch and what needs it without garbage collection; what is there in the end is never looked at again.

    The modules' million objects live until the process ends, and going through them again and again takes a third of
    the time that importing takes, and as much once more when the process ends. For commands: a program that uses this
    package decides about its own process. Where PyTorch is imported already nothing happens.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
