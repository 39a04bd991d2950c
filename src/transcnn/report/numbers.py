"""The report of numbers: truth against prediction, and the images that are furthest off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..text import printable
from .labels import write_page
from .page import html_table
from .plots import BLUE, ORANGE, new_figure, plot_images

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_histograms", "plot_scatter", "write_number_report"]

MAX_PANELS, ACROSS = 9, 3
HEADS = {"mae": "MAE", "rmse": "RMSE", "r2": "R²", "spearman": "Spearman", "of_the_mean": "MAE of the mean"}


def write_number_report(
    run_dir: Path,
    names: Sequence[str],
    truth: np.ndarray,
    found: np.ndarray,
    rows: Sequence[Mapping[str, Any]],
    worst: Sequence[tuple[Any, list[str]]],
    metrics: Mapping[str, Any],
) -> Path:
    """Write ``run_dir/report``: ``index.html`` and its figures.

    Args:
        run_dir: The run's directory.
        names: Of the columns.
        truth, found: Numbers (N, columns); NaN where the truth isn't known.
        rows: The figures of each column.
        worst: Images with lines of text, the furthest off first.
        metrics: What was measured; single values head the page.
    """
    table = html_table(
        ["", *HEADS.values(), "Images"],
        [[row["name"], *(_number(row.get(key)) for key in HEADS), f"{row['images']:,}"] for row in rows],
    )
    figures = {
        "scatter.png": lambda: plot_scatter(names, truth, found),
        "worst.png": lambda: plot_images(worst, "Furthest off"),
    }
    texts = [*names, *(text for _, words in worst for text in words)]
    return write_page(
        run_dir, metrics, figures, ["Truth and prediction", "Images furthest off"], {"scatter.png": table}, texts
    )


def plot_scatter(names: Sequence[str], truth: np.ndarray, found: np.ndarray) -> Figure | None:
    """Prediction over truth, a panel for each of the first columns; None without images."""
    if not len(truth):
        return None
    figure, panels = _panels(names, 4.2, 4.0)
    for i, axes in enumerate(panels):
        known = ~np.isnan(truth[:, i])
        x, y = truth[known, i], found[known, i]
        axes.scatter(x, y, s=12, alpha=0.5, color=BLUE, linewidths=0)
        if len(x):
            ends = [float(x.min()), float(x.max())]
            axes.plot(ends, ends, color=ORANGE, linewidth=1.5, label="right")
            axes.legend(frameon=False, loc="upper left")
        axes.set(xlabel="Truth", ylabel="Prediction")
    return figure


def _number(value: Any) -> str:
    return "–" if value is None or value != value else f"{value:,.4g}"


def plot_histograms(values: np.ndarray, names: Sequence[str]) -> Figure:
    """How the columns of (N, columns) are distributed, NaN left out; a panel for each of the first nine."""
    figure, panels = _panels(names, 3.4, 2.6)
    for i, axes in enumerate(panels):
        column = values[:, i]
        axes.hist(column[np.isfinite(column)], bins=30, color=BLUE)
        axes.set(ylabel="images" if i % ACROSS == 0 else "")
    return figure


def _panels(names: Sequence[str], width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with a panel of this size in inches for each of the first names, which is its title."""
    names = names[:MAX_PANELS]
    across = min(ACROSS, len(names))
    down = -(-len(names) // across)
    figure = new_figure(width * across, height * down)
    panels = [figure.add_subplot(down, across, i + 1, title=printable(name)[:30]) for i, name in enumerate(names)]
    return figure, panels
