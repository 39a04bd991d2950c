"""Predictions drawn on their images: label maps with a legend, boxes and masks."""

from __future__ import annotations

import colorsys
import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from ..checkpoints.files import atomic_write, make_folder
from ..text import json_text, printable
from .fonts import image_font

__all__ = [
    "SHOWN_SCORE",
    "OutputFolder",
    "blend",
    "boxes_as_rows",
    "detection_row",
    "draw_detections",
    "image_ids",
    "label_png",
    "largest",
    "legend",
    "palette",
    "run_lengths",
    "segmentation_row",
]

Colours = Sequence[Sequence[int]]
SOFTWARE = "transcnn"  # the Software entry of images that were written here
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


class OutputFolder:
    """Where masks and overlays go: a.png, then a-2.png for another folder's a.jpg.

    No input is written over, and of other images only what an earlier call wrote (their ``Software`` entry says so).

    Args:
        folder: Made when something is written.
        inputs: The files that are predicted. Where one of them lies in ``folder``, an existing predictions.json stays.
        coco: Write detections in COCO's format, too.
        min_score: Detections of a lower score are left out.
    """

    def __init__(
        self, folder: Path, inputs: Sequence[str] = (), *, coco: bool = False, min_score: float | None = None
    ) -> None:
        self.folder = folder
        self.inputs = {os.path.realpath(file) for file in inputs}
        self.replace = os.path.realpath(folder) not in {os.path.dirname(file) for file in self.inputs}
        self.taken: set[str] = set()
        self.coco = coco
        self.min_score = min_score
        self.detections: dict[str, list[dict[str, Any]]] = {}  # of each image, in the order of the images

    def stem_for(self, file: str) -> Path:
        """The path, without ending, for what belongs to ``file``."""
        return self._free(_shortened(Path(file).stem or "image"), (".png", "_overlay.png"))

    def prepare(self) -> None:
        """Make the folder and see that files can be written there, before any work is done.

        Raises:
            UserError: They can't.
        """
        make_folder(self.folder, ".probe")

    def save(self, image: Image.Image, path: str) -> None:
        """Write an image as PNG, whole or not at all."""
        mark = PngInfo()
        mark.add_text("Software", SOFTWARE)
        atomic_write(Path(path), lambda temporary: image.save(temporary, format="PNG", pnginfo=mark))

    def add_coco(self, file: str, found: Mapping[str, np.ndarray], label_ids: Sequence[int]) -> None:
        """Take in an image's detections."""
        rows = self.detections.setdefault(file, [])
        for i, (x1, y1, x2, y2) in enumerate(found["boxes"].astype(float).round(2).tolist()):
            row: dict[str, Any] = {
                "file_name": file,
                "category_id": int(label_ids[int(found["labels"][i])]),
                "score": round(float(found["scores"][i]), 6),
                "bbox": [x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)],
            }
            if "masks" in found:
                row["segmentation"] = run_lengths(found["masks"][i, 0] > 0.5)
            rows.append(row)

    def finish(self) -> None:
        """Write ``predictions.json``, where detections were asked for; without any it is an empty list."""
        if not self.coco:
            return
        ids = image_ids(list(self.detections))
        rows = [{"image_id": ids[file], **row} for file, found in self.detections.items() for row in found]
        text = json_text(rows, indent=1) + "\n"
        path = self._free("predictions", (".json",)).with_suffix(".json")
        atomic_write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    def _free(self, stem: str, endings: Sequence[str]) -> Path:
        """A path without ending that is no input's and no other output's with any of the endings."""
        self.folder.mkdir(parents=True, exist_ok=True)
        names = itertools.chain([stem], (f"{stem}-{i}" for i in itertools.count(2)))
        name = next(name for name in names if self._is_free(name, endings))
        self.taken |= {f"{name}{ending}".casefold() for ending in endings}
        return self.folder / name

    def _is_free(self, name: str, endings: Sequence[str]) -> bool:
        for ending in endings:
            path = self.folder / f"{name}{ending}"
            if path.name.casefold() in self.taken or os.path.realpath(path) in self.inputs:
                return False
            if os.path.lexists(path) and not (_is_ours(path) if ending.endswith(".png") else self.replace):
                return False
        return True


def _is_ours(path: Path) -> bool:
    """Whether an image was written by an earlier call."""
    try:
        with Image.open(path) as image:
            return image.info.get("Software") == SOFTWARE and not path.is_symlink()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False


def _shortened(stem: str) -> str:
    """At most 200 bytes of a name, so that endings and a temporary name still fit."""
    return os.fsencode(stem)[:200].decode("utf-8", "ignore") if len(os.fsencode(stem)) > 200 else stem


def image_ids(files: Sequence[str]) -> dict[str, int | str]:
    """Of each file the id that COCO's results have: its name where that is a number, as COCO's are, else the name.

    Where two files would have the same one, they are numbered from 1.
    """
    stems = [Path(file).stem for file in files]
    numbers = all(stem.isdecimal() and stem.isascii() for stem in stems)
    ids: list[int | str] = [int(stem) for stem in stems] if numbers else list(stems)
    if len(set(ids)) < len(ids):
        ids = list(range(1, len(files) + 1))
    return dict(zip(files, ids, strict=True))


def largest(labels: np.ndarray, names: Sequence[str], top_k: int) -> list[dict[str, Any]]:
    """``[{"label": ..., "share": ...}, ...]``: the classes with most pixels of a label map (H, W)."""
    shares = np.bincount(labels.ravel(), minlength=len(names)) / labels.size
    order = [i for i in np.argsort(-shares, kind="stable").tolist() if shares[i] > 0]
    return [{"label": names[i], "share": round(float(shares[i]), 6)} for i in order[:top_k]]


def segmentation_row(
    image: Image.Image,
    labels: np.ndarray,
    file: str,
    names: Sequence[str],
    args: Mapping[str, Any],
    out: OutputFolder,
    top_k: int,
) -> dict[str, Any]:
    """What ``predict`` returns for a segmented image: shares of classes, and the files ``mask`` and ``overlay``.

    Args:
        image: Itself.
        labels: The class of each pixel (H, W).
        file: Its name.
        names: Of the classes.
        args: ``label_ids`` and ``colours`` of the data (None: our own).
        out: Where they go.
        top_k: Most classes to list.
    """
    colours = args.get("colours") or palette(len(names))
    stem = out.stem_for(file)
    row: dict[str, Any] = {
        "classes": largest(labels, names, top_k),
        "mask": f"{stem}.png",
        "overlay": f"{stem}_overlay.png",
    }
    out.save(label_png(labels, args["label_ids"], colours), row["mask"])
    shown: list[int] = np.unique(labels).tolist()
    blended = blend(image, labels, colours)
    out.save(legend(blended, [names[i] for i in shown], [colours[i] for i in shown]), row["overlay"])
    return row


def boxes_as_rows(found: Mapping[str, np.ndarray], names: Sequence[str]) -> list[dict[str, Any]]:
    """``[{"label", "score", "box": [x1, y1, x2, y2]}, ...]``, most confident first."""
    return [
        {
            "label": names[int(found["labels"][i])],
            "score": round(float(found["scores"][i]), 6),
            "box": [round(float(value), 2) for value in found["boxes"][i]],
        }
        for i in np.argsort(-found["scores"], kind="stable").tolist()
    ]


def detection_row(
    image: Image.Image,
    found: Mapping[str, np.ndarray],
    file: str,
    names: Sequence[str],
    args: Mapping[str, Any],
    out: OutputFolder,
) -> dict[str, Any]:
    """What ``predict`` returns for an image with detections: ``boxes``, most confident first, and the file ``overlay``.

    Args:
        image: Itself.
        found: As :func:`draw_detections` takes it.
        file: Its name.
        names: Of the classes.
        args: ``label_ids`` of the data.
        out: Where they go, and where detections gather in COCO's format.
    """
    if out.min_score is not None:
        found = {name: value[found["scores"] >= out.min_score] for name, value in found.items()}
    row: dict[str, Any] = {"boxes": boxes_as_rows(found, names), "overlay": f"{out.stem_for(file)}_overlay.png"}
    drawn_from = SHOWN_SCORE if out.min_score is None else out.min_score
    out.save(draw_detections(image, found, names, palette(len(names)), drawn_from), row["overlay"])
    out.add_coco(file, found, args.get("label_ids") or list(range(1, len(names) + 1)))
    return row


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """COCO's uncompressed run lengths: of zeros, ones, zeros, ... column by column."""
    flat = mask.flatten(order="F")
    changes = np.flatnonzero(np.diff(flat.astype(np.int8))) + 1
    ends = [0, *changes.tolist(), len(flat)]
    counts = np.diff(ends).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}
