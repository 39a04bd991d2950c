"""COCO's outlines (polygons and run lengths) as masks, rasterised as COCO does it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ...errors import require
from ..images import BrokenImage
from .annotations import Alignment
from .source import first_line

__all__ = ["check_segmentation", "decode_mask"]


def check_segmentation(segmentation: Any) -> tuple[Any, str]:
    """What of an annotation's ``segmentation`` can be drawn (None: nothing), and what is wrong with the rest.

    Polygons are lists of 6 or more numbers x1, y1, x2, y2, ...; run lengths keep whole numbers alone.
    """
    if segmentation is None or segmentation == []:
        return None, ""
    if isinstance(segmentation, dict):
        try:
            return _check_lengths(segmentation), ""
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            return None, f"run lengths that can't be read ({first_line(error)}): the box is taken instead"
    if not isinstance(segmentation, list):
        return None, f"an outline that is a {type(segmentation).__name__}, not a list: the box is taken instead"
    good = [polygon for polygon in segmentation if _is_polygon(polygon)]
    if len(good) == len(segmentation):
        return good, ""
    rest = "the box is taken instead" if not good else "the others are taken"
    return good or None, f"an outline that is no list of 6 or more numbers: {rest}"


def _is_polygon(polygon: Any) -> bool:
    return (
        isinstance(polygon, list)
        and len(polygon) >= 6
        and len(polygon) % 2 == 0
        and all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in polygon)
    )


def _check_lengths(segmentation: dict[str, Any]) -> dict[str, Any]:
    height, width = (_whole(value) for value in segmentation["size"])
    counts = segmentation["counts"]
    if isinstance(counts, list):
        counts = [_whole(value) for value in counts]
        if sum(counts) != width * height:
            raise ValueError("its lengths don't fill the image")
    elif not isinstance(counts, str | bytes):
        raise TypeError(f"counts are a {type(counts).__name__}")
    return {"size": [height, width], "counts": counts}


def _whole(value: Any) -> int:
    """A count; JSON writers make floats of some."""
    number = int(value)
    if isinstance(value, str | bool) or number != value or not 0 <= number < 1 << 31:
        raise ValueError(f"expected a whole number from 0, got {str(value)[:40]!r}")
    return number


def decode_mask(segmentation: Any, box: np.ndarray, image_size: tuple[int, int], alignment: Alignment) -> np.ndarray:
    """A checked outline as (H, W) of bool; the box where there is none, or where it covers no pixel.

    Args:
        segmentation: From :func:`check_segmentation`.
        box: x1, y1, x2, y2 in the image's pixels.
        image_size: Width and height of the decoded image.
        alignment: From the annotation's pixels to the image's.

    Raises:
        BrokenImage: Run lengths that are damaged, or for another size than the annotation's.
    """
    width, height = image_size
    mask = np.zeros((height, width), bool)
    if isinstance(segmentation, dict):
        mask = _decode_lengths(segmentation, image_size, alignment)
    elif segmentation:
        points = [alignment.points(np.array(polygon, np.float64).reshape(-1, 2)) for polygon in segmentation]
        mask = _rasterise(points, height, width)
    x1, y1, x2, y2 = (float(value) for value in box)
    if not mask.any():
        mask = _rasterise([np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]])], height, width)
    if not mask.any():  # a box of less than a pixel
        mask[min(int((y1 + y2) / 2), height - 1), min(int((x1 + x2) / 2), width - 1)] = True
    return mask


def _rasterise(polygons: list[np.ndarray], height: int, width: int) -> np.ndarray:
    """The union of polygons, each (N, 2) of x, y, by COCO's own rasteriser."""
    coco: Any = require("faster_coco_eval.core.mask", "dense")
    # Its memory grows with a polygon's perimeter, so corners far outside of the image are moved nearer.
    limit = np.array([width, height])
    flat = [polygon.clip(-limit, 2 * limit).ravel().tolist() for polygon in polygons]
    return np.asarray(coco.decode(coco.merge(coco.frPyObjects(flat, height, width))), dtype=bool)


def _decode_lengths(segmentation: dict[str, Any], image_size: tuple[int, int], alignment: Alignment) -> np.ndarray:
    """Run lengths, as numbers or packed; their size is looked at before memory is taken."""
    coco: Any = require("faster_coco_eval.core.mask", "dense")
    height, width = segmentation["size"]
    if (width, height) != tuple(alignment.size):
        expected = f"{alignment.size[0]:g}x{alignment.size[1]:g}"
        raise BrokenImage(f"a mask can't be read: it is for {width}x{height} pixels, not {expected}")
    packed = segmentation
    try:
        if isinstance(segmentation["counts"], list):
            packed = coco.frPyObjects(segmentation, height, width)
        return alignment.mask(np.asarray(coco.decode(packed), dtype=bool), image_size)
    except Exception as error:  # the library's decoder is C++ with errors of many kinds
        raise BrokenImage(f"a mask can't be read: {first_line(error)}") from error
