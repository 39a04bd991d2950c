"""``transcnn models``: the networks of this package side by side.

Their figures lie in networks.csv, so that telling them needs no torch; others are counted. A network that is added or
changed needs the file written anew, which a test asks for: ``python -m transcnn.commands.models``.
"""

from __future__ import annotations

import csv as csv_format
from pathlib import Path
from typing import Any

from ..checkpoints.files import atomic_write, check_writable
from ..data.paths import StrPath, as_text
from ..errors import MAX_SIDE, check_range
from ..text import print_whole, rich_text

__all__ = ["FIGURES", "models", "read_figures"]

FIGURES = Path(__file__).parent / "networks.csv"


def models(names: list[str] | None = None, *, img_size: int | None = None, csv: StrPath | None = None) -> None:
    """List the networks: parameters, multiply-adds, input size, and the paper's ImageNet accuracy.

    Args:
        names: Networks to show, of this package or of timm; without it all of this package.
        img_size: Side of the images that multiply-adds are counted for; without it each network's own.
        csv: Also write a CSV file here.

    Raises:
        UserError: No such network.
    """
    from rich.table import Table

    check_range(1, MAX_SIDE, img_size=img_size)
    if csv:
        check_writable(Path(csv))
    known = read_figures()
    rows = [known[name] if name in known and img_size is None else _counted(name, img_size) for name in names or known]
    table = Table(box=None, header_style="bold")
    for column in ("name", "parameters", "multiply-adds", "of which\nlayers", "input", "top-1\n(paper)"):
        table.add_column(column, justify="left" if column == "name" else "right")
    for row in rows:
        top1 = "-" if row["paper_top1"] is None else f"{row['paper_top1']:.1f} %"
        size = "x".join(str(side) for side in row["input_size"])
        counts = [f"{row['params'] / 1e6:.2f} M", *(f"{row[key] / 1e9:.3f} G" for key in ("macs", "layer_macs"))]
        table.add_row(rich_text(row["name"]), *counts, size, top1)
    print_whole(table)
    print("Layers are what the paper counts: all but the products inside attention. Top-1 is the paper's figure on")
    print("ImageNet-1K; everything else was counted.")
    if csv:
        _write_csv(as_text(csv), rows)


def read_figures() -> dict[str, dict[str, Any]]:
    """The figures of this package's networks by name, each at its own input size, as ``plugging.cost.describe`` gives
    them."""
    with FIGURES.open(newline="", encoding="utf-8") as file:
        return {row["name"]: _from_text(row) for row in csv_format.DictReader(file)}


def _from_text(row: dict[str, str]) -> dict[str, Any]:
    counts = {key: int(row[key]) for key in ("params", "macs", "layer_macs")}
    size = [int(side) for side in row["input_size"].split("x")]
    top1 = float(row["paper_top1"]) if row["paper_top1"] else None
    return {"name": row["name"], **counts, "input_size": size, "paper_top1": top1}


def _counted(name: str, img_size: int | None = None) -> dict[str, Any]:
    from ..plugging.cost import describe  # which needs torch

    return describe(name, img_size)


def _write_csv(path: str, rows: list[dict[str, Any]]) -> None:
    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv_format.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows({**row, "input_size": "x".join(map(str, row["input_size"]))} for row in rows)

    atomic_write(Path(path), write)


if __name__ == "__main__":
    from ..variants import VARIANTS

    _write_csv(str(FIGURES), [_counted(name) for name in VARIANTS])
