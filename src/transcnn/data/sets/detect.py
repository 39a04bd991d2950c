"""Data for detection: images with boxes (and masks) from COCO's JSON or Pascal VOC's XML.

    splits = open_splits("bccd.tar")
    splits.train.read(0)        # image, {"boxes": (N, 4) x1 y1 x2 y2, "labels": (N,), "crowd": (N,), "area": (N,), ...}

Labels are indices into ``class_names``; ``task_args["label_ids"]`` says which of the data's category ids each stands
for. Boxes are cut at the image's edge; those of which nothing is left are dropped, and listed where the annotation says
how large the image is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from xml.etree import ElementTree

import numpy as np
from PIL import Image, ImageDraw

from ...errors import UserError
from ..images import BrokenImage, is_image_name, read_image
from ..sources.files import Files, open_files
from ..sources.source import SPLITS, abbreviate, check_fraction, first_line, split_of_name
from .dense_dataset import DenseDataset, DenseSource, DenseSplits, choose_split, make_splits
from .fault_tolerant import channels_of

__all__ = ["open_set", "open_splits"]


@dataclass
class Annotated:
    """One image's file and what is to be found in it."""

    file: str
    boxes: list[list[float]] = field(default_factory=list)  # x1, y1, x2, y2
    labels: list[int] = field(default_factory=list)  # the data's ids
    crowd: list[bool] = field(default_factory=list)
    areas: list[float] = field(default_factory=list)  # in pixels, by which scores tell small from large; 0: the box's
    masks: list[Any] = field(default_factory=list)  # COCO's segmentation: polygons or run lengths; None without
    size: tuple[float, float] | None = None  # width and height, where the annotation says them

    def add(self, box: list[float], label: int, crowd: bool = False, mask: Any = None, area: float = 0.0) -> str:
        """One more thing to be found; what is wrong with it, if it can't be used."""
        x1, y1, x2, y2 = box
        if not (np.isfinite(box).all() and x2 > x1 and y2 > y1):
            return f"a box of {x2 - x1:g}x{y2 - y1:g} pixels is left out"
        width, height = self.size or (np.inf, np.inf)
        if x2 <= 0 or y2 <= 0 or x1 >= width or y1 >= height:
            return "a box outside of the image is left out"
        self.boxes.append(box)
        self.areas.append(area)
        self.labels.append(label)
        self.crowd.append(crowd)
        self.masks.append(mask or None)
        return ""


@dataclass
class Found:
    """A data set as it lies there."""

    files: Files
    splits: dict[str, list[Annotated]]
    broken: dict[str, list[tuple[str, str]]]
    names: dict[int, str]


# --- opening --------------------------------------------------------------------------------------------------------


def open_splits(
    data: str | None,
    settings: Mapping[str, Any] | None = None,
    *,
    val_fraction: float = 0.1,
    seed: int = 0,
    strict: bool = False,
    in_chans: int | None = None,
) -> DenseSplits:
    """Open a data set for training; a validation split that it lacks is split off.

    Args:
        data: A folder or tar with ``images/`` and ``annotations/{train,val,test}.json`` (COCO; its own layout of
            ``train2017/`` and ``annotations/instances_train2017.json`` too), or with ``JPEGImages/``,
            ``Annotations/*.xml`` and ``ImageSets/Main/*.txt`` (Pascal VOC).
        settings: ``anchor_size`` None has the smallest anchors follow the boxes.
        val_fraction, seed, strict, in_chans: As for classification.

    Raises:
        UserError: No such data, or none with boxes.
    """
    check_fraction(val_fraction)
    found = _find(data)
    ids = sorted(found.names)
    index = {value: i for i, value in enumerate(ids)}
    sets = make_splits(found.splits, partial(_make_set, found, index, strict), val_fraction, seed)
    train, val = sets["train"], sets["val"]
    if train is None or val is None:
        raise UserError(f"{data!r} has too few annotated images to learn from and to validate on")
    items = [item for split in ("train", "") for item in found.splits.get(split, ())]
    if not any(item.boxes for item in items):
        raise UserError(f"{data!r} has no boxes to learn from")
    channels = channels_of(train, in_chans)
    args: dict[str, Any] = {"label_ids": ids}
    if not (settings or {}).get("anchor_size"):
        args["anchor_size"] = _anchor_size(train, settings or {})
    names = [found.names[value] for value in ids]
    return DenseSplits(train, val, sets["test"], names, found.files.name, channels, args)


def open_set(
    data: str | None,
    split: str,
    class_names: Sequence[str],
    *,
    val_fraction: float = 0.1,
    seed: int = 0,
    strict: bool = False,
) -> DenseDataset:
    """Open one split for evaluation; its classes are matched with ``class_names`` by name.

    Raises:
        UserError: No such data or split, or classes that are not among ``class_names``.
    """
    found = _find(data)
    used = {label for items in found.splits.values() for item in items for label in item.labels}
    unknown = [found.names[value] for value in sorted(used) if found.names[value] not in class_names]
    if unknown:
        raise UserError(
            f"{data!r} has classes that the model does not know: {abbreviate(unknown)}; "
            f"it knows {abbreviate(class_names)}"
        )
    index = {value: list(class_names).index(name) for value, name in found.names.items() if name in class_names}
    return choose_split(data, found.splits, partial(_make_set, found, index, strict), split, val_fraction, seed)


def _make_set(
    found: Found, index: dict[int, int], strict: bool, split: str, indices: np.ndarray | None, *, replace: bool
) -> DenseDataset:
    items, broken = found.splits[split], found.broken.get(split, [])
    if strict and broken:
        raise UserError(f"{broken[0][0]!r}: {broken[0][1]}")
    source = DenseSource([item.file for item in items], partial(_load, found.files, items, index), broken)
    made = DenseDataset(source, indices, strict=strict, replace=replace)
    made.listed = list(broken)
    return made


def _load(files: Files, items: list[Annotated], index: dict[int, int], i: int) -> tuple[Image.Image, dict[str, Any]]:
    """An image and what is in it, boxes cut at its edges; masks as functions of nothing to (H, W) of bool."""
    item = items[i]
    image = read_image(files.read(item.file))
    boxes = np.array(item.boxes, dtype=np.float32).reshape(-1, 4)
    boxes[:, 0::2] = boxes[:, 0::2].clip(0, image.width)
    boxes[:, 1::2] = boxes[:, 1::2].clip(0, image.height)
    sides = boxes[:, 2:] - boxes[:, :2]
    kept = np.flatnonzero((sides > 0.1).all(1))
    areas = np.array(item.areas, dtype=np.float32)
    return image, {
        "boxes": boxes[kept],
        "labels": np.array([index[label] for label in item.labels], dtype=np.int64)[kept],
        "crowd": np.array(item.crowd, dtype=bool)[kept],
        "area": np.where(areas > 0, areas, sides.prod(1))[kept],
        "masks": [partial(_mask, item.masks[k], boxes[k], image.size) for k in kept],
    }


def _mask(segmentation: Any, box: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W) of bool; where there is no outline, the box."""
    if isinstance(segmentation, dict):
        return _decode_lengths(segmentation, size)
    canvas = Image.new("1", size)
    draw = ImageDraw.Draw(canvas)
    try:
        for outline in segmentation or ():
            if len(outline) >= 6:
                draw.polygon([float(value) for value in outline], fill=1)
    except (TypeError, ValueError, OverflowError) as error:
        raise BrokenImage(f"an outline is no list of numbers: {first_line(error)}") from error
    if not segmentation:
        draw.rectangle([float(box[0]), float(box[1]), float(box[2]) - 1, float(box[3]) - 1], fill=1)
    return np.asarray(canvas, dtype=bool)


def _decode_lengths(segmentation: dict[str, Any], size: tuple[int, int]) -> np.ndarray:
    """COCO's run lengths, as numbers or packed, to (H, W) of bool; the size is looked at before memory is taken."""
    from faster_coco_eval.core import mask as coco

    width, height = size
    try:
        shape, counts = segmentation["size"], segmentation["counts"]
        if shape != [height, width]:
            raise ValueError(f"it is for {shape} pixels, not {[height, width]}")
        if isinstance(counts, list) and (sum(counts) != width * height or min(counts, default=0) < 0):
            raise ValueError("its lengths don't fill the image")
        packed: Any = coco.frPyObjects(segmentation, height, width) if isinstance(counts, list) else segmentation
        return np.asarray(coco.decode(packed), dtype=bool)
    except Exception as error:  # the library's decoder is C++ with errors of many kinds
        raise BrokenImage(f"a mask can't be read: {first_line(error)}") from error


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


# --- what lies there ------------------------------------------------------------------------------------------------


def _find(data: str | None) -> Found:
    if data is None:
        raise UserError("detection has no data of its own: name a folder or tar of images/ and annotations/")
    files = open_files(data)
    names = files.names()
    found = Found(files, {}, {}, {})
    images = [name for name in names if is_image_name(name.rpartition("/")[2])]
    annotation_files = [name for name in names if name.endswith(".json") and "annotations" in name.lower().split("/")]
    annotation_files = [
        name for name in annotation_files if not name.rpartition("/")[2].startswith(("captions", "person_keypoints"))
    ]
    if annotation_files:
        for name in annotation_files:
            _read_coco(found, name, images)
    elif any(name.endswith(".xml") for name in names):
        _read_voc(found, names, images)
    if not any(found.splits.values()):
        raise UserError(
            f"no annotated images in {data!r}; expected images/ with annotations/{{train,val,test}}.json (COCO), or "
            "JPEGImages/ with Annotations/*.xml (Pascal VOC)"
        )
    return found


class _ByName:
    """Finds an image by the name that an annotation has for it."""

    def __init__(self, images: Sequence[str], hints: Sequence[str] = ()) -> None:
        self.all = set(images)
        self.hints = hints
        self.by_base: dict[str, list[str]] = {}
        for image in images:
            self.by_base.setdefault(image.rpartition("/")[2], []).append(image)

    def __call__(self, name: str) -> str | None:
        name = os.path.normpath(name).replace(os.sep, "/")
        for folder in ("images", *self.hints, ""):
            if (path := f"{folder}/{name}".lstrip("/")) in self.all:
                return path
        same = self.by_base.get(name.rpartition("/")[2], [])
        return same[0] if len(same) == 1 else None


def _read_coco(found: Found, name: str, images: Sequence[str]) -> None:
    try:
        sheet = json.loads(found.files.read(name))
        categories = {int(c["id"]): str(c["name"]) for c in sheet["categories"]}
        file_names = {entry["id"]: str(entry["file_name"]) for entry in sheet["images"]}
        sizes = {entry["id"]: (entry.get("width"), entry.get("height")) for entry in sheet["images"]}
        annotations = sheet.get("annotations", [])
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{name} is no COCO annotation file: {first_line(error)}") from error
    for value, label in categories.items():
        if found.names.setdefault(value, label) != label:
            raise UserError(f"{name} calls category {value} {label!r}, another file {found.names[value]!r}")
    stem = name.rpartition("/")[2].removesuffix(".json")
    split = split_of_name(stem)
    broken = found.broken.setdefault(split, [])
    find = _ByName(images, (f"images/{stem}", stem.rpartition("_")[2], f"images/{stem.rpartition('_')[2]}", split))
    items: dict[Any, Annotated] = {}
    for key, file in file_names.items():
        where = find(file)
        if where is None:
            broken.append((file, "an annotation names it, but there is no such image"))
        else:
            items[key] = Annotated(where, size=_size(*sizes[key]))
    for entry in annotations if isinstance(annotations, list) else ():
        _add_coco(entry, items, file_names, categories, broken)
    found.splits.setdefault(split, []).extend(items.values())


def _add_coco(
    entry: Any,
    items: dict[Any, Annotated],
    file_names: dict[Any, str],
    categories: dict[int, str],
    broken: list[tuple[str, str]],
) -> None:
    """Take in one annotation, or list what is wrong with it."""
    try:
        image, label = entry["image_id"], int(entry["category_id"])
        x, y, w, h = (float(value) for value in entry["bbox"])
        area = float(entry.get("area") or 0)
        item = items.get(image)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        broken.append(
            (f"annotation {entry.get('id', '?')}" if isinstance(entry, dict) else "annotation", first_line(error))
        )
        return
    if item is None:
        if image not in file_names:
            broken.append((f"annotation {entry.get('id', '?')}", f"it is about an unknown image {image}"))
    elif label not in categories:
        broken.append((item.file, f"a box of the unknown category {label} is left out"))
    else:
        crowd, mask = bool(entry.get("iscrowd", 0)), entry.get("segmentation")
        if wrong := item.add([x, y, x + w, y + h], label, crowd, mask, area):
            broken.append((item.file, wrong))


def _size(width: Any, height: Any) -> tuple[float, float] | None:
    """An image's size as an annotation has it, if it has it."""
    try:
        return (float(width), float(height)) if float(width) > 0 and float(height) > 0 else None
    except (TypeError, ValueError):
        return None


def _read_voc(found: Found, names: Sequence[str], images: Sequence[str]) -> None:
    """Pascal VOC: a file for each image, boxes from 1 on with both ends inside; splits from lists or folders."""
    stems = {os.path.splitext(image.rpartition("/")[2])[0]: image for image in images}
    lists: dict[str, str] = {}
    for name in names:
        words = name.split("/")
        if words[-1] in ("train.txt", "val.txt", "test.txt") and "Main" in words:
            text = found.files.read(name).decode("utf-8", "replace")
            lists |= {row.split()[0]: words[-1][:-4] for row in text.splitlines() if row.strip()}
    labels: dict[str, int] = {}
    for name in names:
        if not name.endswith(".xml"):
            continue
        stem = os.path.splitext(name.rpartition("/")[2])[0]
        folder = next((p for p, words in SPLITS.items() if any(w.lower() in words for w in name.split("/")[:-1])), "")
        split = lists.get(stem, "train") if lists else folder
        if lists and stem not in lists:
            continue
        broken = found.broken.setdefault(split, [])
        if stem not in stems:
            broken.append((name, "an annotation without an image"))
            continue
        try:
            root = ElementTree.fromstring(found.files.read(name))
            item = _voc_item(root, stems[stem], labels, broken)
        except (ElementTree.ParseError, BrokenImage, ValueError, AttributeError, TypeError) as error:
            broken.append((name, f"no annotation of Pascal VOC: {first_line(error)}"))
            continue
        found.splits.setdefault(split, []).append(item)
    order = sorted(labels)  # by name, so that the order of files doesn't matter
    renumber = {labels[label]: i for i, label in enumerate(order)}
    for items in found.splits.values():
        for item in items:
            item.labels = [renumber[label] for label in item.labels]
    found.names = dict(enumerate(order))


def _voc_item(root: Any, file: str, labels: dict[str, int], broken: list[tuple[str, str]]) -> Annotated:
    item = Annotated(file, size=_size(root.findtext("size/width"), root.findtext("size/height")))
    for thing in root.iter("object"):
        name = thing.findtext("name").strip()
        x1, y1, x2, y2 = (float(thing.find("bndbox").findtext(tag)) for tag in ("xmin", "ymin", "xmax", "ymax"))
        difficult = thing.findtext("difficult", "0").strip() == "1"  # neither learnt nor scored, as a crowd
        label = labels.setdefault(name, len(labels))
        both = x2 > x1 and y2 > y1  # else nobody meant a box of one pixel
        if wrong := item.add([x1 - both, y1 - both, x2, y2], label, difficult):
            broken.append((file, wrong))
    return item
