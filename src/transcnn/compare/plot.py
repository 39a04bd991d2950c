"""The plot of ``transcnn compare``, drawn from the lines of its table (or of compare.csv)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..report.plots import BLUE, GREY, ORANGE, draw_bars, new_figure, save_figure, style

__all__ = ["draw"]

COLOURS = {"fp32": BLUE, "bf16": ORANGE, "fp16": GREY}
LINES = (BLUE, ORANGE, GREY, "#009e73", "#b0508a", "#000000")
MARKS = "osD^vP"


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot what the lines can show: time per pixel where a network has several sizes, else speed, and accuracy to it.

    Args:
        rows: Lines of the table; those without images/s (what couldn't be measured) are left out.
        path: The PNG to write.
    """
    done = [row for row in rows if row["images_per_s"]]
    sizes = {str(row["size"]) for row in done}
    several = len({(row["model"], str(row["size"])) for row in done}) > len({row["model"] for row in done})
    panels = [_pixels if several else _speed]
    if len(sizes) == 1 and len({row["model"] for row in done if row["paper_top1"]}) > 1:
        panels.append(_accuracy)  # of one size: accuracy depends on it
    with style():
        figure = new_figure(8.5, max(3.5, 0.27 * len(done) + 1.2) * len(panels))
        for panel, axes in zip(panels, figure.subplots(len(panels), 1, squeeze=False)[:, 0], strict=True):
            panel(axes, done)
        save_figure(figure, path)


def _speed(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """A bar for each line of the table, with its images/s."""
    speeds = [float(row["images_per_s"]) for row in rows]
    ends = [f"{speed:.3g}" for speed in speeds]
    draw_bars(axes, [_name(row, rows) for row in rows], speeds, ends, [COLOURS[row["dtype"]] for row in rows])
    axes.set(xlabel="images/s", title="Speed")


def _pixels(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Time per pixel against the image's side: level where cost is linear."""
    from matplotlib.ticker import NullLocator, StrMethodFormatter

    names = list(dict.fromkeys(_name(row, rows, size=False) for row in rows))
    for i, name in enumerate(names):
        line = [row for row in rows if _name(row, rows, size=False) == name]
        points = [float(row["size"]) for row in line], [float(row["ns_per_pixel"]) for row in line]
        axes.plot(*points, color=LINES[i % len(LINES)], marker=MARKS[i % len(MARKS)], markersize=5, label=name)
    sizes, times = sorted({int(row["size"]) for row in rows}), [float(row["ns_per_pixel"]) for row in rows]
    ticks = [tick for power in range(9) for tick in (10**power, 2 * 10**power, 5 * 10**power)]
    axes.set(xscale="log", yscale="log", ylim=(min(times) / 1.3, max(times) * 1.3))
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_yticks([tick for tick in ticks if min(times) / 1.3 <= tick <= max(times) * 1.3])
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="side of the image in pixels", ylabel="ns per pixel", title="Time for each pixel")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=8.5)


def _accuracy(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """The accuracy that each network's paper reports, against its images/s; names stand right of their points."""
    known = sorted((row for row in rows if row["paper_top1"]), key=lambda row: float(row["images_per_s"]))
    for row in known:
        ours = row["model"].startswith(("transcnn", "hatnet"))
        point = float(row["images_per_s"]), float(row["paper_top1"])
        axes.plot(*point, "o" if ours else "s", color=COLOURS[row["dtype"]], markersize=6 if ours else 5)
        axes.annotate(_name(row, rows), point, (6, -3), textcoords="offset points", fontsize=8)
    axes.margins(x=0.3, y=0.1)
    axes.set(xlabel="images/s", ylabel="ImageNet-1K top-1 in %", title="Accuracy (each paper's own) against speed")
    axes.grid(alpha=0.3)


def _name(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], *, size: bool = True) -> str:
    """The network, and what distinguishes its line from others: engine, dtype and size where there are several."""
    model = row["model"].replace(":grid_sizes=auto:pool_ratios=auto", " (auto levels)")
    parts = [key for key in ("engine", "dtype", "size") if len({str(other[key]) for other in rows}) > 1]
    return " ".join([model, *(str(row[key]) for key in parts if size or key != "size")])
