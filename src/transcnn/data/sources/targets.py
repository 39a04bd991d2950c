"""What is learnt of each image: labels made of a table's cells, or of the classes that other sources have.

A kind of target is one class here. Labels are an array with an entry or a row for each image.
"""

from __future__ import annotations

import ast
import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

import numpy as np

from ...errors import UserError
from ..names import alike_but_for_case, case_hint, distinct_names, match_names, normalise
from .source import MAX_CLASSES, abbreviate

__all__ = ["CLASSES", "Cells", "Classes", "Labels", "Numbers", "Targets", "text_of"]

logger = logging.getLogger(__name__)

Cells = Mapping[str, Sequence[Any]]  # the columns to learn, by name
MISSING = ("", "nan")  # of text, in any case
SEPARATORS = ";|,"  # of the labels in a cell
FLAGS = {"0": 0.0, "1": 1.0, "0.0": 0.0, "1.0": 1.0, "false": 0.0, "true": 1.0, "no": 0.0, "yes": 1.0}
MAX_LABELS = 10_000
COMMA = re.compile(r"[-+]?\d+,\d+")
THOUSANDS = re.compile(r"[-+]?[1-9]\d{0,2},\d{3}")  # what a comma between thousands looks like


class Targets(Protocol):
    """How labels are made, compared with a model's, and held back."""

    def of_cells(
        self, cells: Cells, what: str, separator: str | None = None
    ) -> tuple[np.ndarray, list[str], np.ndarray]:
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

    def of_cells(
        self, cells: Cells, what: str, separator: str | None = None
    ) -> tuple[np.ndarray, list[str], np.ndarray]:
        """Classes are the distinct values, sorted; whole numbers by their size."""
        if len(cells) > 1:
            raise UserError(
                f"{what}: one class an image is learnt from one column, got target {abbreviate(list(cells))}; several "
                "labels an image: --task multilabel; numbers: --task regress"
            )
        texts = [text_of(cell) for cell in next(iter(cells.values()))]
        missing = np.array([not text for text in texts], dtype=bool)
        distinct = {text for text in texts if text}
        if len(distinct) > MAX_CLASSES:
            raise UserError(f"{what} has {len(distinct):,} distinct labels; at most {MAX_CLASSES:,} can be learnt")
        whole = all(text.isdecimal() for text in distinct)
        names = sorted(distinct, key=lambda text: (int(text), text)) if whole else sorted(distinct)
        _warn_of_case(names, what)
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
            known = abbreviate(distinct_names(model_names))
            raise UserError(
                f"{what} has {len(names)} classes, of which the model does not know {abbreviate(unknown)}; "
                f"it knows {len(model_names)}: {known}{case_hint(unknown, model_names)}"
            )
        return np.array(order)[labels]


CLASSES = Classes()


class Labels:
    """Any number of labels an image: float32 (N, labels) of 1, 0, and NaN where it isn't known."""

    def __init__(self) -> None:
        self._complete = True  # a label that the data doesn't name at all is one that no image has

    def of_cells(
        self, cells: Cells, what: str, separator: str | None = None
    ) -> tuple[np.ndarray, list[str], np.ndarray]:
        """One column of lists or of names with separators, or columns of 0 and 1 that are named as their labels."""
        texts = {
            name: [text_of(cell) if not isinstance(cell, list) else "," for cell in c] for name, c in cells.items()
        }
        if len(cells) == 1 and not all(text.casefold() in {*FLAGS, ""} for text in next(iter(texts.values()))):
            return self._of_lists(next(iter(cells.values())), what, separator)
        self._complete = False
        columns = []
        for name, column in texts.items():
            if odd := sorted({text for text in column if text.casefold() not in {*FLAGS, ""}}):
                raise UserError(f"{what}: the column {name!r} of a label must hold 0 or 1, got {abbreviate(odd)}")
            columns.append([FLAGS.get(text.casefold(), math.nan) for text in column])
        labels = np.array(columns, np.float32).T  # (N, labels)
        return labels, distinct_names(cells), np.isnan(labels).all(1)

    def _of_lists(
        self, cells: Sequence[Any], what: str, separator: str | None
    ) -> tuple[np.ndarray, list[str], np.ndarray]:
        texts = [cell.strip() for cell in cells if isinstance(cell, str) and _names(cell, SEPARATORS[0])]
        if texts and all(text.startswith("[") and text.endswith("]") for text in texts):
            cells, texts = [_list_of(cell, what) for cell in cells], []
        mark = separator or next((mark for mark in SEPARATORS if any(mark in text for text in texts)), SEPARATORS[0])
        lists = [_names(cell, mark) for cell in cells]
        names = sorted({name for found in lists for name in found or ()})
        if not names or len(names) > MAX_LABELS:
            raise UserError(f"{what} has {len(names):,} different labels; from 1 to {MAX_LABELS:,} can be learnt")
        _warn_of_case(names, what)
        spaced = [name for name in names if " " in name]
        if texts and spaced and all(len(found or ()) < 2 for found in lists):
            logger.warning(
                "%s: no image has more than one label, and some hold spaces, such as %r: if spaces stand between "
                "labels, give --separator ' '",
                what,
                spaced[0],
            )
        index = {name: i for i, name in enumerate(names)}
        labels = np.zeros((len(lists), len(names)), np.float32)
        for row, found in zip(labels, lists, strict=True):
            if found is None:
                row[:] = math.nan
            else:
                row[[index[name] for name in found]] = 1
        return labels, names, np.array([found is None for found in lists])

    def of_classes(self, labels: np.ndarray, class_names: list[str], what: str) -> tuple[np.ndarray, list[str]]:
        """Each image has the one label of its class."""
        return np.eye(len(class_names), dtype=np.float32)[labels], class_names

    def merged(self, labels: np.ndarray) -> np.ndarray | None:
        """Rows about one image add up their labels."""
        return np.fmax.reduce(labels)

    def check(self, labels: np.ndarray, names: list[str], what: str) -> None:
        """Some label must be on some images and not on others."""
        if not ((labels == 1).any(0) & (labels == 0).any(0)).any():
            raise UserError(f"{what}: no label is on some images and not on others, so there is nothing to learn")

    def strata(self, labels: np.ndarray) -> np.ndarray | None:
        """The rarest of an image's labels."""
        counts = (labels == 1).sum(0)
        rarity = np.where(labels == 1, counts, len(labels) + 1)
        return np.where((labels == 1).any(1), rarity.argmin(1), labels.shape[1])

    def relabelled(self, labels: np.ndarray, names: list[str], model_names: Sequence[str], what: str) -> np.ndarray:
        """By name; of labels that aren't there no image has any, or where each has a column it isn't known."""
        order, unknown = match_names(names, model_names)
        if unknown:
            raise UserError(
                f"{what} has labels that the model does not know: {abbreviate(unknown)}; it knows {len(model_names)}: "
                f"{abbreviate(distinct_names(model_names))}{case_hint(unknown, model_names)}"
            )
        found = np.full((len(labels), len(model_names)), 0.0 if self._complete else math.nan, np.float32)
        found[:, order] = labels
        found[np.isnan(labels).all(1)] = math.nan
        return found


class Numbers:
    """Numbers of an image: float32 (N, columns), NaN where one isn't known."""

    def of_cells(
        self, cells: Cells, what: str, separator: str | None = None
    ) -> tuple[np.ndarray, list[str], np.ndarray]:
        """Each column's numbers, with a decimal point or comma; refused where commas may be meant otherwise."""
        columns = []
        for name, column in cells.items():
            commas = [text for text in map(text_of, column) if COMMA.fullmatch(text)]
            if commas and all(THOUSANDS.fullmatch(text) for text in commas):
                raise UserError(
                    f"{what}: the column {name!r} has {commas[0]!r}, which may be {commas[0].replace(',', '.')} or "
                    f"{commas[0].replace(',', '')}; write numbers with a decimal point, and no mark between thousands"
                )
            found = [_number(text_of(cell)) if text_of(cell) else math.nan for cell in column]
            for cell, number in zip(column, found, strict=True):
                if number is None or math.isinf(number):
                    raise UserError(f"{what}: the column {name!r} must hold numbers, got {str(cell)[:60]!r}")
            columns.append(found)
        labels = np.array(columns, np.float64).T.astype(np.float32)  # (N, columns)
        return labels, distinct_names(cells), np.isnan(labels).all(1)

    def of_classes(self, labels: np.ndarray, class_names: list[str], what: str) -> tuple[np.ndarray, list[str]]:
        """The classes' names are the numbers."""
        numbers = [_number(name) for name in class_names]
        if odd := [
            n for n, number in zip(class_names, numbers, strict=True) if number is None or not math.isfinite(number)
        ]:
            raise UserError(
                f"{what}: to learn numbers, its class folders must be named as numbers, got {abbreviate(odd)}; or give "
                "a table and --target COLUMN"
            )
        return np.array(numbers, np.float32)[labels][:, None], ["value"]

    def merged(self, labels: np.ndarray) -> np.ndarray | None:
        """The numbers, where all rows have the same."""
        lowest, highest = np.fmin.reduce(labels), np.fmax.reduce(labels)
        return lowest if np.array_equal(lowest, highest, equal_nan=True) else None

    def check(self, labels: np.ndarray, names: list[str], what: str) -> None:
        """Each column has more than one number."""
        for name, column in zip(names, labels.T, strict=True):
            if len(np.unique(column[~np.isnan(column)])) < 2:
                raise UserError(f"{what}: {name!r} is the same number for all images, so there is nothing to learn")

    def strata(self, labels: np.ndarray) -> np.ndarray | None:
        """None: any images may be held back."""
        return None

    def relabelled(self, labels: np.ndarray, names: list[str], model_names: Sequence[str], what: str) -> np.ndarray:
        """By name; a single column stands for a single number."""
        if len(names) == len(model_names) == 1:
            return labels
        if missing := [name for name in model_names if name not in names]:
            raise UserError(
                f"{what} has no {abbreviate(missing)}, which the model predicts; it has {abbreviate(names)}"
            )
        return labels[:, [names.index(name) for name in model_names]]


def _names(cell: Any, mark: str) -> list[str] | None:
    """The labels of a cell; None where it isn't known which."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return None
    if isinstance(cell, str) and cell.strip().casefold() in ("nan", "null"):
        return None
    parts = cell if isinstance(cell, list) else str(cell).split(mark)
    return [text for part in parts if (text := text_of(part))]


def _list_of(cell: Any, what: str) -> Any:
    """A list that was written as text, as Python (and so pandas) and JSON do: ``['cat', 'dog']``; other cells stay."""
    if not isinstance(cell, str) or not cell.strip().startswith("["):
        return cell
    found: Any = None
    try:
        found = json.loads(cell)
    except (ValueError, RecursionError):
        if not re.search(r"['\"]\s+['\"]", cell):  # NumPy's, without commas: Python would join the texts
            with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                found = ast.literal_eval(cell.strip())
    if not isinstance(found, list) or not all(isinstance(part, str | int | float) for part in found):
        raise UserError(f"{what}: {cell[:60]!r} is no list of names in quotes with commas between")
    return found


def _warn_of_case(names: Sequence[str], what: str) -> None:
    for same in alike_but_for_case(names):
        logger.warning("%s: labels %s differ only in case and are kept apart", what, abbreviate(same))


def text_of(cell: Any) -> str:
    """A cell as the name of a class; "" where it has none."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    text = normalise(str(cell)).strip()
    return "" if text.casefold() in MISSING else text


def _number(text: str) -> float | None:
    if "_" in text:  # Python would take 2020_01 for 202001
        return None
    try:
        return float(text.replace(",", ".") if COMMA.fullmatch(text) else text)
    except ValueError:
        return None
