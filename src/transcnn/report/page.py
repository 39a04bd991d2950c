"""The page of a report, and its parts: heading, figures as people write them, tables, CSV files."""

from __future__ import annotations

import csv
import math
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoints.files import atomic_write
from ..text import csv_cell, html, without_passwords

__all__ = ["facts_of", "heading", "html_page", "html_table", "percent", "skipped_files", "write_rows"]

MAX_ROWS = 50  # of a table on the page
PERCENT = (
    "top1",
    "top5",
    "miou",
    "pixel_accuracy",
    "mean_accuracy",
    "map",
    "mask_map",
    "balanced_accuracy",
    "macro_precision",
    "macro_f1",
    "micro_f1",
    "exact_match",
)  # and the same of the epoch that was chosen: val_...
NAMES = {
    "top1": "top-1",
    "top5": "top-5",
    "miou": "mIoU",
    "map": "mAP",
    "mask_map": "mask mAP",
    "auroc": "AUROC",
    "macro_f1": "macro F1",
    "micro_f1": "micro F1",
    "mae": "MAE",
    "rmse": "RMSE",
    "r2": "R²",
    "spearman": "Spearman",
}
TITLES = {
    "classify": "classification",
    "multilabel": "multi-label classification",
    "regress": "regression",
    "segment": "segmentation",
    "detect": "detection",
}
IN_HEADING = {"task", "split", "data", "images", "checkpoint", "model", "input_size"}

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #111 }}
h1, h2, p, code {{ overflow-wrap: anywhere }}
img {{ max-width: 100%; height: auto }}
.wide {{ overflow-x: auto }}
.about {{ color: #444 }}
table {{ border-collapse: collapse }}
td, th {{ padding: .2rem 1.5rem .2rem 0; text-align: left; border-bottom: 1px solid #ddd }}
td {{ font-variant-numeric: tabular-nums; min-width: 4rem; overflow-wrap: anywhere }}
h2 {{ margin-top: 2.5rem }}
@media print {{ h2 {{ break-after: avoid }} img, tr {{ break-inside: avoid }} }}
</style></head>
<body>
{body}
</body></html>
"""


def html_page(parts: Sequence[str], title: str = "Report") -> str:
    """A page of these parts of HTML, one below the other."""
    return _PAGE.format(title=html(title), body="\n".join(part for part in parts if part))


def heading(run_dir: Path, metrics: Mapping[str, Any]) -> tuple[str, str]:
    """A title, and the top of a page as HTML: network, data, sizes, date and command."""
    settings = _settings(run_dir, metrics)
    model = metrics.get("model") or settings.get("model") or "Network"
    data = metrics.get("data") or settings.get("data")
    title = f"{model} on {data}" if data else f"{model}"
    about = [TITLES.get(str(metrics.get("task")), "")]
    if "images" in metrics:
        split = {"val": "validation", "train": "training"}.get(str(metrics.get("split")), metrics.get("split"))
        split = f"{split} split, " if split else ""
        about.append(f"{split}{metrics['images']:,} images")
    if size := metrics.get("input_size"):
        channels, height, width = size
        about.append(f"input {height}×{width}, {channels} channel{'s' if channels > 1 else ''}")
    about.append(time.strftime("%d %B %Y, %H:%M"))
    lines = [f"<h1>{html(title)}</h1>", f'<p class="about">{html(" · ".join(part for part in about if part))}</p>']
    if command := _command():
        lines.append(f"<p><code>{html(command)}</code></p>")
    return title, "\n".join(lines)


def _settings(run_dir: Path, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The run's settings: from its folder, the one above (an evaluation's), or the one of the weights."""
    from ..plain import load_plain

    folders = [run_dir, run_dir.parent, Path(str(metrics.get("checkpoint", ""))).parent]
    for folder in folders:
        try:
            settings = load_plain((folder / "config.yaml").read_text(encoding="utf-8"))
        except Exception:  # none there, or damaged: a heading is worth no error
            continue
        if isinstance(settings, dict):
            return settings
    return {}


def _command() -> str:
    """The command line that this process was started with; nothing where it is another program."""
    # Read here, not handed down: a heading alone shows it, and every function between would have to carry it.
    program = Path(sys.argv[0] if sys.argv else "")
    ours = program.stem == "transcnn" or program.parent.name == "transcnn"
    return without_passwords(shlex.join(["transcnn", *sys.argv[1:]])) if ours else ""


def facts_of(metrics: Mapping[str, Any]) -> list[list[str]]:
    """Name and value of each single figure, as people write them; what the heading says is left out."""
    return [
        [_name_of(key), _fact(key, value)]
        for key, value in metrics.items()
        if isinstance(value, str | int | float) and not isinstance(value, bool) and key not in IN_HEADING
    ]


def _name_of(key: str) -> str:
    if key in NAMES:
        return NAMES[key]
    return key.replace("map", "mAP").replace("miou", "mIoU").replace("_", " ").replace("/", " ")


def _fact(key: str, value: str | float) -> str:
    if isinstance(value, float) and math.isnan(value):
        return "–"
    if isinstance(value, float) and _is_percent(key.removeprefix("val_")):
        return f"{value:.1f} %"
    if key in ("seconds", "train_seconds"):
        return _duration(float(value))
    if key == "images_per_second":
        return f"{value:,.0f}" if float(value) >= 10 else f"{value:.2g}"
    if isinstance(value, float):
        return f"{value:.4f}" if key.endswith("loss") else f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) and key != "seed" else str(value)


def _is_percent(key: str) -> bool:
    return key in PERCENT or key.startswith(("map", "mask_map"))


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.1f} min" if hours < 1 else f"{hours:.1f} h"


def percent(share: float | None) -> str:
    """A share from 0 to 1 as people write it; a dash for None."""
    return "–" if share is None or math.isnan(share) else f"{100 * share:.1f} %"


def skipped_files(run_dir: Path) -> str:
    """The part of a page about files that could not be read; nothing where there were none."""
    try:
        with (run_dir / "skipped.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))[1:]
    except FileNotFoundError:
        return ""
    link = f'<p>{len(rows)} files were left out; as a file: <a href="../skipped.csv">skipped.csv</a></p>'
    return "\n".join(["<h2>Files that could not be read</h2>", html_table(["File", "Reason"], rows[:MAX_ROWS]), link])


def html_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """An HTML table, which scrolls by itself where it is wider than the page; nothing without rows."""

    def line(tag: str, cells: Sequence[Any]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html(cell)}</{tag}>" for cell in cells) + "</tr>"

    lines = [line("th", head)] if head else []
    table = ["<table>", *lines, *(line("td", row) for row in rows), "</table>"]
    return "\n".join(['<div class="wide">', *table, "</div>"]) if rows else ""


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> None:
    """Rows as a CSV file; numbers have six places."""

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fields)
            writer.writeheader()
            for row in rows:
                writer.writerow(
                    {k: round(value, 6) if isinstance(value, float) else csv_cell(value) for k, value in row.items()}
                )

    atomic_write(path, write)
