"""COCO's annotation files, in the variants that tools write."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...errors import UserError
from ..images import BrokenImage
from .annotations import AnnotatedImage, Annotations, ImageFinder
from .files import Files
from .masks import check_segmentation
from .source import abbreviate, first_line, split_of_name

__all__ = ["find_coco", "is_coco_file", "read_coco"]

logger = logging.getLogger(__name__)

MIN_BOXES, BEYOND = 10, 0.2  # boxes, and the share of them that reach beyond their images, from which on it is odd


def is_coco_file(name: str) -> bool:
    """Whether a file may hold annotations of boxes: a JSON file with ``annotations`` in its path.

    COCO's files of captions, keypoints and segments lie beside those of the same images' boxes.
    """
    folder, _, base = name.lower().rpartition("/")
    if not base.endswith(".json") or base.startswith(("captions", "person_keypoints", "panoptic")):
        return False
    return "annotations" in folder.split("/") or "_annotations" in base or base == "annotations.json"


def find_coco(files: Files, names: Sequence[str]) -> list[str]:
    """The annotation files by their names; else ``result.json``, as Label Studio calls its one."""
    found = [name for name in names if is_coco_file(name)]
    things = [name for name in found if not name.rpartition("/")[2].lower().startswith("stuff")]
    if found:
        return things or found
    others = [name for name in names if name.lower() in ("result.json", "result_coco.json")]
    return [name for name in others if _holds_categories(files, name)]


def _holds_categories(files: Files, name: str) -> bool:
    try:
        return b'"categories"' in files.read(name)
    except BrokenImage:
        return False


@dataclass
class _Sheet:
    """One annotation file on its way into ``Annotations``."""

    name: str
    categories: dict[int, str]
    files: dict[str, str]  # by image id
    broken: list[tuple[str, str]]
    known: dict[str, AnnotatedImage]  # by path, the images of other files of the split
    items: dict[str, AnnotatedImage] = field(default_factory=dict)  # by image id
    repeated: set[str] = field(default_factory=set)  # ids of images that other ids, or files, stand for as well


def read_coco(found: Annotations, name: str, images: Sequence[str]) -> None:
    """Add what one annotation file lists.

    Raises:
        UserError: It is no COCO file, contradicts another one, or uses an image id twice.
    """
    try:
        content = json.loads(found.files.read(name))
        categories = {int(entry["id"]): str(entry["name"]) for entry in content["categories"]}
        listed = [
            (_key(e["id"]), str(e["file_name"]), _size(e.get("width"), e.get("height"))) for e in content["images"]
        ]
        annotations = content.get("annotations")
        if annotations is None:  # images to be predicted, such as COCO's image_info_test2017.json
            logger.warning("%s has no annotations: its images are left out", name)
            return
        for value in _groups(content["categories"], annotations):
            del categories[value]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, MemoryError) as error:
        raise UserError(f"{name} is no COCO annotation file: {first_line(error)}") from error
    for value, label in categories.items():
        if found.names.setdefault(value, label) != label:
            raise UserError(f"{name} calls category {value} {label!r}, another file {found.names[value]!r}")
    folder, _, base = name.rpartition("/")
    stem = base.rpartition(".")[0]
    split = split_of_name(stem, split_of_name(folder.rpartition("/")[2]))
    hints = (f"images/{stem}", stem.rpartition("_")[2], f"images/{stem.rpartition('_')[2]}", split, folder)
    known = {item.file: item for item in found.splits.get(split, ())}
    sheet = _Sheet(name, categories, {}, found.broken.setdefault(split, []), known)
    items = _add_images(sheet, listed, ImageFinder(images, hints))
    for entry in annotations if isinstance(annotations, list) else ():
        _add_object(sheet, entry)
    touched = {item.file: item for item in sheet.items.values()}.values()
    if _hold_corners(touched):
        logger.warning(
            "%s: many boxes reach beyond their images, and none would if bbox were x1, y1, x2, y2; it is read as x, y, "
            "width, height, which COCO's is",
            name,
        )
    for item in touched:
        sheet.broken += [(item.file, "a box outside of the image is left out")] * item.drop_outside()
    found.splits.setdefault(split, []).extend(items)


def _hold_corners(items: Iterable[AnnotatedImage]) -> bool:
    """Whether boxes that were read as x, y, width, height are corners x1, y1, x2, y2 by all appearances."""
    count = beyond = 0
    for item in items:
        if item.size is None:
            continue
        for x, y, right, bottom in item.boxes:
            if not (x < right - x <= item.size[0] + 1 and y < bottom - y <= item.size[1] + 1):
                return False
            count += 1
            beyond += right > item.size[0] + 2 or bottom > item.size[1] + 2
    return count >= MIN_BOXES and beyond > BEYOND * count


def _groups(categories: list[Any], annotations: Any) -> set[int]:
    """Categories that are no class, such as Roboflow writes: the supercategory of all others, without a box."""
    above = {str(entry.get("supercategory")) for entry in categories}
    if len(above - {"none", "None", ""}) != 1 or len(categories) < 2:
        return set()
    used = {str(entry.get("category_id")) for entry in annotations if isinstance(entry, dict)}
    return {
        int(entry["id"])
        for entry in categories
        if str(entry["name"]) in above and entry.get("supercategory") in ("none", None) and str(entry["id"]) not in used
    }


def _add_images(
    sheet: _Sheet, listed: list[tuple[str, str, tuple[float, float] | None]], find: ImageFinder
) -> list[AnnotatedImage]:
    """The images that a file lists, each once, without those that another file of the split has listed."""
    by_path: dict[str, tuple[str, AnnotatedImage]] = {}
    for key, file, size in listed:
        if sheet.files.setdefault(key, file) != file:
            raise UserError(f"{sheet.name} has two images of the id {key}: {abbreviate([sheet.files[key], file])}")
        path = find(file)
        if path is None:
            sheet.broken.append((file, "an annotation names it, but there is no such image"))
        elif path in sheet.known:
            if sheet.known[path].size != size:
                sheet.broken.append((file, f"{sheet.name} gives it another size than another annotation file"))
                continue
            sheet.items[key] = sheet.known[path]
            sheet.repeated.add(key)
        elif path in by_path:
            first, sheet.items[key] = by_path[path]
            if first != key:
                sheet.repeated |= {first, key}
                sheet.broken.append((file, f"it is listed as image {first} and {key}: their boxes are put together"))
        else:
            sheet.items[key] = AnnotatedImage(path, size=size)
            by_path[path] = key, sheet.items[key]
    return [item for _, item in by_path.values()]


def _add_object(sheet: _Sheet, entry: Any) -> None:
    """Add one annotation, or list what is wrong with it."""
    title = f"annotation {entry.get('id', '?')}" if isinstance(entry, dict) else "annotation"
    try:
        image, label = _key(entry["image_id"]), int(entry["category_id"])
        x, y, w, h = (float(value) for value in entry["bbox"])
        area = float(entry.get("area") or 0)
        crowd = _flag(entry.get("iscrowd"))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        sheet.broken.append((title, first_line(error)))
        return
    item = sheet.items.get(image)
    if item is None:
        if image not in sheet.files:
            sheet.broken.append((title, f"it is about an unknown image {image}"))
        return
    if label not in sheet.categories:
        sheet.broken.append((item.file, f"a box of the unknown category {label} is left out"))
        return
    box = [x, y, x + w, y + h]
    if image in sheet.repeated and (box, label) in zip(item.boxes, item.labels, strict=True):
        return  # the same object of an image that is listed twice
    mask, problem = check_segmentation(entry.get("segmentation"))
    if problem:
        sheet.broken.append((item.file, problem))
    if problem := item.add(box, label, crowd, mask, area):
        sheet.broken.append((item.file, problem))


def _key(value: Any) -> str:
    """An image's id, equal for 7, 7.0 and "7"."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int):
        raise TypeError(f"an image id is {str(value)[:40]!r}")
    return str(value)


def _flag(value: Any) -> bool:
    """``iscrowd`` as 0, 1, "0", "1", true, false, or nothing."""
    if isinstance(value, str):
        value = {"": 0, "0": 0, "false": 0, "1": 1, "true": 1}.get(value.strip().lower(), value)
    if value is None or value in (0, 1):
        return bool(value)
    raise ValueError(f"iscrowd must be 0 or 1, got {str(value)[:40]!r}")


def _size(width: Any, height: Any) -> tuple[float, float] | None:
    """An image's size as an annotation has it, if it has it."""
    try:
        return (float(width), float(height)) if float(width) > 0 and float(height) > 0 else None
    except (TypeError, ValueError, OverflowError):
        return None
