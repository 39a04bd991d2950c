"""One figure of where a network looks, for somebody who hasn't read the paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..grids import per_axis, product
from ..report.plots import BLUE, GREY, ORANGE, new_figure
from ..text import printable
from .geometry import edges
from .maps import AttentionMap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["MARK", "Explanation", "describe", "draw", "heat", "marks_of"]

MARK = "#00d5ff"  # the spot asked about; in none of the colours of the maps
PANEL = 2.55  # inches
NO_GRIDS = "No grids here:\nthe map is so small that each\ncell looks at all others at once\n(see the last row)."


@dataclass
class Explanation:
    """All that the figure shows.

    Attributes:
        image: What the network saw, uint8 (h, w) or (h, w, 3), at any resolution.
        query: Row and column of the pixel asked about.
        stages: The maps of one block of each stage, local ones first.
        top: The most probable classes with their probabilities, highest first; or numbers by their names.
        class_name: The class that ``cam`` and ``taken`` are about.
        cam: Grad-CAM, (H, W).
        taken: Gradient times attention, (H, W).
        title: Of the whole.
        note: Small print at the foot.
        shares: Whether ``top`` holds probabilities; else numbers in the data's unit.
    """

    image: np.ndarray
    query: tuple[int, int]
    stages: Sequence[Sequence[AttentionMap]]
    top: Sequence[tuple[str, float]]
    class_name: str
    cam: np.ndarray
    taken: np.ndarray
    title: str
    note: str = ""
    shares: bool = True


def draw(e: Explanation) -> Figure:
    """The figure: image, prediction and evidence in the first row; below, a column a stage and a row a step."""
    columns = max(4, len(e.stages))
    levels = max(len(maps) for maps in e.stages) - 1
    rows = levels + 1
    heights = [PANEL + 0.95] + [PANEL + 0.75] * rows
    width, height = columns * (PANEL + 0.3) + 0.3, sum(heights) + 1.75
    page = _Page(new_figure(width, height, layout="none"), width, height)
    page.write(width / 2, 0.3, printable(e.title), size=15, weight="bold", align="center")

    top = 0.62
    lefts = [0.3 + (PANEL + 0.3) * (i + (columns - 4) / 2) for i in range(4)]
    _draw_image(page.panel(lefts[0], top + 0.3), e)
    page.caption(lefts[0], top, "The image", "Blue square: the spot that the\nmaps below are asked about.")
    _draw_answers(page.panel(lefts[1] + 0.08, top + 0.3, PANEL - 0.16), e)
    page.caption(
        lefts[1], top, "The prediction", "The most probable classes." if e.shares else "In the unit of the data."
    )
    name = f"“{_cut(e.class_name, 13)}”"
    about = (
        (f"Evidence for {name}", "Grad-CAM: the parts of the image that\nraise the score of this class.", e.cam),
        (
            "What attention uses for it",
            "Gradient × attention: what attention\ntook from here raised that score.",
            e.taken,
        ),
    )
    for left, (title, text, values) in zip(lefts[2:], about, strict=True):
        _draw_heat(page.panel(left, top + 0.3), e.image, values)
        page.caption(left, top, title, text)

    lefts = [0.3 + (PANEL + 0.3) * (i + (columns - len(e.stages)) / 2) for i in range(len(e.stages))]
    for row in range(rows):
        top = 0.62 + heights[0] + 0.65 + sum(heights[1 : row + 1])
        if row == 0:
            page.rule(top - 0.68)
            words = "Where does the marked spot look? Brighter: it takes more from there."
            page.write(width / 2, top - 0.47, words, size=12, weight="bold", align="center")
            words = "The network cuts the image into cells; each cell first looks around in its grid, then far away."
            page.write(width / 2, top - 0.22, words, size=9.5, colour="#333333", align="center")
        for i, (left, maps) in enumerate(zip(lefts, e.stages, strict=True)):
            local = [m for m in maps if m.step == "local"]
            found = maps[-1] if row == levels else local[row] if row < len(local) else None
            title = f"Stage {i + 1}: {_step_name(row, levels)}"
            if found is None:
                words = "No further grids here." if local else NO_GRIDS
                page.caption(left, top, title, "")
                page.write(left + PANEL / 2, top + 0.3 + PANEL / 2, words, size=9.5, colour="#555555", align="center")
                continue
            _draw_map(page.panel(left, top + 0.3), e.image, found)
            page.caption(left, top, title, describe(found))
    page.write(width / 2, height - 0.22, e.note, size=8.5, colour="#555555", align="center")
    return page.figure


class _Page:
    """A figure measured in inches from its top left corner."""

    def __init__(self, figure: Figure, width: float, height: float) -> None:
        self.figure, self.width, self.height = figure, width, height

    def panel(self, left: float, top: float, width: float = PANEL) -> Axes:
        box = (left / self.width, 1 - (top + PANEL) / self.height, width / self.width, PANEL / self.height)
        return self.figure.add_axes(box)

    def caption(self, left: float, top: float, title: str, text: str) -> None:
        """A title above a panel whose row begins at ``top``, and plain words below it."""
        self.write(left, top + 0.16, title, size=10.5, weight="bold")
        self.write(left, top + 0.3 + PANEL + 0.07, text, size=8.5, colour="#333333", vertical="top")

    def write(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float,
        weight: str = "normal",
        colour: str = "black",
        align: str = "left",
        vertical: str = "center",
    ) -> None:
        place = (x / self.width, 1 - y / self.height)
        self.figure.text(*place, text, fontsize=size, weight=weight, color=colour, ha=align, va=vertical)

    def rule(self, y: float) -> None:
        from matplotlib.lines import Line2D

        place = 1 - y / self.height
        self.figure.add_artist(Line2D([0.02, 0.98], [place, place], color="#cccccc", linewidth=1))


def _step_name(row: int, levels: int) -> str:
    if row == levels:
        return "far, the whole image"
    return "near, inside its grid" if row == 0 else f"farther, grids of level {row + 1}"


def describe(m: AttentionMap) -> str:
    """Two lines about one map in plain words."""
    sides = zip(m.size, m.map_size, per_axis(m.ratio, 2), strict=True)
    tall, wide = (_first_step(n, had) * ratio for n, had, ratio in sides)
    cell = f"{min(tall, m.size[0])}×{min(wide, m.size[1])} pixels"
    strongest = float(m.weights.max()) * m.seen
    share = "An even look: from all alike." if strongest < 1.05 else f"Brightest: {strongest:.1f} × an even share."
    if m.grid_size is not None:
        return f"Sees {m.seen} cells of {cell} (white frame).\n{share}"
    what = "averages over" if m.ratio != 1 else "cells of"
    return f"Sees {m.seen} {what} {cell}.\n{share}"


def _first_step(pixels: int, count: int) -> int:
    return edges(pixels, count)[1]


def _draw_image(axes: Axes, e: Explanation) -> None:
    _show(axes, e.image, e.cam.shape)
    side = max(1.0, max(e.cam.shape) / 40)
    top, left = e.query[0] + 0.5 - side / 2, e.query[1] + 0.5 - side / 2
    _frame(axes, (top, left, top + side, left + side), MARK, 2.2)


def _draw_answers(axes: Axes, e: Explanation) -> None:
    names, shares = [name for name, _ in e.top], [share for _, share in e.top]
    places = np.arange(len(names))
    colours = [ORANGE if name == e.class_name else BLUE for name in names]
    if e.shares:
        axes.barh(places, shares, color=colours, height=0.36)
    for place, name, share in zip(places, names, shares, strict=True):
        text = f"{100 * share:.1f} %" if e.shares else f"{share:,.6g}"
        axes.text(0, place - 0.3, f"{_cut(name, 24)}  {text}", va="bottom", ha="left", fontsize=9.5)
    axes.set(xlim=(0, 1), ylim=(4.45, -0.75))
    axes.axis("off")
    axes.axvline(0, color=GREY, linewidth=1)


def _draw_heat(axes: Axes, image: np.ndarray, values: np.ndarray) -> None:
    _show(axes, heat(image, values), values.shape)


def _draw_map(axes: Axes, image: np.ndarray, m: AttentionMap) -> None:
    """One attention map over the image, with grid lines, the position's own grid, and the position."""
    _show(axes, heat(image, m.pixels.double().numpy()), m.size)
    marks = marks_of(m)
    for y in marks.rows:
        axes.axhline(y - 0.5, color="white", linewidth=0.7, alpha=0.7)
    for x in marks.columns:
        axes.axvline(x - 0.5, color="white", linewidth=0.7, alpha=0.7)
    if m.grid_size is not None:
        _frame(axes, m.box, "white", 2.4)
    top, left, bottom, right = marks.window
    axes.set(xlim=(left - 0.5, right - 0.5), ylim=(bottom - 0.5, top - 0.5))
    _frame(axes, marks.spot, MARK, 2.0)


@dataclass(frozen=True)
class Marks:
    """What is drawn over an attention map, all in pixels of the image.

    Attributes:
        rows, columns: Where grids end, the image's own border left out.
        spot: Top, left, bottom and right of the position that asks.
        window: The part to show: grids are small in early stages, so the own one and those around it, else all.
    """

    rows: Sequence[int]
    columns: Sequence[int]
    spot: tuple[int, int, int, int]
    window: tuple[float, float, float, float]


def marks_of(m: AttentionMap) -> Marks:
    """Where to draw what over a map."""
    ys, xs = (edges(n, had) for n, had in zip(m.size, m.map_size, strict=True))
    ratios = per_axis(m.ratio if m.grid_size is not None else 1, 2)
    (top, bottom), (left, right) = (
        (lines[place * ratio], lines[min((place + 1) * ratio, len(lines) - 1)])
        for lines, place, ratio in zip((ys, xs), m.query, ratios, strict=True)
    )
    spot = (top, left, bottom, right)
    window = (0.0, 0.0, float(m.size[0]), float(m.size[1]))
    if m.grid_size is None:
        return Marks((), (), spot, window)
    down, across = product(per_axis(m.grid_size, 2), m.ratio)
    sides = [3 * lines[min(step, len(lines) - 1)] for lines, step in ((ys, down), (xs, across))]
    if sides[0] < m.size[0] and sides[1] < m.size[1]:
        middles = (m.box[0] + m.box[2]) / 2, (m.box[1] + m.box[3]) / 2
        low = [min(max(0.0, c - s / 2), n - s) for c, s, n in zip(middles, sides, m.size, strict=True)]
        window = (low[0], low[1], low[0] + sides[0], low[1] + sides[1])
    return Marks(ys[:-1:down][1:], xs[:-1:across][1:], spot, window)


def heat(image: np.ndarray, values: np.ndarray) -> np.ndarray:
    """A dim grey image with colours over it, the brighter the larger, from 0 to the largest value; (h, w, 3).

    ``values`` may be of another size: each pixel of the image takes the value that it lies on.
    """
    import matplotlib

    rows, columns = (np.arange(n) * had // n for n, had in zip(image.shape[:2], values.shape, strict=True))
    values = values[rows[:, None], columns]
    pixels = image.astype(float) / 255
    grey = pixels if pixels.ndim == 2 else pixels @ np.array([0.299, 0.587, 0.114])
    largest = values.max()
    share = values / largest if largest > 0 else np.zeros_like(values)
    colours = matplotlib.colormaps["inferno"](0.25 + 0.7 * share)[..., :3]
    strength = 0.8 * share[..., None] ** 0.6
    return (1 - strength) * (0.12 + 0.5 * grey[..., None]) + strength * colours


def _show(axes: Axes, image: np.ndarray, size: Sequence[int]) -> None:
    """An image of any resolution over the network's ``size``, in whose pixels everything else is drawn."""
    small = max(image.shape[:2]) <= 96
    extent = (-0.5, size[1] - 0.5, size[0] - 0.5, -0.5)
    axes.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest" if small else "auto", extent=extent)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def _frame(axes: Axes, box: Sequence[float], colour: str, width: float) -> None:
    """A rectangle (top, left, bottom, right) in pixels."""
    from matplotlib.patches import Rectangle

    top, left, bottom, right = box
    height, wide = bottom - top, right - left
    common: dict[str, Any] = {"fill": False, "joinstyle": "miter", "clip_on": False}
    axes.add_patch(Rectangle((left - 0.5, top - 0.5), wide, height, edgecolor="black", linewidth=width + 1.4, **common))
    axes.add_patch(Rectangle((left - 0.5, top - 0.5), wide, height, edgecolor=colour, linewidth=width, **common))


def _cut(name: str, length: int) -> str:
    name = printable(" ".join(name.split()))
    return name if len(name) <= length else f"{name[: length - 1]}…"
