"""The report of a run: figures, tables and a page that ties them together, from plain arrays."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError, require
from ..text import csv_cell, html
from .plots import Wrong, plot_classes, plot_confusion, plot_history, plot_pairs, plot_wrong, style

__all__ = [
    "Wrong",
    "class_table",
    "confused_pairs",
    "facts_of",
    "html_page",
    "html_table",
    "read_history",
    "skipped_part",
    "write_report",
    "write_rows",
]

MAX_MATRIX = 100  # more classes than that: no matrix, the most confused pairs instead
MAX_ROWS = 50  # of the page's table of classes


def write_report(
    run_dir: str | Path,
    history: str | Path | Mapping[str, Sequence[float]] | None,
    confusion: np.ndarray,
    class_names: Sequence[str],
    wrong: Sequence[tuple[Any, ...]],
    metrics: Mapping[str, Any],
) -> Path:
    """Write ``run_dir/report``: learning curves, confusion matrix, classes, wrong predictions and ``index.html``.

    Args:
        run_dir: The run's directory.
        history: Its ``metrics.csv``, or columns of the same names; None where nothing was trained.
        confusion: Counts (classes, classes), a row for each true class, a column for each predicted one.
        class_names: One name for each row.
        wrong: Wrong predictions to show, each an image, truth, prediction, score and name (:class:`Wrong`), most
            confident first.
        metrics: What was measured; single values head the page.

    Returns:
        The path of ``index.html``.

    Raises:
        UserError: ``confusion`` isn't square, or has another number of rows than there are names.
    """
    require("matplotlib", "train")
    confusion = _check_confusion(confusion, class_names)
    folder = Path(run_dir) / "report"
    folder.mkdir(parents=True, exist_ok=True)
    columns = {} if history is None else read_history(history)
    classes, pairs = class_table(confusion, class_names), confused_pairs(confusion, class_names)
    few = len(class_names) <= MAX_MATRIX
    figures = {
        "curves.png": lambda: plot_history(columns),
        "confusion.png": lambda: plot_confusion(confusion, class_names) if few else plot_pairs(pairs),
        "classes.png": lambda: plot_classes(classes),
        "wrong.png": lambda: plot_wrong(wrong, class_names),
    }
    for file, draw in figures.items():
        with style():
            figure = draw()
            if figure is None:  # nothing to show; no older figure may stand for it
                (folder / file).unlink(missing_ok=True)
            else:
                figure.savefig(folder / file)
    write_rows(folder / "classes.csv", classes, ["class", "images", "right", "accuracy", "precision", "taken_for"])
    write_rows(folder / "confused.csv", pairs, ["truth", "prediction", "images", "share"])
    page = folder / "index.html"
    page.write_text(_page(folder, metrics, classes, pairs), encoding="utf-8")
    return page


# --- tables ---------------------------------------------------------------------------------------------------------


def class_table(confusion: np.ndarray, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """One row for each class, lowest accuracy first; classes without images come last, their accuracy is None."""
    confusion = _check_confusion(confusion, class_names)
    errors = confusion - np.diag(confusion.diagonal())
    rows = []
    for i, name in enumerate(class_names):
        images, predicted, right = int(confusion[i].sum()), int(confusion[:, i].sum()), int(confusion[i, i])
        rows.append(
            {
                "class": name,
                "images": images,
                "right": right,
                "accuracy": right / images if images else None,
                "precision": right / predicted if predicted else None,
                "taken_for": class_names[int(errors[i].argmax())] if errors[i].any() else "",
            }
        )
    return sorted(rows, key=lambda row: (row["accuracy"] is None, row["accuracy"] or 0.0))


def confused_pairs(confusion: np.ndarray, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """Every truth that was predicted as another class, most frequent first; ``share`` is of the true class's images."""
    confusion = _check_confusion(confusion, class_names)
    totals = confusion.sum(axis=1)
    truths, predicted = np.nonzero(confusion - np.diag(confusion.diagonal()))
    pairs = [
        {
            "truth": class_names[t],
            "prediction": class_names[g],
            "images": int(confusion[t, g]),
            "share": float(confusion[t, g] / totals[t]),
        }
        for t, g in zip(truths.tolist(), predicted.tolist(), strict=True)
    ]
    return sorted(pairs, key=lambda pair: (-pair["images"], -pair["share"]))


def read_history(history: str | Path | Mapping[str, Sequence[float]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A run's ``metrics.csv`` as (epochs, values) for each column, cells that are empty left out.

    Where a column has several rows of an epoch, the last one counts. Without a column ``epoch`` each row is one,
    counted from 1.
    """
    if isinstance(history, str | Path):
        with open(history, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        table: dict[str, Sequence[Any]] = {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}
    else:
        table = dict(history)
    if not table:
        return {}
    longest = max(len(values) for values in table.values())
    epochs = [_number(e) for e in table.get("epoch", range(1, longest + 1))]
    columns = {}
    for name, values in table.items():
        cells = {e: v for e, v in zip(epochs, map(_number, values), strict=False) if not math.isnan(e + v)}
        if cells and name not in ("epoch", "step"):
            columns[name] = np.array(list(cells)), np.array(list(cells.values()))
    return columns


# --- the page -------------------------------------------------------------------------------------------------------

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Report</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #111 }}
img {{ max-width: 100% }}
table {{ border-collapse: collapse }}
td, th {{ padding: .2rem 1.5rem .2rem 0; text-align: left; border-bottom: 1px solid #ddd }}
td {{ font-variant-numeric: tabular-nums }}
h2 {{ margin-top: 2.5rem }}
@media print {{ h2 {{ break-after: avoid }} img, tr {{ break-inside: avoid }} }}
</style></head>
<body>
{body}
</body></html>
"""
_ALTERNATIVES = {
    "curves.png": "Loss, accuracy and learning rate over the epochs",
    "confusion.png": "Which class was predicted as which",
    "classes.png": "Accuracy of each class",
    "wrong.png": "Images with a wrong prediction",
}


def _page(folder: Path, metrics: Mapping[str, Any], classes: list[dict[str, Any]], pairs: list[dict[str, Any]]) -> str:
    """The report as one page; figures and tables lie beside it."""

    def figure(file: str, otherwise: str = "") -> str:
        return f'<p><img src="{file}" alt="{_ALTERNATIVES[file]}"></p>' if (folder / file).exists() else otherwise

    mixed = [[pair["truth"], pair["prediction"], pair["images"], f"{pair['share']:.1%}"] for pair in pairs[:10]]
    lowest = [
        [row["class"], row["images"], _percent(row["accuracy"]), _percent(row["precision"]), row["taken_for"]]
        for row in classes[:MAX_ROWS]
    ]
    parts = ["<h1>Report of the run</h1>", html_table([], facts_of(metrics))]
    if (folder / "curves.png").exists():
        parts += ["<h2>Learning</h2>", figure("curves.png")]
    parts += ["<h2>Confusion</h2>", figure("confusion.png")]
    if mixed:
        parts += [
            html_table(["Truth", "Prediction", "Images", "Share of the true class"], mixed),
            f"<p>{'These are' if len(pairs) == len(mixed) else 'The most frequent of'} {len(pairs)} kinds of mistake; "
            'as a file: <a href="confused.csv">confused.csv</a></p>',
        ]
    else:
        parts.append("<p>No class was predicted as another.</p>")
    parts += [
        "<h2>Classes</h2>",
        figure("classes.png"),
        html_table(["Class", "Images", "Accuracy", "Precision", "Most often predicted as"], lowest),
        f"<p>{'All' if len(lowest) == len(classes) else f'The lowest {len(lowest)} of'} {len(classes)} classes; "
        'as a file: <a href="classes.csv">classes.csv</a></p>',
        "<h2>Wrong predictions</h2>",
        "<p>Below each image: what it is, what it was predicted as, the score of that prediction and the file.</p>"
        if (folder / "wrong.png").exists()
        else "",
        figure("wrong.png", "<p>None to show.</p>"),
        skipped_part(folder.parent),
    ]
    return html_page(parts)


def skipped_part(run_dir: Path) -> str:
    """The part of a page about files that could not be read; nothing where there were none."""
    try:
        with (run_dir / "skipped.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))[1:]
    except FileNotFoundError:
        return ""
    link = f'<p>{len(rows)} files were left out; as a file: <a href="../skipped.csv">skipped.csv</a></p>'
    return "\n".join(["<h2>Files that could not be read</h2>", html_table(["File", "Reason"], rows[:MAX_ROWS]), link])


def html_page(parts: Sequence[str]) -> str:
    """A page of these parts of HTML, one below the other."""
    return _PAGE.format(body="\n".join(part for part in parts if part))


def facts_of(metrics: Mapping[str, Any]) -> list[list[str]]:
    """Name and value of each single figure, as a page tells them."""
    return [
        [key.replace("_", " ").replace("/", " "), _fact(value)]
        for key, value in metrics.items()
        if isinstance(value, str | int | float)
    ]


def html_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """An HTML table; nothing without rows."""

    def line(tag: str, cells: Sequence[Any]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html(cell)}</{tag}>" for cell in cells) + "</tr>"

    lines = [line("th", head)] if head else []
    return "\n".join(["<table>", *lines, *(line("td", row) for row in rows), "</table>"]) if rows else ""


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> None:
    """Rows as a CSV file; numbers have six places."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {key: round(value, 6) if isinstance(value, float) else csv_cell(value) for key, value in row.items()}
            )


def _fact(value: str | float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _check_confusion(confusion: np.ndarray, class_names: Sequence[str]) -> np.ndarray:
    confusion = np.asarray(confusion)
    if confusion.shape != (len(class_names), len(class_names)) or not len(class_names):
        raise UserError(
            f"confusion must be (classes, classes) for {len(class_names)} class names, got shape {confusion.shape}"
        )
    return confusion.astype(np.int64)


def _number(text: Any) -> float:
    """A cell as a number, NaN where it holds none."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return math.nan
