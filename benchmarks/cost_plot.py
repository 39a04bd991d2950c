"""The plot of benchmarks that exchange one thing in a network: accuracy over multiply-adds, a point a variant."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transcnn.report.plots import BLUE, GREY, new_figure, style

__all__ = ["plot_accuracy"]


def plot_accuracy(path: Path, table: Sequence[dict[str, Any]], what: str, score: str) -> None:
    """Writes it; a bar is the spread over the seeds, H-MHSA is blue, others are grey.

    Args:
        path: Where it is written.
        table: For each variant ``variant``, ``macs``, ``top1_mean``, ``top1_spread``, ``epochs`` and ``seeds``.
        what: What was trained, for the title; epochs and seeds follow.
        score: Label of the accuracy's axis.
    """
    fewest, most = min(row["seeds"] for row in table), max(row["seeds"] for row in table)
    seeds = f"{most} seed{'s' * (most > 1)}" if fewest == most else f"{fewest} to {most} seeds"
    with style():
        figure = new_figure(6, 4)
        axes = figure.subplots()
        drawn: list[tuple[float, float]] = []
        for row in table:
            at, colour = (int(row["macs"]) / 1e6, row["top1_mean"]), BLUE if "hmhsa" in row["variant"] else GREY
            taken = any(abs(at[0] - x) < 1 and abs(at[1] - y) < 0.05 for x, y in drawn)
            drawn.append(at)
            axes.errorbar(*at, row["top1_spread"] or None, fmt="o", capsize=3, color=colour)
            axes.annotate(row["variant"], at, (6, -11 if taken else 4), textcoords="offset points", color=colour)
        title = f"{what}: {table[0]['epochs']} epochs, {seeds}"
        axes.set(xlabel="multiply-adds of one image (M)", ylabel=score, title=title)
        axes.margins(x=0.15, y=0.1)
        figure.savefig(path)
