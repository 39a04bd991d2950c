"""Tables of files and labels as people and tools write them: CSV, TSV, JSON lines, Parquet, read into columns.

Nothing here knows what is learnt; :mod:`.targets` makes labels of cells, :mod:`.table_source` images of rows.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import UserError, require
from ...text import printable
from ..listing import folders_in
from .parquet import read_bounded, refuse_bombs
from .source import abbreviate, first_line

__all__ = [
    "FileFinder",
    "ListedFiles",
    "TableRows",
    "find_column",
    "is_table",
    "list_files",
    "metadata_tables",
    "names_of_rows",
    "read_table",
]

ENDINGS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".pq")
FILE_COLUMNS = ("file", "file_name", "filename", "path", "image")
METADATA = ("metadata.csv", "metadata.tsv", "metadata.jsonl", "metadata.parquet")  # as Hugging Face datasets name it
DELIMITERS = ",;\t|"
MAX_COLUMNS = 10_000
SPARE_CELLS = 10_000_000  # that a file may have empty, beside one for each of its bytes


@dataclass
class TableRows:
    """A table's columns, which are equally long.

    Attributes:
        path: Where it was read from.
        columns: By name; cells are texts, of JSON and Parquet also numbers, booleans, lists and None.
        rows: Of each row its number for messages: the line in a text file, else counted from 1.
        broken: (name, reason) of rows that can't be read.
        images: The column of encoded images, where a Parquet file holds them; then ``columns`` lacks it.
    """

    path: Path
    columns: dict[str, list[Any]]
    rows: list[int]
    broken: list[tuple[str, str]] = field(default_factory=list)
    images: Any = None

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, name: str) -> list[Any]:
        """A column by its name, in any case.

        Raises:
            UserError: There is none, or there are several that differ in case alone.
        """
        found = [name] if name in self.columns else [c for c in self.columns if c.casefold() == name.casefold()]
        if len(found) != 1:
            raise UserError(f"{self.path} has no column {name!r}; its columns are {abbreviate(list(self.columns))}")
        return self.columns[found[0]]


def is_table(name: str | os.PathLike[str]) -> bool:
    """Whether a file's name says that it is a table."""
    return Path(name).suffix.lower() in ENDINGS


def metadata_tables(folder: Path, splits: dict[str, Sequence[str]]) -> list[tuple[Path, str | None]]:
    """A folder's ``metadata.csv`` (or .tsv, .jsonl, .parquet), or those in its splits' folders, each with its split."""
    whole: list[tuple[Path, str | None]] = [(folder / name, None) for name in METADATA if (folder / name).is_file()]
    parts: list[tuple[Path, str | None]] = [
        (folder / inner / name, split)
        for split, words in splits.items()
        for inner in folders_in(folder)
        for name in METADATA
        if inner.lower() in words and (folder / inner / name).is_file()
    ]
    return whole[:1] or parts


def read_table(path: Path) -> TableRows:
    """The rows of a table file, blank lines left out.

    Raises:
        UserError: It can't be read as what its name says, has no header or no rows.
    """
    ending = path.suffix.lower()
    try:
        if ending in (".parquet", ".pq"):
            return _read_parquet(path)
        with path.open("rb") as file:
            start = file.read(4)
        encoding = "utf-16" if start[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"  # spreadsheets write both
        with path.open(encoding=encoding, newline="") as lines:
            table = _read_json_lines(path, lines) if ending in (".jsonl", ".ndjson") else _read_csv(path, lines)
    except UnicodeError as error:
        raise UserError(f"{path} is no text in UTF-8: {first_line(error)}") from error
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror or error}") from error
    if not len(table):
        raise UserError(f"{path} has no rows")
    return table


def find_column(table: TableRows, wanted: str | None) -> list[Any] | None:
    """The column of files: the one that is wanted, else the first of the usual names; None where images are inside.

    Raises:
        UserError: There is none.
    """
    if wanted is not None:
        return table.column(wanted)
    if table.images is not None:
        return None
    names = {name.strip().casefold(): name for name in reversed(table.columns)}
    found = next((names[known] for known in FILE_COLUMNS if known in names), None)
    if found is None:
        raise UserError(
            f"{table.path} has no column of files: expected one named {', '.join(FILE_COLUMNS)}, or --file_column; its "
            f"columns are {abbreviate(list(table.columns))}"
        )
    return table.columns[found]


class FileFinder:
    """Where the files are that a table names: relative to a folder, absolute, or absolute on another machine.

    Of an absolute path that isn't here (``C:\\data\\cats\\1.jpg``) the end that lies in the folder counts.

    Args:
        folder: What names are relative to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = os.path.abspath(folder)
        self._left_out = 1  # leading parts of paths of another machine that the folder stands for

    def path(self, name: str) -> str | None:
        """The path of a file; None where it would lead out of the folder."""
        name = name.strip()
        if os.path.isfile(found := os.path.join(self.folder, name)) and os.path.isabs(name):
            return found
        slashed = name if os.path.exists(found) else name.replace("\\", "/")
        if os.path.isabs(slashed) or re.match(r"[A-Za-z]:/", slashed):
            return self._elsewhere(slashed)
        found = os.path.normpath(os.path.join(self.folder, slashed))
        inside = found.startswith(os.path.join(self.folder, ""))
        return found if inside else None

    def _elsewhere(self, name: str) -> str:
        parts = [part for part in name.split("/") if part not in ("", ".", "..")][:64]
        for left_out in (self._left_out, *range(len(parts))):
            found = os.path.join(self.folder, *parts[left_out:])
            if parts[left_out:] and os.path.isfile(found):
                self._left_out = left_out
                return found
        return name


def _read_csv(path: Path, lines: Any) -> TableRows:
    text = "\t" if path.suffix.lower() == ".tsv" else None
    header = next((line for line in lines if line.strip()), "")
    skipped = 0
    lines.seek(0)
    delimiter = text or max(DELIMITERS, key=lambda mark: (_outside_quotes(header, mark), -DELIMITERS.index(mark)))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    names: list[str] = []
    cells: list[list[str]] = []
    rows: list[int] = []
    broken: list[tuple[str, str]] = []
    try:
        for row in reader:
            if not any(cell.strip() for cell in row):
                skipped += 1
            elif not names:
                names = _header(path, row)
            elif len(row) > len(names) and any(cell.strip() for cell in row[len(names) :]):
                broken.append((f"line {reader.line_num}", f"{len(row)} cells instead of {len(names)}"))
            else:
                cells.append([*row, *[""] * (len(names) - len(row))][: len(names)])
                rows.append(reader.line_num)
                _refuse_empty(path, len(rows) * len(names))
    except csv.Error as error:
        raise UserError(f"can't read {path} as CSV: line {reader.line_num}: {first_line(error)}") from error
    columns = [list(column) for column in zip(*cells, strict=True)] or [[] for _ in names]
    return TableRows(path, dict(zip(names, columns, strict=True)), rows, broken)


def _outside_quotes(line: str, mark: str) -> int:
    return re.sub(r'"[^"]*"', "", line).count(mark)


def _header(path: Path, row: list[str]) -> list[str]:
    names = [cell.strip() for cell in row]
    while names and not names[-1]:  # a delimiter at the line's end
        names.pop()
    names = [name or f"column {i + 1}" for i, name in enumerate(names)]
    if len(names) > MAX_COLUMNS:
        raise UserError(f"{path} has {len(names):,} columns; at most {MAX_COLUMNS:,} are read")
    if twice := sorted(name for name, count in Counter(names).items() if count > 1):
        raise UserError(f"{path} has several columns named {abbreviate(twice)}")
    return names


def _refuse_empty(path: Path, cells: int) -> None:
    """Refuse a small file of many names and many short lines: nearly all of its cells are empty, and take memory."""
    if cells > SPARE_CELLS and cells > SPARE_CELLS + path.stat().st_size:
        raise UserError(f"{path} has far more cells than text; leave out columns that are nearly always empty")


def _read_json_lines(path: Path, lines: Any) -> TableRows:
    columns: dict[str, list[Any]] = {}
    rows: list[int] = []
    broken: list[tuple[str, str]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict):
                raise ValueError("no names with values")
        except (ValueError, RecursionError) as error:
            broken.append((f"line {number}", f"is no JSON object: {first_line(error)}"))
            continue
        for name in entry:
            if name not in columns:
                if len(columns) >= MAX_COLUMNS:
                    raise UserError(f"{path} has more than {MAX_COLUMNS:,} different names in its lines")
                columns[name] = [None] * len(rows)
        rows.append(number)
        _refuse_empty(path, len(rows) * len(columns))
        for name, column in columns.items():
            column.append(entry.get(name))
    return TableRows(path, columns, rows, broken)


def _read_parquet(path: Path) -> TableRows:
    arrow: Any = require("pyarrow", "train")
    parquet: Any = require("pyarrow.parquet", "train")
    try:
        file = parquet.ParquetFile(path)
        refuse_bombs([path], path.stat().st_size, [file])
        table = read_bounded(file, None, path)
    except (arrow.ArrowException, OSError) as error:
        raise UserError(f"can't read {path} as Parquet: {first_line(error)}") from error
    images = None
    columns: dict[str, list[Any]] = {}
    for name in table.column_names:
        kind = table.schema.field(name).type
        encoded = arrow.types.is_struct(kind) or arrow.types.is_binary(kind) or arrow.types.is_large_binary(kind)
        if not encoded:
            columns[name] = table[name].to_pylist()
        elif images is None and name.casefold() in (*FILE_COLUMNS, "img", "jpg", "png"):
            images = table[name]
    return TableRows(path, columns, list(range(1, table.num_rows + 1)), images=images)


def names_of_rows(table: TableRows, files: list[Any] | None) -> Iterator[str]:
    """What each row's image is called: the cell that names its file, else the table with the row's number."""
    for i, row in enumerate(table.rows):
        cell = None if files is None else files[i]
        yield printable(cell) if isinstance(cell, str) and cell.strip() else f"{table.path.stem}/{row}"


@dataclass
class ListedFiles:
    """The files that a table names, a path for each row, and all of its columns."""

    files: list[str]
    columns: dict[str, list[Any]]


def list_files(path: Path, folder: str | None, file_column: str | None) -> ListedFiles:
    """What to predict: a file for each row of a table, wherever it lies.

    Args:
        path: The table.
        folder: What its names are relative to; without it, the table's own folder.
        file_column: Its column of files; without it, one of the usual names.

    Raises:
        UserError: It can't be read, or holds images instead of names.
    """
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    table = read_table(path)
    cells = find_column(table, file_column)
    if cells is None:
        raise UserError(f"{path} holds images itself; a table that names files is wanted here")
    finder = FileFinder(Path(folder) if folder else path.parent)
    # What leads out of the folder is left as it is named, below the folder, where nothing is.
    paths = [finder.path(cell) if isinstance(cell, str) and cell.strip() else None for cell in cells]
    files = [
        found or os.path.join(finder.folder, f"{cell}".replace("..", "__"))
        for found, cell in zip(paths, cells, strict=True)
    ]
    return ListedFiles(files, table.columns)
