"""The report of several labels an image: each label's figures, and the images that are most wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoints.files import atomic_write
from .classify import read_history, save_figures
from .page import MAX_ROWS, facts_of, heading, html_page, html_table, percent, skipped_files, write_rows
from .plots import plot_bars, plot_history, plot_images

__all__ = ["write_label_report", "write_page"]

COLUMNS = ["label", "images", "of", "found", "wrongly", "ap", "f1", "precision", "recall", "threshold"]


def write_label_report(
    run_dir: Path, rows: Sequence[Mapping[str, Any]], worst: Sequence[tuple[Any, list[str]]], metrics: Mapping[str, Any]
) -> Path:
    """Write ``run_dir/report``: ``index.html``, its figures, and ``labels.csv``.

    Args:
        run_dir: The run's directory.
        rows: Of each label its name, counts, and figures from 0 to 1 (None: no image has it).
        worst: Images with lines of text, the most wrong first.
        metrics: What was measured; single values head the page.
    """
    ranked = sorted(rows, key=lambda row: (row["ap"] is None, row["ap"] or 0.0))
    names = [str(row["label"]) for row in ranked]
    shown = ranked[:MAX_ROWS]
    ends = ["no image has it" if row["ap"] is None else f"{percent(row['ap'])}  ({row['images']:,})" for row in shown]
    figures = {
        "labels.png": lambda: plot_bars(
            names[:MAX_ROWS],
            [row["ap"] or 0.0 for row in shown],
            ends,
            "Average precision",
            "Average precision of each label",
        ),
        "worst.png": lambda: plot_images(worst, "Most wrong"),
    }
    texts = ["Labels", "Images whose labels are most wrong"]
    table = html_table(
        ["Label", "AP", "F1", "Precision", "Recall", "Images", "Found", "Wrongly found", "Threshold"],
        [
            [
                row["label"],
                *(percent(row[key]) for key in ("ap", "f1", "precision", "recall")),
                *(f"{row['images']:,} of {row['of']:,}", row["found"], row["wrongly"], f"{row['threshold']:.3f}"),
            ]
            for row in shown
        ],
    )
    folder = Path(run_dir) / "report"
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "labels.csv", [dict(row) for row in ranked], COLUMNS)
    more = f'<p>{len(names)} labels; as a file: <a href="labels.csv">labels.csv</a></p>'
    return write_page(run_dir, metrics, figures, texts, {"labels.png": table + more}, [*names, *_words(worst)])


def write_page(
    run_dir: Path,
    metrics: Mapping[str, Any],
    figures: Mapping[str, Any],
    titles: Sequence[str],
    below: Mapping[str, str],
    texts: Sequence[str],
) -> Path:
    """``report/index.html`` of a run: facts, curves, training images, then each figure with its title.

    Args:
        run_dir: The run's directory, with its ``metrics.csv`` if something was trained.
        metrics: What was measured; single values head the page.
        figures: File name -> function that draws it.
        titles: One for each figure.
        below: HTML that follows a figure, by its file.
        texts: What fonts are needed for.
    """
    folder = Path(run_dir) / "report"
    folder.mkdir(parents=True, exist_ok=True)
    history = Path(run_dir) / "metrics.csv"
    curves = {"curves.png": lambda: plot_history(read_history(history) if history.exists() else {}, percent=True)}
    save_figures(folder, {**curves, **figures}, texts)
    title_of_page, top = heading(Path(run_dir), metrics)
    parts = [top, html_table([], facts_of(metrics))]
    named = {"curves.png": "Learning", "augmented.png": "Training images", **dict(zip(figures, titles, strict=True))}
    for file, title in named.items():
        if (folder / file).exists():
            parts += [f"<h2>{title}</h2>", f'<p><img src="{file}" alt="{title}"></p>']
        parts.append(below.get(file, ""))
    page = folder / "index.html"
    text = html_page([*parts, skipped_files(Path(run_dir))], title_of_page)
    atomic_write(page, lambda path: path.write_text(text, encoding="utf-8"))
    return page


def _words(cells: Sequence[tuple[Any, list[str]]]) -> list[str]:
    return [text for _, words in cells for text in words]
