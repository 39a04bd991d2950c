"""What is learnt and how it is scored: one module a task, found by its name."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ..errors import UserError

if TYPE_CHECKING:
    from .base import Task

__all__ = ["TASKS", "check_task", "get_task"]

# name -> module:class, imported when asked for
TASKS = {
    "classify": "classify:Classify",
    "multilabel": "multilabel:Multilabel",
    "regress": "regress:Regress",
    "segment": "segment:Segment",
    "detect": "detect:Detect",
}


def get_task(name: str) -> type[Task]:
    """The class of a task."""
    check_task(name)
    module, cls = TASKS[name].split(":")
    return getattr(importlib.import_module(f".{module}", __name__), cls)


def check_task(name: str) -> None:
    """Raise UserError for a name that isn't a task's."""
    if name not in TASKS:
        raise UserError(f"task must be one of {', '.join(TASKS)}, got {name!r}")
