"""Makes a data set for Mask R-CNN up: squares, discs and triangles of any colour, in COCO's format with masks.

    python benchmarks/make_shapes.py shapes [--train 300] [--val 50] [--test 100] [--size 96] [--seed 0]

Each image holds one to four shapes on a noisy ground; a shape may hide up to a quarter of another, and its mask is what
is seen of it. Colours say nothing about the kind. recipes/shapes_maskrcnn.yaml learns it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from transcnn.report.overlay import run_lengths

NAMES = ("square", "disc", "triangle")
MOST_HIDDEN = 0.25


def outline(kind: int, x: int, y: int, side: int) -> list[tuple[float, float]]:
    """Corners of a shape whose box begins at (x, y)."""
    end = side - 1
    if NAMES[kind] == "square":
        corners = [(0, 0), (end, 0), (end, end), (0, end)]
    elif NAMES[kind] == "triangle":
        corners = [(end / 2, 0), (end, end), (0, end)]
    else:
        angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        corners = [(end / 2 * (1 + np.cos(a)), end / 2 * (1 + np.sin(a))) for a in angles]
    return [(x + dx, y + dy) for dx, dy in corners]


def picture(rng: np.random.Generator, size: int) -> tuple[Image.Image, list[tuple[int, np.ndarray]]]:
    """An image, and the kind and visible mask (H, W) of each shape in it."""
    ground = rng.integers(0, 256, 3)
    pixels = np.broadcast_to(ground, (size, size, 3)).astype(float)
    shapes: list[tuple[int, np.ndarray]] = []
    full: list[int] = []
    wanted = int(rng.integers(1, 5))
    for _ in range(50):
        if len(shapes) == wanted:
            break
        side = int(rng.integers(size // 4, size // 2))
        x, y = (int(value) for value in rng.integers(0, size - side + 1, 2))
        kind = int(rng.integers(len(NAMES)))
        canvas = Image.new("1", (size, size))
        ImageDraw.Draw(canvas).polygon(outline(kind, x, y, side), fill=1)
        mask = np.asarray(canvas, dtype=bool)
        left = [(other, seen & ~mask) for other, seen in shapes]
        if any(seen.sum() < (1 - MOST_HIDDEN) * area for (_, seen), area in zip(left, full, strict=True)):
            continue
        colour = rng.integers(0, 256, 3)
        if np.abs(pixels[mask] - colour).sum(1).min() < 120:  # it must be seen
            continue
        pixels[mask] = colour
        shapes = [*left, (kind, mask)]
        full.append(int(mask.sum()))
    noisy = pixels + rng.normal(0, 12, pixels.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8)), shapes


def annotation(kind: int, mask: np.ndarray, image_id: int, number: int) -> dict[str, Any]:
    """COCO's description of one shape."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    x, y = int(columns[0]), int(rows[0])
    return {
        "id": number,
        "image_id": image_id,
        "category_id": kind + 1,
        "bbox": [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y],
        "area": int(mask.sum()),
        "iscrowd": 0,
        "segmentation": run_lengths(mask),
    }


def make_shapes(folder: Path, parts: dict[str, int], size: int = 96, seed: int = 0) -> None:
    """Write ``images/`` and ``annotations/{part}.json``; ``parts`` says how many images each part has."""
    for name in ("images", "annotations"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    number = 0
    for part, count in parts.items():
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for _ in range(count):
            number += 1
            image, shapes = picture(rng, size)
            image.save(folder / "images" / f"{number:05}.png")
            images.append({"id": number, "file_name": f"{number:05}.png", "width": size, "height": size})
            annotations += [annotation(kind, mask, number, 10 * number + k) for k, (kind, mask) in enumerate(shapes)]
        categories = [{"id": i + 1, "name": name} for i, name in enumerate(NAMES)]
        sheet = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "annotations" / f"{part}.json").write_text(json.dumps(sheet))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    for part, count in (("train", 300), ("val", 50), ("test", 100)):
        parser.add_argument(f"--{part}", type=int, default=count)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    make_shapes(a.out, {"train": a.train, "val": a.val, "test": a.test}, a.size, a.seed)


if __name__ == "__main__":
    main()
