"""Splits of a data set for detection: images with boxes (and masks) from COCO's JSON, Pascal VOC's XML or YOLO's text.

    splits = open_splits("bccd.tar")
    splits.train.read(0)        # image, {"boxes": (N, 4) x1 y1 x2 y2, "labels": (N,), "crowd": (N,), "area": (N,), ...}

Labels are indices into ``class_names``; ``task_args["label_ids"]`` says which of the data's category ids each stands
for. Boxes are cut at the image's edge; those of which nothing is left are dropped, and listed where the annotation says
how large the image is.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from ...errors import UserError
from ..bands import PixelRange
from ..images import BrokenImage, read_oriented
from ..listing import image_names
from ..names import alike_but_for_case, distinct_names
from ..sources.annotations import AnnotatedImage, Annotations, align
from ..sources.coco import find_coco, read_coco
from ..sources.files import Files, open_files
from ..sources.masks import decode_mask
from ..sources.source import abbreviate, check_fraction, first_reasons
from ..sources.voc import is_voc_file, read_voc
from ..sources.yolo import find_yolo, read_yolo
from .channels import measure_channels
from .dense_dataset import DenseDataset, DenseSource
from .splits import Splits, choose_split, hold_back, make_splits

__all__ = ["open_parts", "open_set", "open_splits"]

logger = logging.getLogger(__name__)


def open_splits(
    data: str | None,
    settings: Mapping[str, Any] | None = None,
    *,
    val_fraction: float = 0.1,
    seed: int = 0,
    strict: bool = False,
    in_chans: int | None = None,
) -> Splits:
    """Open a data set for training; a validation split that it lacks is split off.

    Args:
        data: A folder or tar with ``images/`` and ``annotations/{train,val,test}.json`` (COCO; its own layout of
            ``train2017/`` and ``annotations/instances_train2017.json`` too), or with ``JPEGImages/``,
            ``Annotations/*.xml`` and ``ImageSets/Main/*.txt`` (Pascal VOC), or with ``data.yaml`` (YOLO); as they are
            kept, and as Roboflow, CVAT and Label Studio export them.
        settings: ``anchor_size`` None has the smallest anchors follow the boxes.
        val_fraction, seed, strict, in_chans: As for classification.

    Raises:
        UserError: No such data, or none with boxes.
    """
    check_fraction(val_fraction)
    found = _find_scored(data)
    ids = sorted(found.names)
    index = {value: i for i, value in enumerate(ids)}
    make, keep = partial(_make_set, found, index, strict), partial(_hold_back, found, val_fraction, seed)
    sets = make_splits(found.splits, make, keep)
    train, val = sets["train"], sets["val"]
    if train is None or val is None:
        raise UserError(
            f"{data!r} has too few annotated images to learn from and to validate on{first_reasons(found.broken)}"
        )
    items = [item for split in ("train", "") for item in found.splits.get(split, ())]
    if not any(item.boxes for item in items):
        raise UserError(f"{data!r} has no boxes to learn from{first_reasons(found.broken)}")
    channels = measure_channels(sets, in_chans)
    args: dict[str, Any] = {"label_ids": ids}
    if not (settings or {}).get("anchor_size"):
        args["anchor_size"] = _anchor_size(train, settings or {})
    if channels.mean is not None:  # torchvision's detectors normalise themselves
        args |= {"image_mean": channels.mean, "image_std": channels.std}
    names = distinct_names(found.names[value] for value in ids)
    for same in alike_but_for_case(names):
        logger.warning("%s: classes %s differ only in case and are kept apart", data, abbreviate(same))
    return Splits(train, val, sets["test"], names, found.files.name, channels, args)


def open_set(
    data: str | None,
    split: str,
    class_names: Sequence[str],
    *,
    val_fraction: float = 0.1,
    seed: int = 0,
    strict: bool = False,
    held: Collection[str] | None = None,
) -> DenseDataset:
    """Open one split for evaluation; its classes are matched with ``class_names`` by name.

    ``held`` are names of images that a run held back, as for classification.

    Raises:
        UserError: No such data or split, or classes that are not among ``class_names``.
    """
    found = _find_scored(data)
    ids = sorted(found.names)
    names = dict(zip(ids, distinct_names(found.names[value] for value in ids), strict=True))
    known = {name: i for i, name in enumerate(distinct_names(class_names))}
    used = {label for items in found.splits.values() for item in items for label in item.labels}
    unknown = [names[value] for value in sorted(used) if names[value] not in known]
    if unknown:
        raise UserError(
            f"{data!r} has classes that the model does not know: {abbreviate(unknown)}; "
            f"it knows {abbreviate(list(known))}"
        )
    index = {value: known[name] for value, name in names.items() if name in known}
    return choose_split(
        str(data),
        found.splits,
        partial(_make_set, found, index, strict),
        split,
        partial(_hold_back, found, val_fraction, seed, held=held),
    )


def open_parts(data: str | None) -> tuple[dict[str, DenseDataset], list[str], list[list[int]] | None]:
    """Each split as it lies there ("" where there are none), the classes' names, and their colours if they have any."""
    found = _find(data)
    ids = sorted(found.names)
    index = {value: i for i, value in enumerate(ids)}
    parts = {split: _make_set(found, index, False, split, None, replace=False) for split in found.splits}
    return parts, distinct_names(found.names[value] for value in ids), None


def _hold_back(
    found: Annotations, fraction: float, seed: int, split: str, held: Collection[str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    return hold_back([item.file for item in found.splits[split]], fraction, seed, held)


def _make_set(
    found: Annotations, index: dict[int, int], strict: bool, split: str, indices: np.ndarray | None, *, replace: bool
) -> DenseDataset:
    items, broken = found.splits[split], found.broken.get(split, [])
    if strict and broken:
        raise UserError(f"{broken[0][0]!r}: {broken[0][1]}")
    load, entry = partial(_load, found.files, items, index), partial(_entry, found.files, items)
    source = DenseSource([item.file for item in items], load, entry, broken, partial(_raw, found.files, items))
    made = DenseDataset(source, indices, strict=strict, replace=replace)
    made.listed = list(broken)
    return made


def _raw(files: Files, items: list[AnnotatedImage], i: int) -> bytes:
    return files.read(items[i].file)


def _entry(files: Files, items: list[AnnotatedImage], i: int) -> tuple[str, int]:
    item = items[i]
    truth = repr((item.boxes, item.labels, item.crowd, item.masks, item.size))
    return f"{zlib.crc32(truth.encode()):08x}", files.size(item.file)


def _load(
    files: Files,
    items: list[AnnotatedImage],
    index: dict[int, int],
    i: int,
    pixel_range: PixelRange | None = None,
) -> tuple[Image.Image, dict[str, Any]]:
    """An image and what is in it, boxes cut at its edges; masks as functions of nothing to (H, W) of bool."""
    item = items[i]
    image, orientation = read_oriented(files.read(item.file), pixel_range)
    alignment = align(item, image.size, orientation)
    boxes = alignment.boxes(np.array(item.boxes, np.float64).reshape(-1, 4)).astype(np.float32)
    boxes[:, 0::2] = boxes[:, 0::2].clip(0, image.width)
    boxes[:, 1::2] = boxes[:, 1::2].clip(0, image.height)
    sides = boxes[:, 2:] - boxes[:, :2]
    kept = np.flatnonzero((sides > 0.1).all(1))
    areas = np.array(item.areas, dtype=np.float32) * np.float32(alignment.scale[0] * alignment.scale[1])
    return image, {
        "boxes": boxes[kept],
        "labels": np.array([index[label] for label in item.labels], dtype=np.int64)[kept],
        "crowd": np.array(item.crowd, dtype=bool)[kept],
        "area": np.where(areas > 0, areas, sides.prod(1))[kept],
        "masks": [partial(decode_mask, item.masks[k], boxes[k], image.size, alignment) for k in kept],
    }


def _anchor_size(images: DenseDataset, settings: Mapping[str, Any]) -> int:
    """32, or the power of two, from 8 on, that the smallest twentieth of the boxes has as the network sees them."""
    sides = []
    for i in np.linspace(0, len(images) - 1, min(64, len(images))).astype(int).tolist():
        try:
            image, truth = images.read(i)
        except BrokenImage:
            continue
        short, long = min(image.size), max(image.size)
        factor = min(settings.get("short_side", 800) / short, settings.get("long_side", 1333) / long)
        boxes = truth["boxes"]
        sides += (np.sqrt((boxes[:, 2:] - boxes[:, :2]).prod(1)) * factor).tolist()
    small = float(np.quantile(sides, 0.05)) if sides else 32.0
    return int(min(32, max(8, 2 ** np.floor(np.log2(max(small, 1.0))))))


def _find_scored(data: str | None) -> Annotations:
    """As :func:`_find`, without a validation or test split that has no box at all, so that nothing can be scored.

    Images in more than one split are logged.
    """
    found = _find(data)
    boxes = {split: sum(len(item.boxes) for item in items) for split, items in found.splits.items()}
    for split in ("val", "test"):
        if boxes.get(split) == 0 and any(boxes.values()):
            logger.warning("%s: no image of the %s split has a box, so it is left out", data, split)
            del found.splits[split]
    splits: dict[str, set[str]] = {}
    for split, items in found.splits.items():
        for item in items:
            splits.setdefault(item.file, set()).add(split)
    if twice := [file for file, names in splits.items() if len(names) > 1]:
        logger.warning("%s: %d images are in more than one split: %s", data, len(twice), abbreviate(twice))
    return found


def _find(data: str | None) -> Annotations:
    if data is None:
        raise UserError("detection has no data of its own: name a folder or tar of images/ and annotations/")
    files = open_files(data)
    names = files.names()
    found = Annotations(files)
    images = image_names(names)
    annotation_files = find_coco(files, names)
    if annotation_files:
        for name in annotation_files:
            read_coco(found, name, images)
    elif yolo := find_yolo(files, names):
        read_yolo(found, yolo, names)
    elif any(is_voc_file(name) for name in names):
        read_voc(found, names, images)
    if not any(found.splits.values()):
        raise UserError(
            f"no annotated images in {data!r}; expected images/ with annotations/{{train,val,test}}.json (COCO), "
            f"JPEGImages/ with Annotations/*.xml (Pascal VOC), or data.yaml (YOLO){first_reasons(found.broken)}"
        )
    pixels = [box for items in found.splits.values() for item in items if not item.normalized for box in item.boxes]
    if pixels and max(max(box) for box in pixels) <= 1:
        raise UserError(
            f"{data!r}: all boxes lie within the first pixel, as parts of the image's width and height would; boxes of "
            "COCO and Pascal VOC are in pixels"
        )
    return found
