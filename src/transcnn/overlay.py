"""Predictions drawn on the pictures that they are about: label maps with a legend."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

__all__ = ["PictureFolder", "blend", "label_png", "legend", "palette"]

Colours = Sequence[Sequence[int]]


def palette(count: int) -> list[list[int]]:
    """Colours that neighbours in the list tell apart by hue and by lightness, as (r, g, b) from 0 to 255."""
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
    font, gap = ImageFont.load_default(size), size // 2
    places: list[tuple[int, int]] = []
    x = y = gap
    for name in names:
        width = round(font.getlength(name)) + size + 3 * gap
        if x > gap and x + width > image.width:
            x, y = gap, y + size + gap
        places.append((x, y))
        x += width
    whole = Image.new("RGB", (image.width, image.height + (y + size + gap if names else 0)), "white")
    whole.paste(image)
    draw = ImageDraw.Draw(whole)
    for name, colour, (left, top) in zip(names, colours, places, strict=True):
        top += image.height
        draw.rectangle((left, top, left + size, top + size), fill=tuple(colour), outline="black")
        draw.text((left + size + gap, top + size / 2), name, fill="black", font=font, anchor="lm")
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


class PictureFolder:
    """Where pictures go, each under a name of its own: a.png, then a-2.png for another folder's a.jpg."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.taken: set[str] = set()

    def stem_for(self, file: str) -> Path:
        """The path, without ending, for what belongs to ``file``."""
        stem = name = Path(file).stem or "image"
        for i in range(2, 1_000_000):
            if name.casefold() not in self.taken:
                break
            name = f"{stem}-{i}"
        self.taken.add(name.casefold())
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / name
