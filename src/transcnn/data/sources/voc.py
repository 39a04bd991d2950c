"""Pascal VOC: an XML file for each image, splits from ``ImageSets/Main/*.txt`` or from folders."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any
from xml.etree import ElementTree

from ..images import BrokenImage
from ..listing import is_image_name
from ..names import normalise
from .annotations import AnnotatedImage, Annotations
from .source import SPLITS, abbreviate, first_line

__all__ = ["is_voc_file", "read_voc"]

FOLDERS = {"annotations", "annotation", "labels", "label", "xml", "jpegimages", "images", "image", "imgs", "img"}


def is_voc_file(name: str) -> bool:
    """Whether it may be an annotation of Pascal VOC: an XML file."""
    return name.lower().endswith(".xml")


def read_voc(found: Annotations, names: Sequence[str], images: Sequence[str]) -> None:
    """Add all annotations; boxes count from 1 on with both ends inside, categories are numbered by name."""
    find = _ByPath(images)
    lists, listed = _read_lists(found, names)
    used: set[str] = set()
    labels: dict[str, int] = {}
    for name in names:
        if not is_voc_file(name):
            continue
        stem = PurePosixPath(name).stem
        folder = next((s for s, words in SPLITS.items() if any(w.lower() in words for w in name.split("/")[:-1])), "")
        if lists and stem not in lists:
            continue
        used.add(stem)
        split = lists.get(stem, folder)
        broken = found.broken.setdefault(split, [])
        file = find(name)
        if isinstance(file, list):
            reason = f"several images could be meant: {abbreviate(file)}" if file else "an annotation without an image"
            broken.append((name, reason))
            continue
        try:
            item = _read_item(ElementTree.fromstring(found.files.read(name)), file, labels, broken)
        except (ElementTree.ParseError, BrokenImage, ValueError, AttributeError, TypeError, RecursionError) as error:
            broken.append((name, f"no annotation of Pascal VOC: {first_line(error)}"))
            continue
        broken += [(file, "a box outside of the image is left out")] * item.drop_outside()
        found.splits.setdefault(split, []).append(item)
    for stem in sorted(set(lists) - used):
        found.broken.setdefault(lists[stem], []).append((listed[stem], "a list names it, but there is no annotation"))
    order = sorted(labels)  # by name, so that the order of files doesn't matter
    renumber = {labels[label]: i for i, label in enumerate(order)}
    for items in found.splits.values():
        for item in items:
            item.labels = [renumber[label] for label in item.labels]
    found.names = dict(enumerate(order))


def _read_lists(found: Annotations, names: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """The split, and the line, of each stem that ``ImageSets/Main/{train,val,test}.txt`` lists.

    A line is a name, which may hold spaces and an ending, and may be followed by -1, 0 or 1.
    """
    stems = {PurePosixPath(name).stem for name in names if is_voc_file(name) or is_image_name(PurePosixPath(name).name)}
    lists: dict[str, str] = {}
    lines: dict[str, str] = {}
    for name in names:
        words = name.split("/")
        if words[-1] not in ("train.txt", "val.txt", "test.txt") or "Main" not in words:
            continue
        for line in found.files.read(name).decode("utf-8-sig", "replace").splitlines():
            if not line.strip():
                continue
            entry = line.strip()
            choices = [_stem(entry), _stem(entry.rpartition(" ")[0].strip() or entry), _stem(entry.split()[0])]
            stem = next((choice for choice in choices if choice in stems), choices[0])
            lists[stem], lines[stem] = words[-1][:-4], entry
    return lists, lines


def _stem(entry: str) -> str:
    base = PurePosixPath(entry.replace("\\", "/")).name
    return os.path.splitext(base)[0] if is_image_name(base) or is_voc_file(base) else base


class _ByPath:
    """Finds an annotation's image: of the same path below folders such as Annotations and JPEGImages, or stem."""

    def __init__(self, images: Sequence[str]) -> None:
        self.by_key: dict[tuple[str, ...], list[str]] = {}
        self.by_stem: dict[str, list[str]] = {}
        for image in images:
            self.by_key.setdefault(self._key(image), []).append(image)
            self.by_stem.setdefault(PurePosixPath(image).stem, []).append(image)

    @staticmethod
    def _key(name: str) -> tuple[str, ...]:
        path = PurePosixPath(name)
        return (*(word for word in path.parts[:-1] if word.lower() not in FOLDERS), path.stem)

    def __call__(self, name: str) -> str | list[str]:
        """The image's path, or the images (none or several) that it might be."""
        same = self.by_key.get(self._key(name)) or self.by_stem.get(PurePosixPath(name).stem, [])
        return same[0] if len(same) == 1 else same


def _read_item(root: Any, file: str, labels: dict[str, int], broken: list[tuple[str, str]]) -> AnnotatedImage:
    item = AnnotatedImage(file, size=_size(root))
    for thing in root.iter("object"):
        name = normalise(thing.findtext("name").strip())
        x1, y1, x2, y2 = (float(thing.find("bndbox").findtext(tag)) for tag in ("xmin", "ymin", "xmax", "ymax"))
        difficult = thing.findtext("difficult", "0").strip() == "1"  # neither learnt nor scored, as a crowd
        label = labels.setdefault(name, len(labels))
        both = x2 > x1 and y2 > y1  # else nobody meant a box of one pixel
        if problem := item.add([x1 - both, y1 - both, x2, y2], label, difficult):
            broken.append((file, problem))
    return item


def _size(root: Any) -> tuple[float, float] | None:
    try:
        width, height = (float(root.findtext(f"size/{side}")) for side in ("width", "height"))
        return (width, height) if width > 0 and height > 0 else None
    except (TypeError, ValueError):
        return None
