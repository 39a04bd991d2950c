"""``transcnn data``: what a data set is, before anything is trained on it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

from ..checkpoints.files import make_folder
from ..data.paths import StrPath, as_text, check_data_exists
from ..errors import UserError, check_range
from ..inspection.page import class_rows, fact_rows, write_page
from ..inspection.samples import open_data
from ..inspection.survey import survey
from ..settings import Table
from ..text import printable, rich_text, stdout_console

__all__ = ["data"]

SHOWN = 20  # classes on the screen


def data(
    data: StrPath | None = None,
    *,
    task: Literal["auto", "classify", "multilabel", "regress", "segment", "detect"] = "auto",
    images: StrPath | None = None,
    target: list[str] | None = None,
    out: StrPath | None = None,
    limit_images: int | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Look at a data set: counts by class and split, sizes, broken and odd files, exact duplicates, examples.

    Args:
        data: As for transcnn train.
        task: What it is to teach; auto goes by how the folder is laid out. Of several labels an image each is counted,
            of numbers there are quantiles and histograms.
        images: Folder that a table's files are relative to.
        target: A table's columns of labels or numbers.
        out: Folder for a page (index.html) with a sheet of examples, problems.csv and data.json.
        limit_images: Images of each split that are opened, spread evenly; without it all are.
        quiet: Print nothing but errors.

    Returns:
        What data.json holds: ``images``, ``splits``, ``classes``, ``sizes``, ``modes``, ``broken``, ``odd``,
        ``duplicates``, ``warnings`` and more.

    Raises:
        UserError: Data that can't be opened, or a folder that can't be written to.
    """
    check_range(1, limit_images=limit_images)
    if task in ("segment", "detect") and (images is not None or target is not None):
        raise UserError(f"images and target are for tables of labelled images, not for data to {task}")
    source = as_text(data)
    check_data_exists(source)
    if out is not None:
        make_folder(Path(out), "index.html", "examples.png", "problems.csv", "data.json")
    opened = open_data(source, task, Table(images=as_text(images), target=target))
    found = survey(opened, limit_images, progress=not quiet and sys.stderr.isatty())
    found = {"data": source or "digits", **found}
    if out is not None:
        write_page(Path(out), str(found["data"]), opened, found)
    if not quiet:
        _print(found)
        if out is not None:
            print(f"written: {printable(Path(out) / 'index.html')}")
    return found


def _print(found: dict[str, Any]) -> None:
    from rich.table import Table as Grid

    console = stdout_console()
    facts = Grid(box=None, show_header=False)
    for name, value in fact_rows(found):
        facts.add_row(name, rich_text(value))
    console.print(facts)
    head, rows = class_rows(found)
    grid = Grid(box=None, header_style="bold")
    for i, word in enumerate(head):
        grid.add_column(rich_text(word), justify="right" if i else "left")
    shown = rows if len(rows) <= SHOWN else [*rows[: SHOWN // 2], ["..."], *rows[-SHOWN // 2 :]]
    for row in shown:
        grid.add_row(*map(rich_text, row))
    console.print(grid)
    for line in found["warnings"]:
        print(f"transcnn: {printable(line)}", file=sys.stderr)
