"""Predictions drawn on their images: label maps with a legend, boxes and masks."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..text import printable
from .fonts import image_font

__all__ = [
    "SHOWN_SCORE",
    "blend",
    "draw_detections",
    "label_png",
    "largest",
    "legend",
    "palette",
    "run_lengths",
    "with_lines",
]

Colours = Sequence[Sequence[int]]
SHOWN_SCORE = 0.5  # detections from this score on are drawn, and count for an image's own score


def palette(count: int) -> list[list[int]]:
    """Colours whose neighbours in the list differ in hue and lightness, as (r, g, b) from 0 to 255."""
    levels = ((0.85, 0.95), (0.95, 0.6), (0.5, 0.8))  # saturation and value
    result = []
    for i in range(count):
        saturation, value = levels[i % len(levels)]
        colour = colorsys.hsv_to_rgb(i * 0.618034 % 1, saturation, value)
        result.append([round(255 * part) for part in colour])
    return result


def blend(image: Image.Image, labels: np.ndarray, colours: Colours, strength: float = 0.55) -> Image.Image:
    """The image with each class in its colour; ``labels`` (H, W) below 0 leave it as it is."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    table = np.array([*colours, [0, 0, 0]], dtype=np.float32)  # -1 is the last
    mixed = (1 - strength) * pixels + strength * table[labels]
    return Image.fromarray(np.where((labels >= 0)[..., None], mixed, pixels).round().astype(np.uint8))


def legend(image: Image.Image, names: Sequence[str], colours: Colours) -> Image.Image:
    """The image with the names below it, a patch of its colour before each."""
    size = max(11, min(28, image.width // 40))
    names = [printable(name) for name in names]
    font, gap = image_font(size, names), size // 2
    corners: list[tuple[int, int]] = []
    x = y = gap
    for name in names:
        width = round(font.getlength(name)) + size + 3 * gap
        if x > gap and x + width > image.width:
            x, y = gap, y + size + gap
        corners.append((x, y))
        x += width
    whole = Image.new("RGB", (image.width, image.height + (y + size + gap if names else 0)), "white")
    whole.paste(image)
    draw = ImageDraw.Draw(whole)
    for name, colour, (left, top) in zip(names, colours, corners, strict=True):
        top += image.height
        draw.rectangle((left, top, left + size, top + size), fill=tuple(colour), outline="black")
        draw.text((left + size + gap, top + size / 2), name, fill="black", font=font, anchor="lm")
    return whole


def with_lines(image: Image.Image, lines: Sequence[str], least: int = 240) -> Image.Image:
    """The image, enlarged to ``least`` pixels of width if need be, with lines of text below it."""
    image = image.convert("RGB")
    if (factor := min(-(-least // image.width), 4096 // image.height)) > 1:
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    lines = [printable(line) for line in lines]
    size = max(13, min(28, image.width // 25))
    font, step = image_font(size, lines), size + size // 2
    whole = Image.new("RGB", (image.width, image.height + step * len(lines) + size // 2), "white")
    whole.paste(image)
    draw = ImageDraw.Draw(whole)
    for i, line in enumerate(lines):
        draw.text((size // 2, image.height + step * (i + 0.6)), line, fill="black", font=font, anchor="lm")
    return whole


def label_png(labels: np.ndarray, label_ids: Sequence[int], colours: Colours) -> Image.Image:
    """A label map of the data's own ids, coloured by a palette where they fit in 8 bits."""
    ids = np.asarray(label_ids)[labels]
    if max(label_ids) > 255:
        return Image.fromarray(ids.astype(np.uint16))
    table = np.zeros((256, 3), dtype=np.uint8)
    table[list(label_ids)] = colours
    image = Image.fromarray(ids.astype(np.uint8), mode=None)
    image.putpalette(table.tobytes())
    return image


def draw_detections(
    image: Image.Image,
    found: Mapping[str, np.ndarray],
    names: Sequence[str],
    colours: Colours,
    min_score: float,
    *,
    key: bool = True,
    enlarge: int = 0,
) -> Image.Image:
    """The image with boxes (and masks), each with its name and score.

    Args:
        image: Any.
        found: ``boxes`` (N, 4), ``labels`` (N,), perhaps ``scores`` (N,) and ``masks`` (N, H, W) or (N, 1, H, W).
        names, colours: Of the classes.
        min_score: Detections below it are left out.
        key: Write names and scores at the boxes.
        enlarge: Least long side of the result in pixels, so that there is room for names on small images.
    """
    factor = max(1, enlarge // max(image.size))
    if factor > 1:
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
        found = {**found, "boxes": found["boxes"] * factor}
        if "masks" in found:
            found["masks"] = found["masks"].repeat(factor, -1).repeat(factor, -2)
    drawn = image.convert("RGB")
    scores = found.get("scores")
    chosen = range(len(found["boxes"])) if scores is None else np.flatnonzero(scores >= min_score).tolist()
    for i in chosen:
        if "masks" in found:
            mask = found["masks"][i].reshape(image.height, image.width) > 0.5
            drawn = blend(drawn, np.where(mask, int(found["labels"][i]), -1), colours, 0.45)
    draw = ImageDraw.Draw(drawn)
    size = max(10, min(24, image.width // 45))
    font = image_font(size, names)
    for i in reversed(list(chosen)):
        label = int(found["labels"][i])
        x1, y1, x2, y2 = (float(value) for value in found["boxes"][i])
        x2, y2, wide = max(x1, x2 - 1), max(y1, y2 - 1), max(2, size // 6)
        draw.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline="black", width=wide + 2)  # pale colours on pale ground
        draw.rectangle((x1, y1, x2, y2), outline=tuple(colours[label]), width=wide)
        if key:
            text = printable(names[label] if scores is None else f"{names[label]} {scores[i]:.2f}")
            width = font.getlength(text) + 4
            left, top = max(0.0, min(x1, image.width - width)), max(0.0, y1 - size - 3)
            draw.rectangle((left, top, left + width, top + size + 3), fill=tuple(colours[label]))
            light = sum(colours[label]) > 380
            draw.text((left + 2, top + 1), text, fill="black" if light else "white", font=font)
    return drawn


def largest(labels: np.ndarray, names: Sequence[str], top_k: int) -> list[dict[str, Any]]:
    """``[{"label": ..., "share": ...}, ...]``: the classes with most pixels of a label map (H, W)."""
    shares = np.bincount(labels.ravel(), minlength=len(names)) / labels.size
    order = [i for i in np.argsort(-shares, kind="stable").tolist() if shares[i] > 0]
    return [{"label": names[i], "share": round(float(shares[i]), 6)} for i in order[:top_k]]


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """COCO's uncompressed run lengths: of zeros, ones, zeros, ... column by column."""
    flat = mask.flatten(order="F")
    changes = np.flatnonzero(np.diff(flat.astype(np.int8))) + 1
    ends = [0, *changes.tolist(), len(flat)]
    counts = np.diff(ends).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}
