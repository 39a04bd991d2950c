"""Draw the pictures of docs/images again: ``make figures``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from transcnn.plots import BLUE, ORANGE, new_figure, style

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


FIGURES = {"hmhsa.png": hmhsa}

if __name__ == "__main__":
    folder = Path(__file__).parent / "images"
    folder.mkdir(exist_ok=True)
    with style():
        for name, draw in FIGURES.items():
            draw().savefig(folder / name, dpi=170)
            print(folder / name)
