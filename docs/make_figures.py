"""Draw the figures of docs/images again: ``make figures``."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from transcnn.report.plots import BLUE, ORANGE, new_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE, GRID, RATIO = 16, 4, 4
QUERY = (8, 7)  # row and column of the position whose attention is shown


def feature_map() -> np.ndarray:
    """One channel of a map with two blobs, (SIZE, SIZE), 0 to 1."""
    y, x = np.mgrid[:SIZE, :SIZE]
    blobs = [(4, 10, 3.2, 1.0), (11, 5, 2.6, 0.85)]
    return np.clip(sum(a * np.exp(-((y - r) ** 2 + (x - c) ** 2) / (2 * s * s)) for r, c, s, a in blobs), 0, 1)


def hmhsa() -> Figure:
    """The three steps of H-MHSA with two levels: attention in grids, merging, attention to the merged tokens."""
    values = feature_map()
    merged = values.reshape(SIZE // RATIO, RATIO, SIZE // RATIO, RATIO).mean((1, 3))
    figure = new_figure(10, 4.1, layout="none")
    places = {"local": (0.02, 0.30), "merge": (0.40, 0.16), "global": (0.67, 0.30)}
    local, tokens, whole = (figure.add_axes((left, 0.17, width, 0.66)) for left, width in places.values())

    draw_map(local, values, shown=same_grid(QUERY))
    for edge in range(0, SIZE + 1, GRID):
        local.plot([edge, edge], [0, SIZE], color="black", linewidth=1.6, solid_capstyle="butt")
        local.plot([0, SIZE], [edge, edge], color="black", linewidth=1.6, solid_capstyle="butt")
    mark(local, QUERY)
    for row in range(SIZE):
        for column in range(SIZE):
            if same_grid(QUERY)[row, column] and (row, column) != QUERY:
                connect(local, QUERY, (row, column), 0.7)

    draw_map(tokens, merged)

    draw_map(whole, values, shown=np.zeros((SIZE, SIZE), bool))
    mark(whole, QUERY)
    weights = np.exp(5 * merged) / np.exp(5 * merged).sum()
    for (row, column), weight in np.ndenumerate(weights):
        centre = RATIO * (row + 0.5) - 0.5, RATIO * (column + 0.5) - 0.5
        connect(whole, QUERY, centre, 0.5 + 14 * weight)
    for (row, column), value in np.ndenumerate(merged):
        side = 1.5
        corner = RATIO * (column + 0.5) - side / 2, RATIO * (row + 0.5) - side / 2
        rectangle(whole, corner, side, shade(value), edge="black", layer=4)

    captions = {
        "local": ("1  Local step", f"Each position attends to the\n{GRID}×{GRID} positions of its own grid."),
        "merge": ("2  Merging", f"Each {RATIO}×{RATIO} patch is averaged\ninto one token."),
        "global": ("3  Global step", "Each position attends to every\nmerged token, near and far."),
    }
    for name, (title, text) in captions.items():
        middle = places[name][0] + places[name][1] / 2
        figure.text(middle, 0.93, title, ha="center", va="center", fontsize=13, weight="bold")
        figure.text(middle, 0.145, text, ha="center", va="top", fontsize=10.5, linespacing=1.3)
    for x in (0.36, 0.615):
        figure.text(x, 0.5, "➜", ha="center", va="center", fontsize=22)
    return figure


def attention() -> Figure:
    """Plain attention beside that of H-MHSA: who attends to whom, and how many pairs that makes."""
    values = feature_map()
    merged = values.reshape(SIZE // RATIO, RATIO, SIZE // RATIO, RATIO).mean((1, 3))
    figure = new_figure(10, 5.0, layout="none")
    plain, ours = (figure.add_axes((left, 0.2, 0.36, 0.68)) for left in (0.07, 0.57))

    draw_map(plain, values)
    for row in range(SIZE):
        for column in range(SIZE):
            if (row, column) != QUERY:
                connect(plain, QUERY, (row, column), 0.35)
    mark(plain, QUERY)

    draw_map(ours, values, shown=same_grid(QUERY))
    for (row, column), value in np.ndenumerate(merged):
        centre = RATIO * (row + 0.5) - 0.5, RATIO * (column + 0.5) - 0.5
        connect(ours, QUERY, centre, 1.2)
        corner = RATIO * (column + 0.5) - 0.75, RATIO * (row + 0.5) - 0.75
        rectangle(ours, corner, 1.5, shade(value), edge="black", layer=4)
    for row in range(SIZE):
        for column in range(SIZE):
            if same_grid(QUERY)[row, column] and (row, column) != QUERY:
                connect(ours, QUERY, (row, column), 0.7)
    mark(ours, QUERY)

    positions, near, far = SIZE**2, GRID**2, (SIZE // RATIO) ** 2
    texts = (
        ("Plain attention", f"each of {positions} positions to all {positions}: {positions**2:,} pairs"),
        ("H-MHSA", f"each to {near} of its grid and {far} merged tokens: {positions * (near + far):,} pairs"),
    )
    for axes, (title, text) in zip((plain, ours), texts, strict=True):
        box = axes.get_position()
        middle = (box.x0 + box.x1) / 2
        figure.text(middle, 0.94, title, ha="center", va="center", fontsize=13, weight="bold")
        figure.text(middle, 0.14, text, ha="center", va="top", fontsize=10.5)
    return figure


SIDES = (128, 192, 256, 384, 512, 768, 1024, 1536, 2048)


def multiply_adds(side: int, grid_sizes: Any, pool_ratios: Any) -> int:
    """Of transcnn_tiny for one square image, counted by PyTorch without computing."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    import transcnn

    more = {"img_size": side} if grid_sizes == "auto" else {}
    with torch.device("meta"):
        model = transcnn.create_model("transcnn_tiny", grid_sizes=grid_sizes, pool_ratios=pool_ratios, **more).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, side, side, device="meta"))
    return counter.get_total_flops() // 2


def cost() -> Figure:
    """Multiply-adds for each pixel of the image against the image's side, of one network with three attentions."""
    kinds = (
        ("plain attention", [None] * 4, [None] * 4, ORANGE, ":"),
        ("H-MHSA, two levels (published)", [8, 8, 8, None], [8, 4, 2, None], BLUE, "--"),
        ('H-MHSA, grid_sizes="auto"', "auto", "auto", BLUE, "-"),
    )
    figure = new_figure(7.6, 4.4)
    axes = figure.add_subplot()
    for name, grids, ratios, colour, dashes in kinds:
        each = [multiply_adds(side, grids, ratios) / side**2 / 1e3 for side in SIDES]
        axes.plot(SIDES, each, dashes, marker="o", markersize=4, color=colour, label=name, linewidth=1.8)
        axes.annotate(f"{each[-1]:,.0f}", (SIDES[-1], each[-1]), (8, 0), textcoords="offset points", va="center")
    axes.set(xscale="log", yscale="log", xlabel="Side of the image in pixels (square)")
    axes.set(
        ylabel="Thousand multiply-adds for each pixel", title="What transcnn_tiny costs for each pixel of an image"
    )
    axes.set_xticks(SIDES, [str(side) for side in SIDES])
    axes.minorticks_off()
    axes.set_yticks([50, 100, 200, 500, 1000, 2000], ["50", "100", "200", "500", "1,000", "2,000"])
    axes.legend(frameon=False)
    return figure


def dimensions_cost() -> Figure:
    """Time and memory of one H-MHSA for each position, as results/dimensions_cost.csv has them."""
    with (Path(__file__).parent.parent / "results" / "dimensions_cost.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["channels"] == "32"]
    figure = new_figure(9.6, 4)
    panels = (
        ("ns a position", "Nanoseconds of computing for each position"),
        ("bytes a position", "Bytes of memory for each position"),
    )
    for axes, (column, title) in zip(figure.subplots(1, 2), panels, strict=True):
        for ndim, dashes in ((1, "-"), (3, "--")):
            for name, colour in (("H-MHSA", BLUE), ("plain attention", ORANGE)):
                chosen = [r for r in rows if r["size"].count("x") == ndim - 1]
                chosen = [r for r in chosen if (r["attention"] == "plain") == (colour == ORANGE)]
                x, y = ([float(r[c]) for r in chosen] for c in ("positions", column))
                axes.plot(x, y, dashes, marker="o", markersize=4, color=colour, label=f"{name}, {ndim}-D")
        axes.set(xscale="log", xlabel="Positions", title=title)
        axes.set_xticks([2**n for n in range(12, 23, 2)], ["4 k", "16 k", "64 k", "256 k", "1 M", "4 M"])
        if column == "ns a position":
            axes.set(yscale="log")
            axes.set_yticks([1e3, 1e4, 6e4], ["1,000", "10,000", "60,000"])
        else:
            axes.set(ylim=(0, None))
        axes.minorticks_off()
    axes.legend(frameon=False)
    return figure


def pyramid() -> Figure:
    """The four stages of transcnn_tiny for an image of 256x256: sizes, channels and blocks."""
    stages = [("image", 256, 3, ""), ("stem", 64, 64, "2 strided\nconvolutions")]
    grids = ("grids of 8, merged by 8", "grids of 8, merged by 4", "grids of 8, merged by 2", "plain attention")
    for i, (channels, depth) in enumerate(zip((64, 128, 256, 512), (2, 2, 4, 2), strict=True)):
        stages.append((f"stage {i + 1}", 64 >> i, channels, f"{depth} blocks\n{grids[i]}"))
    figure = new_figure(11, 3.5, layout="none")
    axes = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    axes.axis("off")
    axes.set(xlim=(0, 110), ylim=(3.5, 38.5), aspect="equal")
    places = (9, 28, 46, 65, 83, 101)
    for i, ((name, side, channels, text), x) in enumerate(zip(stages, places, strict=True)):
        tall = 2.2 + 13 * (side / 256) ** 0.5
        wide = 1.2 + 5 * (channels / 512) ** 0.5 if i else 1.2
        slab(axes, x, 20, wide, tall, 0.25 + 0.13 * i if i else 0.05)
        axes.text(x, 36, name, ha="center", va="center", fontsize=11.5, weight="bold")
        axes.text(x, 32.6, f"{side}×{side}, {channels} channels", ha="center", va="center", fontsize=8.5)
        axes.text(x, 9.5, text, ha="center", va="top", fontsize=8.5, linespacing=1.4)
        if i:
            axes.text((places[i - 1] + x) / 2 + 0.6, 20, "➜", ha="center", va="center", fontsize=15)
    return figure


def architecture() -> Figure:
    """The rooms of the package, and who imports whom, read from the imports themselves."""
    import house
    from matplotlib.patches import FancyBboxPatch

    unsaid = {"errors", "imports", "transcnn", "settings", "plain", "text", "weights"}  # imported from all floors
    graph = {name: others - unsaid for name, others in house.room_graph(house.import_graph()).items()}
    graph = {name: others for name, others in graph.items() if name not in unsaid}
    graph["cli"] = {"commands"}  # by name: a command is imported when it is called
    drawn = {
        name: {o for o in others if not any(o in _below(graph, p) for p in others)} for name, others in graph.items()
    }
    rows: dict[int, list[str]] = {}
    for name in graph:  # as high as its importers allow, so that arrows are short
        rows.setdefault(_depth(graph, name), []).append(name)
    places: dict[str, tuple[float, float]] = {}
    for depth in sorted(rows):
        above = {n: [places[p][0] for p in graph if n in drawn[p]] or [5.5] for n in rows[depth]}
        for i, name in enumerate(sorted(rows[depth], key=lambda n: (np.mean(above[n]), n))):
            places[name] = (11 * (i + 0.5) / len(rows[depth]), -depth)
    figure = new_figure(11, 0.95 * len(rows), layout="none")
    axes = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    axes.axis("off")
    axes.set(xlim=(0, 11), ylim=(0.4 - len(rows), 0.4))
    for name, others in drawn.items():
        for other in others:
            (x, y), (to_x, to_y) = places[name], places[other]
            axes.annotate("", (to_x, to_y + 0.2), (x, y - 0.2), arrowprops={"arrowstyle": "-|>", "color": "#909090"})
    for name, (x, y) in places.items():
        width, strength = 0.1 * len(name) + 0.3, 0.45 if name == "the paper" else 0.05
        corner, style = (x - width / 2, y - 0.15), "round,pad=0.03"
        face = {"facecolor": shade(strength), "edgecolor": "black", "linewidth": 0.8, "zorder": 2}
        axes.add_patch(FancyBboxPatch(corner, width, 0.3, boxstyle=style, **face))
        axes.text(x, y, name, ha="center", va="center", fontsize=11, zorder=3)
    return figure


def _depth(graph: dict[str, set[str]], name: str) -> int:
    """How many rooms stand above one, in the longest row."""
    return max((1 + _depth(graph, other) for other in graph if name in graph[other]), default=0)


def _below(graph: dict[str, set[str]], name: str) -> set[str]:
    """All rooms that a room imports, itself or through others."""
    found, waiting = set(), [name]
    while waiting:
        for other in graph.get(waiting.pop(), set()) - found:
            found.add(other)
            waiting.append(other)
    return found


def slab(axes: Axes, x: float, y: float, wide: float, tall: float, value: float) -> None:
    """A stack of maps, as a box seen from the side: as wide as there are channels, as tall as the maps are."""
    from matplotlib.patches import Polygon, Rectangle

    shift, left, low = 0.3 * tall, x - wide / 2 - 0.15 * tall, y - 0.65 * tall
    faces = (
        (Rectangle((left, low), wide, tall), 1.0),
        (Polygon([(left, low + tall), (left + wide, low + tall), (left + wide + shift, low + tall + shift),
                  (left + shift, low + tall + shift)]), 0.6),
        (Polygon([(left + wide, low), (left + wide, low + tall), (left + wide + shift, low + tall + shift),
                  (left + wide + shift, low + shift)]), 0.8),
    )  # fmt: skip
    for face, strength in faces:
        face.set(facecolor=shade(value, strength), edgecolor="black", linewidth=0.8)
        axes.add_patch(face)


def same_grid(position: tuple[int, int]) -> np.ndarray:
    """Which positions share the grid of ``position``, (SIZE, SIZE)."""
    row, column = (np.arange(SIZE) // GRID == p // GRID for p in position)
    return row[:, None] & column[None]


def draw_map(axes: Axes, values: np.ndarray, shown: np.ndarray | None = None) -> None:
    """A map as cells, those not ``shown`` pale."""
    rows, columns = values.shape
    for (row, column), value in np.ndenumerate(values):
        faint = shown is not None and not shown[row, column]
        rectangle(axes, (column, row), 1, shade(value, 0.3 if faint else 1), edge="#b0b0b0" if rows > 8 else "black")
    axes.set(xlim=(-0.1, columns + 0.1), ylim=(rows + 0.1, -0.1), aspect="equal")
    axes.axis("off")


def shade(value: float, strength: float = 1.0) -> tuple[float, float, float]:
    """White to blue."""
    blue = np.array([int(BLUE[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    red, green, rest = 1 - strength * (0.12 + 0.75 * value) * (1 - blue)
    return float(red), float(green), float(rest)


def rectangle(axes: Axes, corner: tuple[float, float], side: float, colour: Any, edge: str, layer: int = 1) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle(corner, side, side, facecolor=colour, edgecolor=edge, linewidth=0.5, zorder=layer))


def mark(axes: Axes, position: tuple[int, int]) -> None:
    """The position that asks."""
    from matplotlib.patches import Rectangle

    row, column = position
    axes.add_patch(Rectangle((column, row), 1, 1, facecolor=ORANGE, edgecolor="black", linewidth=1, zorder=5))


def connect(axes: Axes, start: tuple[float, float], end: tuple[float, float], width: float) -> None:
    """A line between the centres of two positions, as thick as the attention is strong."""
    (row, column), (to_row, to_column) = start, end
    x, y = [column + 0.5, to_column + 0.5], [row + 0.5, to_row + 0.5]
    axes.plot(x, y, color=ORANGE, linewidth=width, zorder=3, solid_capstyle="round")


FIGURES = {
    "hmhsa.png": hmhsa,
    "attention.png": attention,
    "cost.png": cost,
    "dimensions_cost.png": dimensions_cost,
    "pyramid.png": pyramid,
    "architecture.png": architecture,
}

if __name__ == "__main__":
    wanted = sys.argv[1:] or list(FIGURES)  # python docs/make_figures.py cost.png draws that one alone
    folder = Path(__file__).parent / "images"
    folder.mkdir(exist_ok=True)
    with style():
        for name in wanted:
            FIGURES[name]().savefig(folder / name, dpi=170)
            print(folder / name)
