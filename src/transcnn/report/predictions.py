"""The answers of ``transcnn predict`` as a CSV file and as a table on the screen, of every task."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..text import csv_cell, rich_text, stdout_console

__all__ = ["print_table", "write_csv"]

Row = dict[str, Any]


def write_csv(path: Path, rows: Sequence[Row], top_k: int, table: Mapping[str, Sequence[Any]] | None = None) -> None:
    """A line for each row: the columns of ``table``, as long as the rows, else the file; then error and answer.

    A column of the answer that the table has already is called ``predicted_...``.
    """
    ranks = range(1, max((len(_ranked(row)) for row in rows), default=top_k) + 1)
    named = list(dict.fromkeys(name for row in rows for name in row.get("values", ())))
    lists = ["labels"] if any("labels" in row for row in rows) else []
    columns = named or [*lists, *(f"{word}_{rank}" for rank in ranks for word in ("label", "score"))]
    kept = {"file": [row["file"] for row in rows]} if table is None else table
    header = [*kept, *(f"predicted_{name}" if name in kept else name for name in ("error", *columns))]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(map(csv_cell, header))
        for i, row in enumerate(rows):
            if named:
                cells = [f"{row['values'][name]:.8g}" for name in named if "values" in row]
            else:
                cells = [";".join(row.get(name, ())) for name in lists]
                cells += [value for label, score in _ranked(row) for value in (label, f"{score:.6f}")]
            given = [_cell(column[i]) for column in kept.values()]
            line = [*given, row.get("error", ""), *cells]
            writer.writerow(map(csv_cell, [*line, *[""] * (len(header) - len(line))]))


def print_table(rows: Sequence[Row], most: int = 5) -> None:
    """The rows on standard output; labels that hold come before the scores of all."""
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    table.add_column("file", overflow="fold")
    table.add_column("predictions, most confident first")
    for row in rows:
        text = rich_text(_words(row, most))
        if "error" in row:
            text = rich_text(f"can't be read: {row['error']}", "red")
        table.add_row(rich_text(row["file"]), text)
    stdout_console().print(table)


def _words(row: Row, most: int) -> str:
    ranked = _ranked(row)
    if "values" in row:
        return "  ".join(f"{name} {number:,.6g}" for name, number in ranked)
    words = [f"{label} {100 * score:.1f} %" for label, score in ranked[:most]]
    words += [f"and {len(ranked) - most} more"] if len(ranked) > most else []
    if "labels" in row:
        words.insert(0, f"{', '.join(row['labels']) or 'no label'}:")
    return "  ".join(words) or "nothing found"


def _ranked(row: Row) -> list[tuple[str, float]]:
    """Labels with scores, or with shares of the image; or numbers by their names."""
    if "values" in row:
        return list(row["values"].items())
    found = row.get("top") or row.get("classes") or row.get("boxes") or ()
    return [(entry["label"], entry["score"] if "score" in entry else entry["share"]) for entry in found]


def _cell(value: Any) -> Any:
    """A table's cell as text: lists as their items, nothing for None."""
    if isinstance(value, list | tuple):
        return ";".join(map(str, value))
    return "" if value is None else value if isinstance(value, str) else str(value)
