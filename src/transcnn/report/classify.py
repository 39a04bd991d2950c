"""The report of a classifier: figures, tables and a page that ties them together, from plain arrays."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoints.files import atomic_write
from ..errors import UserError, require
from ..text import printable
from .page import MAX_ROWS, facts_of, heading, html_page, html_table, percent, skipped_files, write_rows
from .plots import (
    Wrong,
    plot_classes,
    plot_confusion,
    plot_history,
    plot_images,
    plot_map,
    plot_pairs,
    plot_wrong,
    save_figure,
    style,
)

__all__ = ["Wrong", "class_table", "confused_pairs", "read_history", "write_report"]

MAX_MATRIX = 100  # more classes than that: no matrix, the most confused pairs instead


def write_report(
    run_dir: str | Path,
    history: str | Path | Mapping[str, Sequence[float]] | None,
    confusion: np.ndarray,
    class_names: Sequence[str],
    wrong: Sequence[tuple[Any, ...]],
    metrics: Mapping[str, Any],
    correct: Sequence[tuple[Any, ...]] = (),
    points: tuple[np.ndarray, Sequence[int]] | None = None,
    map_by: str = "pca",
) -> Path:
    """Write ``run_dir/report``: learning curves, confusion matrix, classes, predictions and ``index.html``.

    Args:
        run_dir: The run's directory.
        history: Its ``metrics.csv``, or columns of the same names; None where nothing was trained.
        confusion: Counts (classes, classes), a row for each true class, a column for each predicted one.
        class_names: One name for each row.
        wrong: Wrong predictions to show, each an image, truth, prediction, score and name (:class:`Wrong`), most
            confident first.
        metrics: What was measured; single values head the page.
        correct: Correct predictions to show, as ``wrong``.
        points: Images on a plane by their features, (N, 2), and their true classes; None for no map.
        map_by: How they came there: ``pca`` or ``tsne``.

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
        "curves.png": lambda: plot_history(columns, percent=isinstance(history, str | Path)),
        "confusion.png": lambda: plot_confusion(confusion, class_names) if few else plot_pairs(pairs),
        "classes.png": lambda: plot_classes(classes),
        "wrong.png": lambda: plot_wrong(wrong, class_names),
        "correct.png": lambda: plot_images(
            [(image, [str(class_names[truth]), percent(score)]) for image, truth, _, score, _ in correct],
            "Correct predictions",
        ),
        "map.png": lambda: None if points is None else plot_map(*points, class_names, map_by),
    }
    save_figures(folder, figures, [*class_names, *(printable(Path(str(name)).name) for *_, name in wrong)])
    write_rows(folder / "classes.csv", classes, ["class", "images", "right", "accuracy", "precision", "taken_for"])
    write_rows(folder / "confused.csv", pairs, ["truth", "prediction", "images", "share"])
    page = folder / "index.html"
    text = _page(folder, metrics, classes, pairs, map_by)
    atomic_write(page, lambda path: path.write_text(text, encoding="utf-8"))
    return page


def save_figures(folder: Path, figures: Mapping[str, Any], texts: Sequence[str]) -> None:
    """Draw figures (file name -> function) with fonts for ``texts``; a file without a figure is removed."""
    for file, draw in figures.items():
        with style(texts):
            figure = draw()
            if figure is None:  # nothing to show; no older figure may stand for it
                (folder / file).unlink(missing_ok=True)
            else:
                save_figure(figure, folder / file)


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

MAPS = {
    "pca": "Scored images by the first two principal components of what the last layer is given; those of a class that "
    "lie apart from the others are easy to tell.",
    "tsne": "Scored images by t-SNE of what the last layer is given: neighbours lie side by side; distances between "
    "groups, and their sizes, mean little.",
}
_ALTERNATIVES = {
    "augmented.png": "Training images as the network sees them",
    "curves.png": "Loss, accuracy and learning rate over the epochs",
    "confusion.png": "Which class was predicted as which",
    "classes.png": "Accuracy of each class",
    "wrong.png": "Images with a wrong prediction",
    "correct.png": "Images with a correct prediction",
    "map.png": "Images on a plane by their features, in the colour of their class",
}


def _page(
    folder: Path,
    metrics: Mapping[str, Any],
    classes: list[dict[str, Any]],
    pairs: list[dict[str, Any]],
    map_by: str,
) -> str:
    """The report as one page; figures and tables lie beside it."""

    def figure(file: str, otherwise: str = "") -> str:
        return f'<p><img src="{file}" alt="{_ALTERNATIVES[file]}"></p>' if (folder / file).exists() else otherwise

    mixed = [[pair["truth"], pair["prediction"], pair["images"], percent(pair["share"])] for pair in pairs[:10]]
    lowest = [
        [row["class"], row["images"], percent(row["accuracy"]), percent(row["precision"]), row["taken_for"]]
        for row in classes[:MAX_ROWS]
    ]
    title, top = heading(folder.parent, metrics)
    parts = [top, html_table([], facts_of(metrics))]
    if (folder / "curves.png").exists():
        parts += ["<h2>Learning</h2>", figure("curves.png")]
    if (folder / "augmented.png").exists():
        parts += ["<h2>Training images</h2>", figure("augmented.png")]
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
        "<p>Below each image: its class, the predicted class, the probability of that prediction and the file.</p>"
        if (folder / "wrong.png").exists()
        else "",
        figure("wrong.png", "<p>None to show.</p>"),
    ]
    if (folder / "map.png").exists():
        parts += [
            "<h2>Map of the images</h2>",
            f"<p>{MAPS[map_by]}</p>",
            figure("map.png"),
        ]
    if (folder / "correct.png").exists():
        parts += ["<h2>Correct predictions</h2>", "<p>The most confident one of each class.</p>", figure("correct.png")]
    return html_page([*parts, skipped_files(folder.parent)], title)


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
