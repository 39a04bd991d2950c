"""Names of classes: compared as text that looks the same, and told apart where two classes share one."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable

__all__ = ["distinct_names", "normalise"]


def normalise(name: str) -> str:
    """The name in Unicode's form NFC: file systems and tools differ in how they write an accented letter."""
    return unicodedata.normalize("NFC", name)


def distinct_names(names: Iterable[str]) -> list[str]:
    """The names in NFC; those that occur more than once get their index: ``c1, c1, c2`` is ``c1 (0), c1 (1), c2``.

    Whatever is keyed by the name of a class then keeps all classes. Names that are distinct stay as they are.
    """
    names = [normalise(name) for name in names]
    counts = Counter(names)
    distinct: list[str] = []
    for index, name in enumerate(names):
        if counts[name] > 1:
            name = f"{name} ({index})"
            while name in counts or name in distinct:
                name += "'"
        distinct.append(name)
    return distinct
