"""Figures for reports, drawn from plain arrays.

Everything reads on paper and without colour too: a few hues that colour-blind readers can distinguish, and line
style and lightness differ as well. Class names that are too long are cut in the middle.
"""

from __future__ import annotations

import io
import logging
import math
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from ..checkpoints.files import atomic_write
from ..text import printable
from .fonts import font_families

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "BLUE",
    "GREY",
    "ORANGE",
    "Wrong",
    "draw_bars",
    "new_figure",
    "plot_bars",
    "plot_classes",
    "plot_confusion",
    "plot_history",
    "plot_images",
    "plot_map",
    "plot_pairs",
    "plot_precision_recall",
    "plot_wrong",
    "save_figure",
    "style",
]

BLUE, ORANGE, GREY = "#0060a8", "#d55e00", "#8a8a8a"
# Colour of each split, and the dashes of its first and its further measures.
DASHES = ("-", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))
LINES: dict[str, tuple[str, tuple[Any, ...]]] = {
    "train": (GREY, ("--", ":")),
    "val": (BLUE, DASHES),
    "test": (ORANGE, DASHES),
}
MAX_BARS = 50  # more classes than that: the lowest ones and how all are spread
MAX_MAPPED = 20  # classes with a colour of their own on a map
MAX_WRONG = 30
MAX_CURVES = 16  # classes with a line of their own


class Wrong(NamedTuple):
    """One wrong prediction; ``truth`` and ``prediction`` are indices or names, ``score`` is from 0 to 1."""

    image: Image.Image | np.ndarray
    truth: int | str
    prediction: int | str
    score: float
    name: str


@contextmanager
def style(texts: Iterable[str] = ()) -> Iterator[None]:
    """How all figures look; names are taken literally (no formulas), in fonts that have the letters of ``texts``."""
    import matplotlib

    settings: dict[Any, Any] = {
        "font.family": font_families(texts),
        "font.size": 9.5,
        "axes.titlesize": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "text.parse_math": False,
        "figure.constrained_layout.w_pad": 0.1,
        "figure.constrained_layout.h_pad": 0.1,
        "savefig.dpi": 150,
        "figure.facecolor": "white",
    }
    log = logging.getLogger("matplotlib.font_manager")  # speaks of each font that has no bold letters
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with matplotlib.rc_context(settings), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from font")
            yield
    finally:
        log.setLevel(level)


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as its file's name ends (.png, .pdf, .svg), whole or not at all; raises UserError."""
    buffer = io.BytesIO()  # drawn in memory: matplotlib fails in odd ways where the disk is full half way
    figure.savefig(buffer, format=path.suffix[1:].lower())
    atomic_write(path, lambda temporary: temporary.write_bytes(buffer.getbuffer()))


def new_figure(width: float, height: float, layout: str = "constrained") -> Figure:
    """A figure in inches that needs no window and no global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout=layout)  # pyright: ignore[reportArgumentType]


def plot_history(columns: Mapping[str, tuple[np.ndarray, np.ndarray]], percent: bool = False) -> Figure | None:
    """Loss, accuracy and learning rate over the epochs, a panel for each that there is; None without any.

    ``percent`` says that accuracies are given in percent, as a run's own are; else they are where one is above 1.5.
    """
    panels: dict[str, dict[str, Any]] = {"Loss": {}, "Accuracy": {}, "Learning rate": {}}
    for name, column in columns.items():
        words = re.split(r"[/_\-.]", name.lower())
        if "step" in words or words[-1] in ("small", "medium", "large", "map75"):  # lines enough without
            continue
        if "loss" in words:
            panels["Loss"][name] = column
        elif words[0] == "lr":
            # Parameter groups differ by a factor only: the one with the highest rate stands for all.
            best = panels["Learning rate"].get("lr", column)
            panels["Learning rate"]["lr"] = max(best, column, key=lambda c: c[1].max())
        elif any(word.startswith(("acc", "top", "miou", "map")) for word in words):
            panels["Accuracy"][name] = column
    panels = {title: lines for title, lines in panels.items() if lines}
    if not panels:
        return None
    figure = new_figure(4.2 * len(panels), 3.5)
    for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        _draw_lines(axes, title, lines, percent)
    return figure


def _draw_lines(
    axes: Axes, title: str, lines: Mapping[str, tuple[np.ndarray, np.ndarray]], percent: bool = False
) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    drawn: Counter[str] = Counter()
    for name, (epochs, values) in lines.items():
        split = next((split for split in LINES if name.lower().startswith(split)), "val")
        colour, dashes = LINES[split]
        marker = "os^"[drawn[split] % 3] if len(epochs) == 1 else None
        line = dashes[min(drawn[split], len(dashes) - 1)]
        label = re.sub("[/_]", " ", name)
        axes.plot(epochs, values, linestyle=line, color=colour, linewidth=1.8, marker=marker, label=label)
        drawn[split] += 1
    axes.set(title=title, xlabel="Epoch")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    if title == "Accuracy":
        whole = percent or max(values.max() for _, values in lines.values()) > 1.5
        axes.yaxis.set_major_formatter(PercentFormatter(100 if whole else 1))
    elif title == "Learning rate":
        axes.ticklabel_format(axis="y", scilimits=(-2, 3), useMathText=False)
    if title != "Learning rate":
        axes.legend(frameon=False)


def plot_confusion(confusion: np.ndarray, class_names: Sequence[str], what: str = "images") -> Figure:
    """The confusion matrix in per cent of each true class, a row for each; meant for up to 100 classes."""
    from matplotlib.colors import PowerNorm

    count = len(class_names)
    share = 100 * confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    labels = [_short(name, 24 if count <= 40 else 18) for name in class_names]
    side = min(max(3.2, 0.5 * count), 7.5 if count <= 40 else 13.0)
    font = min(10.0, max(5.0, 62 * side / count))
    longest = max(map(len, labels))
    upright = count > 3 and longest > 2
    margin = 0.0085 * font * longest + 0.5  # inches
    figure = new_figure(side + margin + 1.1, side + (margin if upright else 0.5) + 0.4)
    axes = figure.add_subplot()
    # Mistakes are few, and what matters: the scale gives them most of its range.
    image = axes.imshow(share, cmap="Blues", norm=PowerNorm(0.4, 0, 100))
    ticks = range(count)
    axes.set_xticks(ticks, labels, fontsize=font, rotation=90 if upright else 0)
    axes.set_yticks(ticks, labels, fontsize=font)
    axes.set(xlabel="Prediction", ylabel="Truth", title=f"{confusion.trace():,} of {confusion.sum():,} {what} correct")
    axes.set_xticks(np.arange(count + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(count + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="#d8d8d8", linewidth=0.4)
    axes.tick_params(which="both", length=0)
    bar = figure.colorbar(image, ax=axes, shrink=min(1.0, 4 / side), ticks=[0, 1, 5, 20, 50, 100], pad=0.02)
    bar.set_label("% of the true class (each row adds up to 100 %)")
    if count <= 25:
        for (row, column), images in np.ndenumerate(confusion):
            text = str(images) if what == "images" else f"{share[row, column]:.1f}"  # pixels are too many to count
            if text not in ("0", "0.0"):
                colour = "white" if share[row, column] > 20 else "black"
                size = min(11.0, 72 * side / count / max(2, len(text)))  # digits are 0.64 of it wide
                axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=size)
    return figure


def plot_pairs(pairs: Sequence[Mapping[str, Any]], most: int = 25) -> Figure | None:
    """The first ``most`` rows of :func:`transcnn.report.classify.confused_pairs` as bars; None without any."""
    from matplotlib.ticker import MaxNLocator

    if not pairs:
        return None
    pairs = pairs[:most]
    figure = new_figure(8.5, 0.28 * len(pairs) + 1.2)
    axes = figure.add_subplot()
    names = [f"{_short(pair['truth'], 26)} → {_short(pair['prediction'], 26)}" for pair in pairs]
    ends = [f"{pair['images']:,} ({100 * pair['share']:.0f} %)" for pair in pairs]
    draw_bars(axes, names, [pair["images"] for pair in pairs], ends)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.set(
        xlabel="Images (share of the true class)", title=f"The {len(pairs)} most confused pairs, truth → prediction"
    )
    return figure


def plot_classes(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """The rows of :func:`transcnn.report.classify.class_table` as bars; above 50 the lowest and how all are spread."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    many = len(rows) > MAX_BARS
    shown = rows[:30] if many else rows
    figure = new_figure(11.0 if many else 7.5, 0.27 * len(shown) + 1.2)
    axes = figure.add_subplot(1, 2, 1) if many else figure.add_subplot()
    ends = [
        f"{100 * row['accuracy']:.1f} %  ({row['right']:,} of {row['images']:,})" if row["images"] else "no images"
        for row in shown
    ]
    draw_bars(axes, [_short(row["class"], 30) for row in shown], [row["accuracy"] or 0.0 for row in shown], ends)
    axes.set(xlim=(0, 1), xlabel="Accuracy", title="The 30 lowest classes" if many else "Accuracy of each class")
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    if many:
        spread = figure.add_subplot(1, 2, 2)
        values = np.array([row["accuracy"] for row in rows if row["accuracy"] is not None])
        spread.hist(values, bins=np.linspace(0, 1, 21).tolist(), color=BLUE, edgecolor="white")
        if len(values):
            spread.axvline(
                values.mean(), color=ORANGE, linestyle="--", linewidth=2, label=f"mean {100 * values.mean():.1f} %"
            )
            spread.legend(frameon=False, loc="upper left")
        spread.set(xlim=(0, 1), xlabel="Accuracy", ylabel="Classes", title=f"All {len(rows)} classes")
        spread.yaxis.set_major_locator(MaxNLocator("auto", integer=True))
        spread.xaxis.set_major_formatter(PercentFormatter(1))
    return figure


def plot_bars(names: Sequence[str], values: Sequence[float], ends: Sequence[str], what: str, title: str) -> Figure:
    """Shares from 0 to 1 as horizontal bars, each with a text at its end."""
    from matplotlib.ticker import PercentFormatter

    figure = new_figure(7.5, 0.27 * len(names) + 1.2)
    axes = figure.add_subplot()
    draw_bars(axes, [_short(name, 30) for name in names], values, ends)
    axes.set(xlim=(0, 1), xlabel=what, title=title)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    return figure


def draw_bars(
    axes: Axes, names: Sequence[str], values: Sequence[float], ends: Sequence[str], color: str | Sequence[str] = BLUE
) -> None:
    """Horizontal bars from top to bottom, each with a text at its end."""
    rows = np.arange(len(names))
    bars = axes.barh(rows, values, color=color, height=0.7)
    axes.bar_label(bars, ends, padding=4, fontsize=8.5)
    axes.set_yticks(rows, names)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.margins(x=0.18)


def plot_wrong(wrong: Sequence[tuple[Any, ...]], class_names: Sequence[str]) -> Figure | None:
    """A sheet of up to 30 wrong predictions, most confident first, with truth and score; None without any."""
    shown = sorted((Wrong(*entry) for entry in wrong), key=lambda entry: -entry.score)[:MAX_WRONG]
    cells = [
        (
            entry.image,
            [
                f"is {_short(_name(entry.truth, class_names), 21)}",
                f"predicted as {_short(_name(entry.prediction, class_names), 15)}",
                f"{100 * entry.score:.0f} %, {_short(Path(entry.name).name, 20)}",
            ],
        )
        for entry in shown
    ]
    return plot_images(cells, "Wrong predictions, most confident first")


def plot_images(cells: Sequence[tuple[Any, Sequence[str]]], title: str) -> Figure | None:
    """A sheet of images, each with up to three lines below it, the first one bold; None without any."""
    if not cells:
        return None
    columns = min(6, len(cells))
    lines = max(len(words) for _, words in cells)
    # Laid out by hand: captions have a fixed height, and cells keep their size however few there are.
    cell = 1.92 + 0.16 * lines
    width, height, top = max(columns * 1.8, 3.6), math.ceil(len(cells) / columns) * cell + 0.5, 0.5
    figure = new_figure(width, height, layout="none")
    figure.text(0.5, 1 - 0.3 / height, title, ha="center", va="center", fontsize=12)
    for i, (image, words) in enumerate(cells):
        left, low = (i % columns) * 1.8 + (width - columns * 1.8) / 2, height - top - (i // columns + 1) * cell
        axes = figure.add_axes((left / width + 0.1 / width, (low + cell - 1.7) / height, 1.6 / width, 1.6 / height))
        pixels = _pixels(image)
        axes.imshow(
            pixels, cmap="gray", vmin=0, vmax=255, interpolation="auto" if min(pixels.shape[:2]) > 96 else "nearest"
        )
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
        for row, text in enumerate(words):
            x, y = (left + 0.9) / width, (low + cell - 1.82 - 0.16 * row) / height
            weight, colour = ("bold", "black") if row == 0 else ("normal", "black" if row == 1 else "#555555")
            figure.text(x, y, _short(text, 26), ha="center", va="center", fontsize=7.5, weight=weight, color=colour)
    return figure


def plot_map(points: np.ndarray, labels: Sequence[int], class_names: Sequence[str], by: str = "pca") -> Figure:
    """Points on a plane, (N, 2), each class in a colour and a shape of its own; of many classes the most frequent.

    ``by`` is ``pca`` or ``tsne``, whose axes mean nothing.
    """
    import matplotlib as mpl

    figure = new_figure(7.0, 5.2)
    axes = figure.add_subplot()
    counts = Counter(labels)
    shown = [label for label, _ in counts.most_common(MAX_MAPPED)]
    truth, colours = np.asarray(labels), mpl.colormaps["tab10"].colors  # pyright: ignore
    rest = ~np.isin(truth, shown)
    if rest.any():
        axes.scatter(*points[rest].T, s=8, color="#cccccc", linewidths=0, label="other classes")
    for i, label in enumerate(sorted(shown)):
        shape = "osD^v"[i // len(colours) % 5] if len(shown) > len(colours) else "osD^v"[i % 5]
        chosen, name = points[truth == label], _short(class_names[label], 26)
        axes.scatter(*chosen.T, s=14, color=colours[i % len(colours)], marker=shape, linewidths=0, label=name)
    axes.set_xticks([])
    axes.set_yticks([])
    if by == "pca":
        axes.set_xlabel("first principal component")
        axes.set_ylabel("second")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)
    return figure


def plot_precision_recall(curves: Mapping[str, np.ndarray], title: str) -> Figure | None:
    """Precision over recall, a line for each class, the mean of all thick; None without any.

    Args:
        curves: Of each class the precision at recalls evenly spaced from 0 to 1.
    """
    from matplotlib.ticker import PercentFormatter

    if not curves:
        return None
    figure = new_figure(7.0, 4.2)
    axes = figure.add_subplot()
    values = np.stack(list(curves.values()))
    recall = np.linspace(0, 1, values.shape[1])
    colours = (BLUE, ORANGE, "#009e73", "#b0508a", "#6a51a3", "#a6761d", "#e7298a", "#1b9e77")
    for i, (name, precision) in enumerate(list(curves.items())[:MAX_CURVES]):
        axes.plot(
            recall, precision, colours[i % 8], linestyle=DASHES[i // 8 % 4], linewidth=1.2, label=_short(name, 24)
        )
    if len(curves) > 1:
        axes.plot(recall, values.mean(0), color="black", linewidth=2.4, label=f"mean of {len(curves)} classes")
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="Recall", ylabel="Precision", title=title)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=8.5)
    return figure


def _pixels(image: Image.Image | np.ndarray) -> np.ndarray:
    """An image as uint8 (H, W) or (H, W, 3): transparency on white; of other channel counts, the first is shown."""
    if isinstance(image, Image.Image):
        if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.asarray(image.convert("L" if image.mode in ("1", "L", "I", "I;16", "F") else "RGB"))
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8:
        pixels = (pixels.astype(np.float64).clip(0, 1) * 255).round().astype(np.uint8)
    if pixels.ndim == 3 and pixels.shape[2] != 3:
        return pixels[:, :, 0] if pixels.shape[2] != 4 else _pixels(Image.fromarray(pixels))
    return pixels


def _short(name: str, length: int) -> str:
    """At most ``length`` characters on one line, the middle left out: endings distinguish names as beginnings do."""
    name = printable(" ".join(str(name).split()))
    if any(unicodedata.east_asian_width(letter) in "WF" for letter in name):
        length //= 2  # letters as wide as two
    if len(name) <= length:
        return name
    tail = (length - 1) // 3
    return f"{name[: length - 1 - tail]}…{name[len(name) - tail :]}"


def _name(label: int | str, class_names: Sequence[str]) -> str:
    return printable(label if isinstance(label, str) else class_names[int(label)])
