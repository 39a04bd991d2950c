"""Attention maps, spots, masks and boxes drawn over an image, fast enough for every click."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from ..explain.figure import MARK, heat, marks_of
from ..explain.maps import AttentionMap

__all__ = ["draw_look", "mark_spot"]

SMALLEST = 360  # longest side of what is shown, at least


def draw_look(photo: Image.Image, m: AttentionMap) -> Image.Image:
    """One attention map over an image of any size, with grid lines, the spot and its own grid.

    In early stages, whose grids are small, the part around the spot's grid alone, enlarged.
    """
    pixels = np.asarray(photo)
    image = Image.fromarray((255 * heat(pixels, m.pixels.double().numpy())).round().astype(np.uint8))
    tall, wide = (n / had for n, had in zip(pixels.shape[:2], m.size, strict=True))

    marks = marks_of(m)
    top, left, bottom, right = marks.window
    window = (round(left * wide), round(top * tall), round(right * wide), round(bottom * tall))
    image = image.crop(window)
    zoom = max(1.0, max(photo.size) / max(image.size))
    image = image.resize((round(image.width * zoom), round(image.height * zoom)), Image.Resampling.NEAREST)

    def place(y: float, x: float) -> tuple[float, float]:
        return zoom * (x * wide - window[0]), zoom * (y * tall - window[1])

    draw = ImageDraw.Draw(image)
    for y in marks.rows:
        draw.line([place(y, left), place(y, right)], fill="#dddddd")
    for x in marks.columns:
        draw.line([place(top, x), place(bottom, x)], fill="#dddddd")
    if m.grid_size is not None:
        _frame(draw, [*place(*m.box[:2]), *place(*m.box[2:])], "white", 3)
    _frame(draw, [*place(*marks.spot[:2]), *place(*marks.spot[2:])], MARK, 3)
    return image


def mark_spot(photo: Image.Image, spot: Sequence[int]) -> Image.Image:
    """A copy of the image with a square around a spot (row, column)."""
    image = photo.copy()
    half = max(4, max(photo.size) // 60)
    row, column = spot
    _frame(ImageDraw.Draw(image), [column - half, row - half, column + half, row + half], MARK, 3)
    return image


def enlarged(image: Image.Image) -> Image.Image:
    """An image of few pixels as one that can be seen, its pixels sharp-edged; others as they are."""
    factor = SMALLEST // max(image.size)
    if factor <= 1:
        return image
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _frame(draw: ImageDraw.ImageDraw, box: Sequence[float], colour: str, width: int) -> None:
    """A rectangle (left, top, right, bottom) with a thin black edge around it, so that it shows on any ground."""
    left, top, right, bottom = box
    right, bottom = max(right - 1, left + 1), max(bottom - 1, top + 1)
    draw.rectangle([left - 1, top - 1, right + 1, bottom + 1], outline="black", width=width + 2)
    draw.rectangle([left, top, right, bottom], outline=colour, width=width)
