"""The JSON beside an exported file says all: by its steps and numpy alone, the same answers as ``transcnn predict``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from transcnn.data.images import BrokenImage, read_image
from transcnn.data.transforms.segment import EvalTransform
from transcnn.export.steps import steps
from transcnn.onnx.dense import class_map, detections
from transcnn.onnx.predict import to_input

STATS = dict(mean=[0.52, 0.4, 0.31], std=[0.2, 0.25, 0.3])


def cubic(x: np.ndarray) -> np.ndarray:
    """The cubic with a = -0.5."""
    x = abs(x)
    return np.select([x < 1, x < 2], [(1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2])


KERNELS = {
    "bilinear": (1, lambda x: np.maximum(1 - abs(x), 0)),
    "bicubic": (2, cubic),
    "lanczos": (3, lambda x: np.where(abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)),
}


def resize_axis(pixels: np.ndarray, new: int, interpolation: str) -> np.ndarray:
    """Of the first axis, as the steps say."""
    old = len(pixels)
    s = old / new
    if interpolation == "nearest":
        return pixels[np.cumsum([s / 2, *[s] * (new - 1)]).astype(int)]
    reach, kernel = KERNELS[interpolation]
    f = max(s, 1)
    rows = []
    for i in range(new):
        c = (i + 0.5) * s
        j = np.arange(max(0, math.floor(c - reach * f + 0.5)), min(old, math.floor(c + reach * f + 0.5)))
        weights = kernel((j - c + 0.5) / f)
        weights = np.trunc(weights / weights.sum() * 2**22 + np.copysign(0.5, weights))
        rows.append(np.tensordot(weights, pixels[j], 1))
    return np.clip(np.floor(np.stack(rows) / 2**22 + 0.5), 0, 255)


def make_input(pixels: np.ndarray, info: dict[str, Any]) -> np.ndarray:
    """Decoded pixels (H, W) or (H, W, C), upright, to (3, H, W): the steps of a classifier one by one."""
    config = info["data_config"]
    _, height, width = config["input_size"]
    mode = config.get("crop_mode", "center")
    if pixels.dtype == np.uint16:
        low, high = config.get("pixel_range", (0, 65535))
        pixels = np.clip(np.floor((pixels - float(low)) * 255 / (high - low) + 0.5), 0, 255)
    pixels = np.atleast_3d(pixels).astype(np.float64)
    if pixels.shape[2] in (2, 4):
        colours, a = pixels[..., :-1], pixels[..., -1:]
        pixels = np.floor((colours * a + 255 * (255 - a)) / 255 + 0.5)
    pixels = np.repeat(pixels, 3, 2) if pixels.shape[2] == 1 else pixels
    limit = {"center": 8, "border": max(8, height, width), "squash": np.inf}[mode]
    for axis in (0, 1):
        long, short = pixels.shape[axis], pixels.shape[1 - axis]
        if long > limit * short:
            first = (long - limit * short) // 2
            pixels = np.take(pixels, range(first, first + limit * short), axis)
    tall, wide = (math.floor(side / config["crop_pct"]) for side in (height, width))
    rows, columns = pixels.shape[:2]
    if mode == "squash":
        rows, columns = tall, wide
    elif tall == wide and mode == "center":
        long = math.floor(tall * max(rows, columns) / min(rows, columns))
        rows, columns = (tall, long) if rows <= columns else (long, tall)
    else:
        by = (min if mode == "center" else max)(columns / wide, rows / tall)
        rows, columns = round(rows / by), round(columns / by)
    kind = config["interpolation"]
    pixels = resize_axis(pixels.swapaxes(0, 1), columns, kind).swapaxes(0, 1)  # along rows first
    pixels = resize_axis(pixels, rows, kind)
    cut = np.ones((height, width, 3)) * (np.rint(np.array(config["mean"]) * 255) if mode == "border" else 0)
    sides = ((rows, height), (columns, width))
    corner = [round((have - want) / 2) if have > want else -((want - have) // 2) for have, want in sides]
    for y, x in np.ndindex(height, width):
        if 0 <= corner[0] + y < rows and 0 <= corner[1] + x < columns:
            cut[y, x] = pixels[corner[0] + y, corner[1] + x]
    return ((cut / 255 - config["mean"]) / config["std"]).transpose(2, 0, 1)


def odd_images(folder: Path) -> list[Path]:
    """Twenty-five images that photographs are not: narrow, tiny, grey, of 16 bits, transparent, of odd sides."""
    rng = np.random.default_rng(0)
    shapes = [(1, 1), (2, 3), (3, 200), (200, 3), (9, 72), (9, 73), (73, 9), (31, 33), (64, 64), (65, 127), (300, 20)]
    files = []
    for i, (height, width) in enumerate(shapes):
        for mode, channels in (("L", 1), ("RGB", 3), ("LA", 2), ("RGBA", 4))[i % 2 :: 2]:
            coarse = rng.integers(0, 256, (max(1, height // 5), max(1, width // 5), channels), np.uint8)
            image = Image.fromarray(coarse.squeeze(2) if channels == 1 else coarse, mode)
            files.append(folder / f"{i}{mode}.png")
            image.resize((width, height), Image.Resampling.BILINEAR).save(files[-1])
    for i, (height, width) in enumerate([(40, 50), (7, 90), (33, 31)]):
        files.append(folder / f"deep{i}.png")
        Image.fromarray(rng.integers(0, 65536, (height, width), np.uint16)).save(files[-1])
    return files


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos", "nearest"])
@pytest.mark.parametrize(
    ("size", "crop_pct", "more"),
    [
        ((32, 32), 0.9, {}),
        ((24, 40), 0.875, {"pixel_range": [100, 40000]}),
        ((31, 31), 1.15, {"crop_mode": "center"}),
        ((24, 31), 0.9, {"crop_mode": "border"}),
        ((24, 31), 0.95, {"crop_mode": "squash"}),
    ],
    ids=str,
)
def test_numpy_makes_the_input_by_the_steps(tmp_path, interpolation, size, crop_pct, more):
    config = {"input_size": [3, *size], "interpolation": interpolation, "crop_pct": crop_pct, **STATS, **more}
    info = json.loads(json.dumps({"data_config": config, "steps": steps("classify", config, {})}))
    files = odd_images(tmp_path)
    assert len(files) == 25
    std = np.array(STATS["std"])[:, None, None]
    for file in files:
        wanted = to_input(read_image(file, config.get("pixel_range")), config)
        apart = abs(make_input(np.asarray(Image.open(file)), info) - wanted) * std * 255
        assert apart.max() < 1e-3, file.name  # the same pixels to the last one


def test_the_steps_say_the_numbers():
    config = {"input_size": [3, 24, 40], "interpolation": "bicubic", "crop_pct": 0.875, **STATS}
    text = "\n".join(steps("classify", config, {}))
    for said in (
        "EXIF",
        "255 / (high - low)",
        "put it on white",
        "8 times",
        "a = -0.5",
        "24x40",
        "halves to even",
        "softmax",
    ):
        assert said in text
    segment = "\n".join(steps("segment", config, {"resize": 48, "window": 33, "flip": True}))
    for said in ("min(48 / shorter side, 384 / longer side)", "windows of 33", "mirrored", "label_ids"):
        assert said in segment
    assert "windows" not in "\n".join(steps("segment", config, {"resize": None}))
    detect = "\n".join(steps("detect", config, {"short_side": 64, "long_side": 96}))
    for said in ("ceil(longer side * 8 / 96)", "min(64 / shorter side, 96 / longer side)", "without area"):
        assert said in detect


@pytest.mark.parametrize("size", [(3000, 10), (10, 3000), (1, 1), (1, 500), (83, 64)])
def test_narrow_images_are_padded_for_a_detector(size):
    seen = []

    def network(images: np.ndarray) -> dict[str, np.ndarray]:
        seen.append(images)
        height, width = images.shape[2:]
        boxes = np.array([[0, 0, width, height], [width, height, width, height], [-9, -9, 0, 0]], np.float32)
        return {"boxes": boxes, "scores": np.ones(3, np.float32), "labels": np.arange(3)}

    info = {"data_config": {"input_size": [3, 64, 64], **STATS}, "task_args": {"short_side": 64, "long_side": 96}}
    found = detections(network, Image.new("RGB", size, "white"), info)
    assert min(seen[0].shape[2:]) >= 8
    assert max(seen[0].shape[2:]) <= 96
    assert found["boxes"].tolist() == [[0, 0, *size]]  # inside the image, and only what has an area
    assert found["labels"].tolist() == [0]


def test_a_broken_image_is_no_matter_of_steps(tmp_path):
    (tmp_path / "x.png").write_bytes(b"junk")
    with pytest.raises(BrokenImage):
        read_image(tmp_path / "x.png")


@pytest.mark.parametrize("size", [(640, 20), (20, 640), (90, 30), (31, 30), (3, 200)])
def test_a_file_segments_images_of_any_shape_at_the_size_of_the_network(size):
    shapes = []

    def network(pixels):
        shapes.append(pixels.shape[1:])
        return {"logits": np.zeros((1, 2, *pixels.shape[2:]), np.float32)}

    config = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3}
    found = class_map(network, Image.new("RGB", size), {"task_args": {"resize": 32}, "data_config": config})
    assert shapes == [EvalTransform(resize=32)(Image.new("RGB", size))[0].shape]
    assert found.shape == size[::-1]
