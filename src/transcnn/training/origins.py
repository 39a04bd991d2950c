"""Where each setting of a command came from: the command line, a recipe, or nowhere (the default)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

__all__ = ["note_origins", "origin_of"]

_origins: dict[str, str] = {}


def note_origins(words: Sequence[str]) -> None:
    """Remember a command's words, all of the form ``--NAME=VALUE``; of ``--config=FILE`` what the file sets."""
    _origins.clear()
    for word in words:
        name, _, value = word.removeprefix("--").partition("=")
        if name != "config":
            _origins[name] = "command line"
            continue
        for key, item in (yaml.safe_load(Path(value).read_text(encoding="utf-8")) or {}).items():
            _origins[str(key)] = value
            _origins.update({f"{key}.{inner}": value for inner in item} if isinstance(item, dict) else {})


def origin_of(name: str) -> str:
    """``command line``, a recipe's path, or ``default``, for ``name`` or ``group.name``."""
    found: Any = _origins.get(name)
    if found is None and _origins.get(name.partition(".")[0]) == "command line":  # the whole group was given as one
        found = "command line"
    return found or "default"
