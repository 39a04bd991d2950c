"""Images with labels out of tables: each row a file (or an encoded image) and its labels, in splits."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...errors import UserError
from ...settings import Table
from ..images import read_bytes, read_image
from .parquet import ImageColumn
from .source import SPLITS, Source, SourceSplits, abbreviate, first_reasons
from .table import FileFinder, TableRows, find_column, names_of_rows, read_table
from .targets import Targets, text_of

__all__ = ["NO_LABEL", "Row", "TableImages", "open_table", "rows_of", "target_names"]

NO_LABEL = "has no label"  # at the end of the reason why a row is left out

logger = logging.getLogger(__name__)

LABEL_COLUMNS = ("label", "labels", "class", "target", "tags")


class TableImages:
    """The images of a table's rows: files by their paths, or encoded images of one column.

    Args:
        paths: Of each image its file; "" where it is in ``columns``.
        names: What each is called in messages and reports.
        columns: (the column, its row) of each image that a Parquet file holds.
    """

    def __init__(
        self, paths: list[str], names: list[str], columns: list[tuple[ImageColumn, int]] | None = None
    ) -> None:
        self.paths, self.names, self.columns = paths, names, columns

    def name(self, i: int) -> str:
        """What the image is called."""
        return self.names[i]

    def raw(self, i: int) -> bytes:
        """The encoded image; raises BrokenImage."""
        if self.columns is None:
            return read_bytes(self.paths[i])
        column, row = self.columns[i]
        return column.raw(row)

    def load(self, i: int) -> Image.Image:
        """The decoded image; raises BrokenImage."""
        return read_image(self.paths[i] if self.columns is None else self.raw(i))

    def size(self, i: int) -> int:
        """The file's size in bytes; -1 where it isn't known."""
        try:
            return os.stat(self.paths[i]).st_size if self.paths[i] else -1
        except OSError:
            return -1


class Row:
    """One row that has an image: what it is called, where it lies, its cells and its place in a split."""

    __slots__ = ("cells", "group", "image", "key", "line", "name", "split")

    def __init__(self, name: str, key: str, image: Any, line: str, cells: tuple[Any, ...], split: str | None) -> None:
        self.name, self.key, self.image, self.line, self.cells, self.split = name, key, image, line, cells, split
        self.group: Any = None


def target_names(target: Sequence[str] | None, columns: Sequence[str] = ()) -> list[str] | None:
    """The columns to learn: names as they were given, those with commas split where no column is called so."""
    if target is None:
        return None
    names = [
        part.strip() for name in target for part in ([name] if name in columns else name.split(",")) if part.strip()
    ]
    if not names:
        raise UserError(f"target must name a column, got {list(target)}")
    return list(dict.fromkeys(names))


def open_table(tables: Sequence[tuple[Path, str | None]], name: str, options: Table, targets: Targets) -> SourceSplits:
    """The splits of one or more tables, each given with the split that all of its rows are in, if that is known.

    Rows whose file isn't there, that have no label, or contradict each other about an image, are left out and listed.

    Raises:
        UserError: A table that can't be read, a column that isn't there, labels that can't be, or nothing left.
    """
    what = str(tables[0][0])
    broken: dict[str, list[tuple[str, str]]] = {split: [] for split in SPLITS}
    rows: list[Row] = []
    wanted: list[str] = []
    for path, split in tables:
        table = read_table(path)
        wanted = _wanted(table, options)
        rows += rows_of(table, options, wanted, split, broken)
    if not rows:
        left_out = sum(map(len, broken.values()))
        raise UserError(
            f"none of the {left_out} images of {what} can be used{first_reasons(broken)}; names are relative to "
            f"{options.images or tables[0][0].parent}, another folder: --images DIR"
        )
    labels, names, unlabelled = targets.of_cells(
        {column: [row.cells[i] for row in rows] for i, column in enumerate(wanted)}, what, options.separator
    )
    if unlabelled.all():
        raise UserError(f"no row of {what} has a label in {abbreviate(wanted)}")
    labelled = {split for row, no in zip(rows, unlabelled, strict=True) if not no for split in [row.split or "train"]}
    for row, no in zip(rows, unlabelled, strict=True):
        if no and (row.split or "train") in labelled:  # a split without any label is one to predict
            broken[row.split or "train"].append((row.name, f"{row.line} {NO_LABEL}"))
    kept = np.flatnonzero(~unlabelled)
    sources = _sources([rows[i] for i in kept], labels[kept], names, targets, broken)
    return SourceSplits.of(name, sources)


def rows_of(
    table: TableRows,
    options: Table,
    wanted: Sequence[str],
    split: str | None,
    broken: dict[str, list[tuple[str, str]]],
) -> list[Row]:
    """The rows whose image is there; to ``broken`` those whose file isn't, by split."""
    files = find_column(table, options.file_column)
    finder = FileFinder(Path(options.images) if options.images else table.path.parent)
    embedded = None if files is not None else ImageColumn(table.images, table.path.parent, table.path.stem)
    splits = _splits(table, options.split_column)
    groups = None if options.group is None else table.column(options.group)
    cells = [table.column(name) for name in wanted]
    found: list[Row] = []
    broken["train"] += table.broken
    for i, name in enumerate(names_of_rows(table, files)):
        part = split or splits[i]
        image: Any = (embedded, i)
        key = f"{table.path}:{i}"
        if files is not None:
            path, reason = _file(finder, files[i])
            if reason:
                broken[part or "train"].append((name, f"{reason} (row {table.rows[i]})"))
                continue
            image = key = path
        row = Row(name, key, image, f"row {table.rows[i]}", tuple(column[i] for column in cells), part)
        row.group = None if groups is None else groups[i]
        found.append(row)
    return found


def _wanted(table: TableRows, options: Table) -> list[str]:
    """The columns to learn: the ones asked for, else the one that usually holds the label."""
    given = target_names(options.target, list(table.columns))
    if given is not None:
        return given
    names = {name.casefold(): name for name in reversed(table.columns)}
    found = next((names[known] for known in LABEL_COLUMNS if known in names), None)
    if found is None:
        raise UserError(
            f"{table.path} has no column 'label'; give --target NAME, one of {abbreviate(list(table.columns))}"
        )
    return [found]


def _file(finder: FileFinder, cell: Any) -> tuple[str, str]:
    """The path of a cell's file, and why it can't be read, if it can't."""
    if not isinstance(cell, str) or not cell.strip():
        return "", "no file is named"
    path = finder.path(cell)
    if path is None:
        return "", f"leads out of {finder.folder}"
    try:
        return path, "" if os.path.isfile(path) else "no such file"
    except ValueError:  # a null byte
        return "", "no such file"


def _splits(table: TableRows, wanted: str | None) -> list[str | None]:
    """Of each row its split; None where the table doesn't say."""
    names = {name.casefold(): name for name in table.columns}
    if wanted is None and "split" not in names:
        return [None] * len(table)
    cells = table.column(wanted or names["split"])
    words = {word: split for split, synonyms in SPLITS.items() for word in synonyms}
    known = {"": "train", **words}
    texts = ["" if cell is None else str(cell).strip().casefold() for cell in cells]
    if odd := sorted({text for text in texts if text not in known}):
        raise UserError(
            f"{table.path}: the column {wanted or names['split']!r} has {abbreviate(odd)}; allowed: train, val, test"
        )
    return [known[text] for text in texts]


def _sources(
    rows: list[Row], labels: np.ndarray, names: list[str], targets: Targets, broken: dict[str, list[tuple[str, str]]]
) -> dict[str, Source]:
    """A source of each split's rows, each image once."""
    members: dict[str, dict[str, list[int]]] = {}
    for i, row in enumerate(rows):
        members.setdefault(row.split or "train", {}).setdefault(row.key, []).append(i)
    _warn_of_leaks(rows, members)
    sources = {}
    for split in SPLITS:
        chosen: list[int] = []
        values: list[np.ndarray] = []
        for same in members.get(split, {}).values():
            label = targets.merged(labels[same])
            if label is None:
                lines = abbreviate([rows[i].line for i in same]).replace("'", "")
                broken[split].append((rows[same[0]].name, f"its labels contradict each other ({lines})"))
                continue
            chosen.append(same[0])
            values.append(label)
        if chosen:
            sources[split] = _source([rows[i] for i in chosen], np.stack(values), names, broken[split])
    return sources


def _source(rows: list[Row], labels: np.ndarray, names: list[str], broken: list[tuple[str, str]]) -> Source:
    embedded = not isinstance(rows[0].image, str)
    paths = ["" if embedded else row.image for row in rows]
    images = TableImages(paths, [row.name for row in rows], [row.image for row in rows] if embedded else None)
    groups = None
    if any(row.group is not None for row in rows):
        called = [text_of(row.group) for row in rows]
        groups = np.unique(called, return_inverse=True)[1].reshape(-1)
        alone = np.array([not group for group in called], bool)  # of no group: each may be held back by itself
        groups[alone] = len(rows) + np.arange(alone.sum())
    return Source(
        labels,
        names,
        images.load,
        images.name,
        broken,
        raw=images.raw,
        size_of=None if embedded else images.size,
        together=groups,
    )


def _warn_of_leaks(rows: Sequence[Row], members: dict[str, dict[str, list[int]]]) -> None:
    """Log images, and groups of them, that are in more than one split."""
    places = {(group, row.split) for row in rows if (group := text_of(row.group))}
    groups = Counter(group for group, _ in places)
    if torn := [group for group, count in groups.items() if count > 1]:
        logger.warning("%d groups are in more than one split: %s", len(torn), abbreviate(torn))
    counts = Counter(key for keys in members.values() for key in keys)
    if twice := [Path(key).name for key, count in counts.items() if count > 1]:
        logger.warning("%d images are in more than one split: %s", len(twice), abbreviate(twice))
