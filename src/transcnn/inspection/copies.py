"""Exact copies between the splits of a data set, found quickly: what training warns of before it begins."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from typing import Any

from ..data.images import BrokenImage

__all__ = ["copies_between_splits"]

MOST_IMAGES = 200_000  # of all splits: of more the sizes alone would take long
MOST_BYTES = 1 << 27  # that are read


def copies_between_splits(splits: Any) -> list[str]:
    """A line on images that are in several splits byte for byte, none where there aren't or it would take long.

    Only images of equal file size are read, and of those no more than ``MOST_BYTES``.

    Args:
        splits: ``train``, ``val`` and ``test`` (None where there is none) as tasks open them.
    """
    parts = {name: part for name in ("train", "val", "test") if (part := getattr(splits, name, None)) is not None}
    if sum(map(len, parts.values())) > MOST_IMAGES:
        return []
    by_size: dict[int, list[tuple[str, int]]] = defaultdict(list)
    for split, part in parts.items():
        if getattr(part.source, "raw", None) is None:
            return []
        for i in range(len(part)):
            if (size := part.entry(i)[2]) > 0:
                by_size[size].append((split, i))
    alike = {size: places for size, places in by_size.items() if len({split for split, _ in places}) > 1}
    if sum(size * len(places) for size, places in alike.items()) > MOST_BYTES:
        return []
    copies = _copies(parts, [place for places in alike.values() for place in places])
    if not copies:
        return []
    count = "1 image is" if len(copies) == 1 else f"{len(copies):,} images are"
    names = " and ".join(f"{parts[split].name(i)!r} ({split})" for split, i in copies[0])
    return [f"{count} in several splits, such as {names}: scores look better than they are; transcnn data lists them"]


def _copies(parts: dict[str, Any], places: list[tuple[str, int]]) -> list[list[tuple[str, int]]]:
    """Groups of equal images, one of each split."""
    groups: dict[str, dict[str, int]] = defaultdict(dict)
    for split, i in places:
        part = parts[split]
        try:
            content = part.source.raw(int(part.indices[i]))
        except BrokenImage:
            continue
        groups[hashlib.sha256(content).hexdigest()].setdefault(split, i)
    return [list(group.items()) for group in groups.values() if len(group) > 1]
