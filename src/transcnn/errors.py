"""Errors meant for a person, and imports that an extra brings."""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["UserError", "require"]


class UserError(ValueError):
    """Something the user can mend: one clear line, shown by the command line without a traceback, exit code 2.

    Attributes:
        told: Another process of the same run says it already.
    """

    told = False


def require(module: str, extra: str) -> ModuleType:
    """Import ``module``, or raise a :class:`UserError` that names the extra to install."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(f'{module} is not installed; run: pip install "transcnn[{extra}]"') from error
