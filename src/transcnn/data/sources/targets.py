"""What is learnt of each image: labels made of a table's cells, or of the classes that other sources have.

A kind of target is one class here. Labels are an array with an entry or a row for each image.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from ...errors import UserError
from ..names import distinct_names, match_names, normalise
from .source import MAX_CLASSES, abbreviate

__all__ = ["CLASSES", "Cells", "Classes", "Targets"]

Cells = Mapping[str, Sequence[Any]]  # the columns to learn, by name
MISSING = ("", "nan")  # of text, in any case


class Targets(Protocol):
    """How labels are made, compared with a model's, and held back."""

    def of_cells(self, cells: Cells, what: str) -> tuple[np.ndarray, list[str], np.ndarray]:
        """Labels, the names of the outputs, and which rows have no label at all; raises UserError."""
        ...

    def of_classes(self, labels: np.ndarray, class_names: list[str], what: str) -> tuple[np.ndarray, list[str]]:
        """Labels and names, of images in one class each; raises UserError where that can't be."""
        ...

    def merged(self, labels: np.ndarray) -> np.ndarray | None:
        """One label, of several rows about the same image; None where they contradict each other."""
        ...

    def check(self, labels: np.ndarray, names: list[str], what: str) -> None:
        """Raise UserError for labels that nothing can be learnt from."""
        ...

    def strata(self, labels: np.ndarray) -> np.ndarray | None:
        """What a held back part is to have in the same shares; None where that means nothing."""
        ...

    def relabelled(self, labels: np.ndarray, names: list[str], model_names: Sequence[str], what: str) -> np.ndarray:
        """Labels as the model's outputs are ordered; raises UserError for names that it doesn't know."""
        ...


class Classes:
    """One class an image: int64 (N,)."""

    def of_cells(self, cells: Cells, what: str) -> tuple[np.ndarray, list[str], np.ndarray]:
        """Classes are the distinct values, sorted; whole numbers by their size."""
        if len(cells) > 1:
            raise UserError(
                f"{what}: one class an image is learnt from one column, got target {abbreviate(list(cells))}; several "
                "labels an image: --task multilabel; numbers: --task regress"
            )
        texts = [_text(cell) for cell in next(iter(cells.values()))]
        missing = np.array([not text for text in texts], dtype=bool)
        distinct = {text for text in texts if text}
        if len(distinct) > MAX_CLASSES:
            raise UserError(f"{what} has {len(distinct):,} distinct labels; at most {MAX_CLASSES:,} can be learnt")
        whole = all(text.isdecimal() for text in distinct)
        names = sorted(distinct, key=lambda text: (int(text), text)) if whole else sorted(distinct)
        index = {name: i for i, name in enumerate(names)}
        return np.array([index.get(text, -1) for text in texts], dtype=np.int64), names, missing

    def of_classes(self, labels: np.ndarray, class_names: list[str], what: str) -> tuple[np.ndarray, list[str]]:
        """As they are."""
        return labels, class_names

    def merged(self, labels: np.ndarray) -> np.ndarray | None:
        """The class, if it is one."""
        return labels[0] if (labels == labels[0]).all() else None

    def check(self, labels: np.ndarray, names: list[str], what: str) -> None:
        """Two classes or more; of numbers that hardly repeat say so."""
        if len(names) < 2 or len(np.unique(labels)) < 2:
            raise UserError(f"{what} has images of one class only ({abbreviate(names)}); 2 or more are needed")
        if len(names) > max(20, len(labels) // 2) and all(_number(name) is not None for name in names):
            raise UserError(
                f"{what} has {len(names):,} distinct numbers as labels of {len(labels):,} images: to learn numbers, "
                "give --task regress"
            )

    def strata(self, labels: np.ndarray) -> np.ndarray | None:
        """The classes."""
        return labels

    def relabelled(self, labels: np.ndarray, names: list[str], model_names: Sequence[str], what: str) -> np.ndarray:
        """By name, as :func:`~transcnn.data.names.match_names` finds them."""
        order, unknown = match_names(names, model_names)
        if unknown:
            raise UserError(
                f"{what} has {len(names)} classes, of which the model does not know {abbreviate(unknown)}; "
                f"it knows {len(model_names)}: {abbreviate(distinct_names(model_names))}"
            )
        return np.array(order)[labels]


CLASSES = Classes()


def _text(cell: Any) -> str:
    """A cell as the name of a class; "" where it has none."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    text = normalise(str(cell)).strip()
    return "" if text.casefold() in MISSING else text


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
