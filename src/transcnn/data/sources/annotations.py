"""Images with boxes, and masks if there are any, as annotation files (:mod:`.coco`, :mod:`.voc`) list them.

An annotation says for how large an image its boxes are. Where the decoded image has another size the boxes are scaled,
or turned as the EXIF orientation says, if that explains the difference; else the image can't be used.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import numpy as np

from ..images import BrokenImage
from .files import Files

__all__ = ["Alignment", "AnnotatedImage", "Annotations", "ImageFinder", "align"]

FARTHEST = 1e9  # pixels, beyond which no side of a box can be meant


@dataclass
class AnnotatedImage:
    """One image's file and the objects in it."""

    file: str
    boxes: list[list[float]] = field(default_factory=list)  # x1, y1, x2, y2
    labels: list[int] = field(default_factory=list)  # category ids of the data
    crowd: list[bool] = field(default_factory=list)
    areas: list[float] = field(default_factory=list)  # in pixels, for COCO's small, medium and large; 0: the box's
    masks: list[Any] = field(default_factory=list)  # COCO's segmentation: polygons or run lengths; None without
    size: tuple[float, float] | None = None  # width and height, where the annotation says them
    normalized: bool = False  # boxes and masks are parts of the image's width and height, not pixels

    def add(self, box: list[float], label: int, crowd: bool = False, mask: Any = None, area: float = 0.0) -> str:
        """Add an object; returns what is wrong with it, if it can't be used."""
        x1, y1, x2, y2 = box
        if not (np.abs(box).max() < FARTHEST and x2 > x1 and y2 > y1):  # nor NaN
            unit = "of the image" if self.normalized else "pixels"
            return f"a box of {x2 - x1:g}x{y2 - y1:g} {unit} is left out"
        if x2 <= 0 or y2 <= 0:
            return "a box outside of the image is left out"
        self.boxes.append(box)
        self.areas.append(area)
        self.labels.append(label)
        self.crowd.append(crowd)
        self.masks.append(mask)
        return ""

    def drop_outside(self) -> int:
        """Drop the boxes outside of the image, as far as its size is known; returns how many there were."""
        if self.size is None:
            return 0
        width, height = self.size
        if _overflow(self.boxes, (height, width)) < _overflow(self.boxes, (width, height)):
            return 0  # the sizes are swapped, see ``align``
        kept = [i for i, box in enumerate(self.boxes) if box[0] < width and box[1] < height]
        dropped = len(self.boxes) - len(kept)
        if dropped:
            columns: Any = (self.boxes, self.labels, self.crowd, self.areas, self.masks)
            for values in columns:
                values[:] = [values[i] for i in kept]
        return dropped


@dataclass
class Annotations:
    """A data set's annotations, by split; ``names`` are those of the categories, by id."""

    files: Files
    splits: dict[str, list[AnnotatedImage]] = field(default_factory=dict)
    broken: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)


class ImageFinder:
    """Finds an image by the name that an annotation has for it, with Windows' backslashes or URL escapes, too."""

    def __init__(self, images: Sequence[str], folders: Sequence[str] = ()) -> None:
        self.all = set(images)
        self.folders = folders
        self.by_base: dict[str, list[str]] = {}
        for image in images:
            self.by_base.setdefault(image.rpartition("/")[2], []).append(image)

    def __call__(self, name: str) -> str | None:
        """The image's path within the data; None where there is none, or more than one."""
        spellings = dict.fromkeys((name, name.replace("\\", "/"), unquote(name), unquote(name).replace("\\", "/")))
        for spelling in spellings:
            path = os.path.normpath(spelling).replace(os.sep, "/")
            for folder in ("images", *self.folders, ""):
                if (candidate := f"{folder}/{path}".lstrip("/")) in self.all:
                    return candidate
        for spelling in spellings:
            same = self.by_base.get(spelling.rpartition("/")[2], [])
            if len(same) == 1:
                return same[0]
        return None


@dataclass(frozen=True)
class Alignment:
    """From an annotation's pixels to those of the decoded image: a rotation by EXIF orientation, then a scale.

    Attributes:
        size: Width and height that the annotation is for, as it is (not rotated).
        orientation: EXIF's, 5 to 8 where the annotation is for the stored pixels of a rotated image, else 1.
        scale: Factors of x and y after the rotation.
    """

    size: tuple[float, float]
    orientation: int = 1
    scale: tuple[float, float] = (1.0, 1.0)

    def points(self, points: np.ndarray) -> np.ndarray:
        """(N, 2) of x, y in the annotation's pixels -> the same in the image's."""
        width, height = self.size
        x, y = points[:, 0], points[:, 1]
        rotated = {5: (y, x), 6: (height - y, x), 7: (height - y, width - x), 8: (y, width - x)}
        return np.stack(rotated.get(self.orientation, (x, y)), 1) * np.array(self.scale)

    def boxes(self, boxes: np.ndarray) -> np.ndarray:
        """(N, 4) of x1, y1, x2, y2 -> the same in the image's pixels."""
        first, last = self.points(boxes[:, :2]), self.points(boxes[:, 2:])
        return np.concatenate([np.minimum(first, last), np.maximum(first, last)], 1)

    def mask(self, mask: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
        """(h, w) of bool in the annotation's pixels -> (H, W) of the image's."""
        turns = {5: lambda m: m.T, 6: lambda m: np.rot90(m, -1), 7: lambda m: np.rot90(m, 2).T, 8: np.rot90}
        mask = turns.get(self.orientation, lambda m: m)(mask)
        rows, columns = (
            np.minimum((np.arange(new) + 0.5) * old / new, old - 1).astype(np.int64)
            for new, old in zip(image_size[::-1], mask.shape, strict=True)
        )
        return mask[rows[:, None], columns]


def align(item: AnnotatedImage, image_size: tuple[int, int], orientation: int) -> Alignment:
    """How an annotation's pixels become those of the decoded image.

    Args:
        item: The annotation.
        image_size: Width and height of the decoded image, upright.
        orientation: The EXIF orientation that it was made upright by, 1 to 8.

    Raises:
        BrokenImage: The annotation is for an image of another size, which neither scale nor orientation explains.
    """
    if item.normalized:
        return Alignment((1.0, 1.0), scale=(float(image_size[0]), float(image_size[1])))
    if item.size is None or item.size == image_size:
        return Alignment(item.size or image_size)
    (w, h), (width, height) = item.size, image_size
    if _same_ratio((w, h), (width, height)):
        return Alignment(item.size, scale=(width / w, height / h))
    if _same_ratio((h, w), (width, height)):
        stored, upright = _overflow(item.boxes, (w, h)), _overflow(item.boxes, (h, w))
        if orientation >= 5 and stored <= upright:
            return Alignment(item.size, orientation, (width / h, height / w))
        if upright <= min(stored, 2.0 * len(item.boxes)):  # a tool that swaps the sizes, but not the boxes
            return Alignment(item.size, scale=(width / h, height / w))
    raise BrokenImage(f"its annotation is for an image of {w:g}x{h:g} pixels, it has {width}x{height}")


def _same_ratio(size: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether one is the other scaled, with sides rounded to pixels."""
    return abs(size[0] * other[1] - size[1] * other[0]) <= max(*size, *other)


def _overflow(boxes: Sequence[Sequence[float]], size: tuple[float, float]) -> float:
    """By how many pixels boxes reach beyond an image of this width and height, in all."""
    return sum(max(0.0, box[2] - size[0]) + max(0.0, box[3] - size[1]) for box in boxes)
