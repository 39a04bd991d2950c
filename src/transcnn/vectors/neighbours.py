"""Vectors compared by the cosine of their angle: nearest ones, duplicates, and classes told by neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..errors import UserError, check_range, require

__all__ = ["Pair", "duplicates", "knn_accuracy", "nearest"]

BLOCK = 1024  # vectors that are compared with all others at once
MOST_PAIRS = 100_000


class Pair(NamedTuple):
    """Two vectors by their indices, and their similarity."""

    first: int
    second: int
    similarity: float


def nearest(vectors: np.ndarray, query: np.ndarray, count: int) -> list[tuple[int, float]]:
    """The vectors (N, C) most similar to one (C,), with their similarity, best first.

    Raises:
        UserError: They are of different sizes.
    """
    if vectors.shape[1] != len(query):
        raise UserError(f"the vectors have {vectors.shape[1]} numbers, this network gives {len(query)}")
    similarity = _unit(vectors) @ _unit(query[None])[0]
    order = np.argsort(-similarity, kind="stable")[:count]
    return [(int(i), float(similarity[i])) for i in order]


def duplicates(vectors: np.ndarray, threshold: float) -> list[Pair]:
    """All pairs of vectors (N, C) whose similarity is ``threshold`` or more, most similar first.

    Raises:
        UserError: There are more than ``MOST_PAIRS``.
    """
    check_range(-1, 1, duplicates=threshold)
    unit, pairs = _unit(vectors), []
    for start in range(0, len(unit), BLOCK):
        block = unit[start : start + BLOCK]
        similarity = block @ unit[start:].T
        rows, columns = np.nonzero(similarity >= threshold - 1e-6)
        kept = columns > rows  # each pair once
        rows, columns = rows[kept], columns[kept]
        if len(pairs) + len(rows) > MOST_PAIRS:
            raise UserError(f"more than {MOST_PAIRS:,} pairs are as similar as {threshold}; give a value nearer to 1")
        pairs += [
            Pair(start + row, start + column, float(similarity[row, column]))
            for row, column in zip(rows.tolist(), columns.tolist(), strict=True)
        ]
    return sorted(pairs, key=lambda pair: (-pair.similarity, pair.first, pair.second))


def knn_accuracy(vectors: np.ndarray, labels: Sequence[str], splits: Sequence[str], neighbours: int) -> dict[str, Any]:
    """How many labels the nearest neighbours tell, weighted by distance.

    Of labelled vectors in splits those of ``train`` are the neighbours, and the test split, else the validation split
    is scored; without splits each vector's neighbours are all others.

    Returns:
        ``k``, ``top1`` in percent, ``images`` scored, ``class_accuracy`` by name.

    Raises:
        UserError: Too few vectors, or of one class.
    """
    check_range(1, knn=neighbours)
    classifier: Any = require("sklearn.neighbors", "train").KNeighborsClassifier
    names, parts = np.asarray(labels, dtype=object), np.asarray(splits, dtype=object)
    scored = next((split for split in ("test", "val") if (parts == split).any() and (parts == "train").any()), None)
    known = np.ones(len(names), bool) if scored is None else parts == "train"
    classes, truth = np.unique(names.astype(str), return_inverse=True)
    if len(np.unique(truth[known])) < 2:
        raise UserError("nearest neighbours tell classes apart where there are two or more, and these have fewer")
    if neighbours > int(known.sum()) - (scored is None):
        raise UserError(f"knn must be below the number of labelled images, {int(known.sum()):,}, got {neighbours}")
    unit = _unit(vectors)
    model = classifier(neighbours, weights="distance", metric="cosine", algorithm="brute").fit(
        unit[known], truth[known]
    )
    tested = known if scored is None else parts == scored
    predicted = model.predict(None if scored is None else unit[tested])  # None: each by all others
    right = predicted == truth[tested]
    each = {
        str(name): round(100 * float(right[truth[tested] == i].mean()), 3)
        for i, name in enumerate(classes)
        if (truth[tested] == i).any()
    }
    return {
        "k": neighbours,
        "split": scored or "all",
        "images": len(right),
        "top1": round(100 * float(right.mean()), 4),
        "class_accuracy": each,
    }


def _unit(vectors: np.ndarray) -> np.ndarray:
    vectors = vectors.astype(np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
