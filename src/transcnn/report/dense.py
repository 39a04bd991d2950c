"""Reports of segmentation and detection: the page of :mod:`.report` with their own figures and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..checkpoints.files import atomic_write
from ..text import printable
from .classify import read_history, save_figures
from .page import MAX_ROWS, facts_of, heading, html_page, html_table, percent, skipped_files, write_rows
from .plots import new_figure, plot_bars, plot_confusion, plot_history

__all__ = ["best_median_worst", "class_iou", "write_dense_report", "write_segment_report"]

HEADS = {"iou": "IoU", "ap": "AP"}
SHOWN = 3  # best, median and worst images each
Example = tuple[str, str, list[Image.Image]]  # title, name, and the image, ground truth, prediction


def class_iou(confusion: np.ndarray) -> np.ndarray:
    """Intersection over union of each class from counts (truth, prediction); NaN for one that occurs in neither."""
    hits = confusion.diagonal()
    union = confusion.sum(0) + confusion.sum(1) - hits
    with np.errstate(invalid="ignore"):
        return np.where(union > 0, hits / np.maximum(union, 1), np.nan)


def best_median_worst(ranking: Sequence[tuple[int, float]]) -> list[tuple[str, int, float]]:
    """(title, index, score) of the best, the median and the worst of (index, score), no image twice."""
    order = sorted(ranking, key=lambda row: -row[1])
    middle = max(0, len(order) // 2 - SHOWN // 2)
    parts = {
        "best": order[:SHOWN],
        "median": order[middle : middle + SHOWN],
        "worst": order[::-1][:SHOWN],
    }
    seen: set[int] = set()
    rows = []
    for title, chosen in parts.items():
        for index, score in chosen:
            if index not in seen:
                seen.add(index)
                rows.append((title, index, score))
    return rows


def write_segment_report(
    run_dir: str | Path,
    confusion: np.ndarray,
    class_names: Sequence[str],
    colours: Sequence[Sequence[int]],
    examples: Sequence[Example],
    metrics: Mapping[str, Any],
) -> Path:
    """``report/`` of a segmentation: curves, IoU of each class, confusion of pixels, predictions beside the truth."""
    values = class_iou(confusion.astype(float))
    truths, predicted = confusion.sum(1), confusion.sum(0)
    rows = [
        {
            "class": name,
            "iou": None if np.isnan(values[i]) else float(values[i]),
            "recall": float(confusion[i, i] / truths[i]) if truths[i] else None,
            "precision": float(confusion[i, i] / predicted[i]) if predicted[i] else None,
            "pixels": int(truths[i]),
        }
        for i, name in enumerate(class_names)
    ]
    extra = {}
    if len(class_names) <= 100:
        extra["confusion.png"] = lambda: plot_confusion(confusion, class_names, "pixels")
    return write_dense_report(
        run_dir, "IoU", rows, extra, examples, list(zip(class_names, colours, strict=True)), metrics
    )


def write_dense_report(
    run_dir: str | Path,
    measure: str,
    rows: Sequence[dict[str, Any]],
    extra: Mapping[str, Any],
    examples: Sequence[Example],
    key: Sequence[tuple[str, Sequence[int]]],
    metrics: Mapping[str, Any],
) -> Path:
    """Write ``run_dir/report``: ``index.html``, its figures, and ``classes.csv``.

    Args:
        run_dir: The run's directory, with its ``metrics.csv`` if something was trained.
        measure: What classes are scored by; ``rows`` hold it in lower case.
        rows: One for each class: ``class``, its score (0 to 1, None: it doesn't occur), further figures.
        extra: Further figures: file name -> function that draws a figure.
        examples: Predictions beside the ground truth.
        key: Names and colours of the classes.
        metrics: What was measured; single values head the page.

    Returns:
        The path of ``index.html``.
    """
    folder = Path(run_dir) / "report"
    folder.mkdir(parents=True, exist_ok=True)
    history = Path(run_dir) / "metrics.csv"
    field = measure.lower()
    ranked = sorted(rows, key=lambda row: (row[field] is None, row[field] or 0.0))
    ends = ["does not occur" if row[field] is None else percent(row[field]) for row in ranked]
    names, scores = [row["class"] for row in ranked], [row[field] or 0.0 for row in ranked]
    draw: dict[str, Any] = {
        "curves.png": lambda: plot_history(read_history(history) if history.exists() else {}, percent=True),
        "classes.png": lambda: plot_bars(
            names[:MAX_ROWS], scores[:MAX_ROWS], ends[:MAX_ROWS], measure, f"{measure} of each class"
        ),
        **extra,
        "predictions.png": lambda: plot_predictions(examples, key),
    }
    save_figures(folder, draw, [*names, *(name for _, name, _ in examples)])
    write_rows(folder / "classes.csv", ranked, list(ranked[0]))
    titles = {
        "curves.png": "Learning",
        "augmented.png": "Training images",
        "precision_recall.png": "Precision and recall",
        "classes.png": "Classes",
        "confusion.png": "Which was predicted as which",
        "predictions.png": "Predictions: best, median, worst",
    }
    title_of_page, top = heading(Path(run_dir), metrics)
    parts = [top, html_table([], facts_of(metrics))]
    for file in ("curves.png", "augmented.png", *(file for file in draw if file != "curves.png")):
        if (folder / file).exists():
            title = titles.get(file, file)
            parts += [f"<h2>{title}</h2>", f'<p><img src="{file}" alt="{title}"></p>']
        if file == "classes.png":
            head = list(ranked[0])
            cells = [[_cell(row[name]) for name in head] for row in ranked[:MAX_ROWS]]
            parts += [html_table([HEADS.get(name, name.capitalize()) for name in head], cells)]
    page = folder / "index.html"
    text = html_page([*parts, skipped_files(Path(run_dir))], title_of_page)
    atomic_write(page, lambda path: path.write_text(text, encoding="utf-8"))
    return page


def plot_predictions(examples: Sequence[Example], key: Sequence[tuple[str, Sequence[int]]]) -> Any:
    """A row for each image: image, ground truth and prediction; below, what the colours mean. None without any."""
    if not examples:
        return None
    width = 3.1
    # Very long images are drawn small: at full width one alone could be more than matplotlib draws.
    heights = [width * min(max(images[0].height / images[0].width, 0.1), 2.5) for _, _, images in examples]
    rows = -(-len(key) // 5) if len(key) <= 40 else 0
    figure = new_figure(3 * width + 0.3, sum(heights) + 0.42 * len(examples) + 0.28 * rows + 0.2)
    grid = figure.subplots(len(examples), 3, squeeze=False, gridspec_kw={"height_ratios": heights})
    for line, (title, name, images) in zip(grid, examples, strict=True):
        for axes, image, caption in zip(line, images, (printable(name)[:38], "ground truth", title), strict=True):
            axes.imshow(image)
            axes.set_title(caption, fontsize=8.5)
            axes.set_axis_off()
    if rows:
        from matplotlib.patches import Patch

        patches = [
            Patch(facecolor="#" + bytes(colour).hex(), edgecolor="black", label=printable(name)) for name, colour in key
        ]
        figure.legend(handles=patches, loc="outside lower center", ncols=5, frameon=False, fontsize=8.5)
    return figure


def _cell(value: Any) -> str:
    return (
        percent(value)
        if value is None or isinstance(value, float)
        else f"{value:,}"
        if isinstance(value, int)
        else value
    )
