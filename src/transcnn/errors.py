"""Errors meant for a person, and imports that an extra brings."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

__all__ = ["MAX_SEED", "MAX_SIDE", "UserError", "check_range", "first_line", "require"]

MAX_SIDE = 1 << 13  # pixels of an input
MAX_SEED = (1 << 32) - 1  # what NumPy and Lightning take
# By what libraries would tell their makers on the internet how they are used; they do without where it isn't there.
TELEMETRY = {"openvino": "openvino_telemetry"}


class UserError(ValueError):
    """Something the user can mend: one clear line, shown by the command line without a traceback, exit code 2.

    Attributes:
        reported: Another process of the same run says it already.
        code: The exit code of the command line; 1 where the work was done but for a part that was to count.
    """

    reported = False
    code = 2


def check_range(least: float, most: float | None = None, **values: float | None) -> None:
    """See that values, given by their names, lie from ``least`` to ``most``; None is let pass, NaN isn't.

    Raises:
        UserError: One doesn't.
    """
    for name, value in values.items():
        if value is None or (value >= least and (most is None or value <= most)):
            continue
        limits = f"{least:,g} or more" if most is None else f"from {least:,g} to {most:,.10g}"
        raise UserError(f"{name} must be {limits}, got {value}")


def require(module: str, extra: str) -> ModuleType:
    """Import ``module``, which then sends no usage statistics, or raise a :class:`UserError` that names the extra."""
    if module in TELEMETRY:
        sys.modules.setdefault(TELEMETRY[module], None)  # pyright: ignore  (as if it weren't installed)
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(f'{module} is not installed; run: pip install "transcnn[{extra}]"') from error


def first_line(error: BaseException, most: int = 300) -> str:
    """What another library says went wrong, as one short line; it may repeat what stands in an untrusted file."""
    line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    line = "".join(letter if letter.isprintable() else "?" for letter in line)
    return line if len(line) <= most else f"{line[:most]}..."
