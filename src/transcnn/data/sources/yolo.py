"""YOLO's folders: a text file of normalised boxes or polygons for each image, and a YAML file that says where they are.

    data.yaml            names: [cell, platelet]   train: images/train   val: [images/a, images/b]   test: test.txt
    images/train/1.jpg
    labels/train/1.txt   0 0.5 0.5 0.25 0.1        class, centre x and y, width, height
                         1 0.1 0.1 0.2 0.1 0.2 0.3 class, then a polygon's x and y

Exports of CVAT (``obj.names``, ``obj.data``) and Label Studio (``classes.txt``) say the same in other files.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

import yaml

from ...errors import UserError
from ...plain import MAX_CHARACTERS, load_plain
from ..images import BrokenImage
from ..listing import image_names
from .annotations import AnnotatedImage, Annotations
from .files import Files
from .source import SPLITS, abbreviate, first_line, names_of_lines, split_of_name

__all__ = ["find_yolo", "read_yolo"]

MAX_LABEL_BYTES = 1 << 24  # of one image's text, or of a list of images
MAX_LINE = 1 << 18  # characters: a polygon of ten thousand corners
MAX_NAMES = 10_000
LISTS = ("classes.txt", "obj.names", "_darknet.labels")  # files of names, one a line
KEYS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}


def find_yolo(files: Files, names: Sequence[str]) -> str | None:
    """The file that names the classes of a YOLO folder; None where it is something else."""
    for name in sorted(names, key=lambda name: (name.count("/"), name)):
        base = name.rpartition("/")[2].lower()
        if base.endswith((".yaml", ".yml")) and name.count("/") <= 1 and 0 <= files.size(name) <= MAX_CHARACTERS:
            content = _read_yaml(files, name)
            if isinstance(content, dict) and ("names" in content or "nc" in content) and {"train", "val"} & {*content}:
                return name
    texts = {name for name in names if name.lower().endswith(".txt")}
    for name in sorted(names, key=lambda name: (name.count("/"), name)):
        if name.rpartition("/")[2].lower() in LISTS and name.count("/") <= 1:
            others = texts - {name}
            labelled = any(_label_name(image, others) for image in image_names(names))
            return name if labelled else None
    return None


def read_yolo(found: Annotations, source: str, names: Sequence[str]) -> None:
    """Add all images of a YOLO folder, those without a text file as images without objects.

    Args:
        found: Where to.
        source: The file that names the classes, from :func:`find_yolo`.
        names: All files.

    Raises:
        UserError: The file of names can't be understood.
    """
    images = image_names(names)
    texts = {name for name in names if name.lower().endswith(".txt")} - {source}
    if source.lower().endswith((".yaml", ".yml")):
        content = _read_yaml(found.files, source)
        found.names = _class_names(content, source)
        keypoints = "kpt_shape" in content  # their coordinates follow the box, and are no polygon
        folder = source.rpartition("/")[0]
        splits = {
            split: _images_of(found, content.get(key), folder, images, texts, split)
            for split, keys in KEYS.items()
            for key in keys
            if content.get(key)
        }
    else:
        found.names, keypoints = dict(enumerate(names_of_lines(_text(found.files, source), source))), False
        splits = _splits_of_lists(found, images, texts)
    if len(found.names) > MAX_NAMES:
        raise UserError(f"{source} names {len(found.names):,} classes; at most {MAX_NAMES:,} can be detected")
    for split, members in splits.items():
        broken = found.broken.setdefault(split, [])
        items = [_read_item(found, image, texts, broken, keypoints) for image in members]
        found.splits.setdefault(split, []).extend(items)


def _read_yaml(files: Files, name: str) -> Any:
    try:
        text = files.read(name).decode("utf-8-sig")
        content = load_plain(text)
        if isinstance(content, dict) and content.get("names") is not None:
            content["names"] = yaml.load(text, yaml.BaseLoader)["names"]  # as written: no, 007 and 1.50 are names, too
        return content
    except (yaml.YAMLError, UnicodeError, BrokenImage, UserError):
        return None


def _class_names(content: dict[Any, Any], source: str) -> dict[int, str]:
    """Names by class, given as a list, as a map, or by their number alone."""
    given = content.get("names")
    if isinstance(given, list):
        return {i: str(name) for i, name in enumerate(given)}
    if isinstance(given, dict):
        try:
            return {int(key): str(name) for key, name in given.items()}
        except (TypeError, ValueError) as error:
            raise UserError(f"{source}: names must be a list, or a map of numbers to names") from error
    count = content.get("nc")
    if given is None and isinstance(count, int) and 0 < count <= MAX_NAMES:
        return {i: str(i) for i in range(count)}
    raise UserError(f"{source}: names must be a list, or a map of numbers to names")


def _images_of(
    found: Annotations, given: Any, folder: str, images: Sequence[str], texts: set[str], split: str
) -> list[str]:
    """The images that a split's entries stand for: folders, lists of files, or single images; each once."""
    known = set(images)
    members: dict[str, None] = {}
    for entry in given if isinstance(given, list) else [given]:
        place = None
        for place in _spellings(str(entry), folder):
            inside = [image for image in images if image.startswith(f"{place}/")] if place else list(images)
            if inside:
                members |= dict.fromkeys(inside)
                break
            if place in texts:
                listed, missing = _listed(found.files, place, known)
                members |= dict.fromkeys(listed)
                found.broken.setdefault(split, []).extend(
                    (name, "a list names it, but there is none") for name in missing
                )
                break
            if place in known:
                members[place] = None
                break
        else:
            found.broken.setdefault(split, []).append((str(entry), "the YAML file names it, but it isn't there"))
    return list(members)


def _spellings(entry: str, folder: str) -> Iterator[str]:
    """Where a path may lie: below the YAML file, below the whole, or with its first folders missing.

    Tools write paths that were right elsewhere: absolute ones, Windows', ``../train/images`` from a subfolder.
    """
    parts = [part for part in re.split(r"[\\/]+", entry.strip()) if part not in ("", ".", "..") and ":" not in part]
    for start in range(min(len(parts), 32)):
        rest = "/".join(parts[start:])
        if folder:
            yield f"{folder}/{rest}"
        yield rest
    if not parts:
        yield folder


def _listed(files: Files, name: str, known: set[str]) -> tuple[list[str], list[str]]:
    """The images that a list names and that are there, and the lines of those that are not."""
    there, missing = [], []
    for line in _lines(files, name):
        place = next((place for place in _spellings(line, name.rpartition("/")[0]) if place in known), None)
        if place is None:
            missing.append(line)
        else:
            there.append(place)
    return there, missing


def _splits_of_lists(found: Annotations, images: Sequence[str], texts: set[str]) -> dict[str, list[str]]:
    """Splits from ``train.txt`` and the like; without them from folders, or none at all."""
    known, splits = set(images), {}
    for name in sorted(texts):
        stem = PurePosixPath(name).stem.lower()
        split = next((key for key, words in SPLITS.items() if stem in words), None)
        if split is None or name.count("/") > 1:
            continue
        there, missing = _listed(found.files, name, known)
        if there:
            splits[split] = list(dict.fromkeys([*splits.get(split, []), *there]))
            found.broken.setdefault(split, []).extend((line, "a list names it, but there is none") for line in missing)
    if splits:
        return splits
    for image in images:
        split = next((s for part in image.split("/")[:-1] if (s := split_of_name(part, ""))), "")
        splits.setdefault(split, []).append(image)
    return splits


def _lines(files: Files, name: str) -> list[str]:
    """The lines of a text that aren't empty."""
    return [line.strip() for line in _text(files, name).splitlines() if line.strip()]


def _text(files: Files, name: str) -> str:
    """A text that isn't too large; raises UserError."""
    if files.size(name) > MAX_LABEL_BYTES:
        raise UserError(f"{name} is too large for a list: {files.size(name):,} bytes")
    try:
        return files.read(name).decode("utf-8-sig")
    except (UnicodeDecodeError, BrokenImage) as error:
        raise UserError(f"{name} can't be read: {first_line(error)}") from error


def _label_name(image: str, texts: set[str]) -> str | None:
    """An image's text: in ``labels`` for ``images``, or beside it."""
    folder, _, base = image.rpartition("/")
    stem = os.path.splitext(base)[0]
    parts = folder.split("/")
    for i in range(len(parts) - 1, -1, -1):
        if parts[i].lower() == "images":
            place = "/".join([*parts[:i], "labels", *parts[i + 1 :], f"{stem}.txt"])
            if place in texts:
                return place
    beside = f"{folder}/{stem}.txt".lstrip("/")
    return beside if beside in texts else None


def _read_item(
    found: Annotations, image: str, texts: set[str], broken: list[tuple[str, str]], keypoints: bool
) -> AnnotatedImage:
    """One image and its objects, with coordinates from 0 to 1."""
    item = AnnotatedImage(image, normalized=True)
    name = _label_name(image, texts)
    if name is None:
        return item
    try:
        lines = _lines(found.files, name)
    except UserError as error:
        broken.append((image, f"its labels: {error}"))
        return item
    for number, line in enumerate(lines, 1):
        try:
            label, box, mask = _read_line(line, keypoints)
        except (ValueError, OverflowError) as error:
            broken.append((image, f"line {number} of {name} is left out: {first_line(error)}"))
            continue
        if label not in found.names:
            known = abbreviate([str(value) for value in found.names])
            broken.append((image, f"line {number} of {name} is left out: class {label} is none of {known}"))
        elif problem := item.add(box, label, mask=mask):
            broken.append((image, problem))
        elif not (box[0] < 1 and box[1] < 1):
            for values in (item.boxes, item.labels, item.crowd, item.areas, item.masks):
                values.pop()
            broken.append((image, "a box outside of the image is left out"))
    return item


def _read_line(line: str, keypoints: bool = False) -> tuple[int, list[float], Any]:
    """Class, box (x1, y1, x2, y2) and polygon (None without one) of one object; a sixth number is a score.

    With ``keypoints`` whatever follows the box is left out.
    """
    if len(line) > MAX_LINE:
        raise ValueError(f"it has {len(line):,} characters")
    words = line.split()
    numbers = [float(word) for word in words]
    if not all(math.isfinite(number) for number in numbers):
        raise ValueError("not a number")
    if len(numbers) < 5 or not numbers[0].is_integer():
        raise ValueError("expected a class and a box or a polygon")
    label, rest = int(numbers[0]), numbers[1:]
    if len(rest) in (4, 5) or keypoints:
        x, y, width, height = rest[:4]
        return label, [x - width / 2, y - height / 2, x + width / 2, y + height / 2], None
    if len(rest) % 2:
        raise ValueError(f"a polygon needs pairs of numbers, got {len(rest)}")
    xs, ys = rest[0::2], rest[1::2]
    return label, [min(xs), min(ys), max(xs), max(ys)], [rest]
