"""Images with label maps: pairs of files in a folder or a tar, or of torchvision's data sets."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ...errors import UserError
from ..images import BrokenImage, is_image_name, lies_beside
from .files import Files, open_files
from .source import SPLITS, first_reasons

__all__ = ["Pair", "PairedFiles", "find_pairs"]

MAX_ID = 65535
IMAGE_FOLDERS = ("images", "image", "img", "imgs", "jpegimages")
LABEL_FOLDERS = ("labels", "label", "annotations", "masks", "mask")
VOC = [
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
]


@dataclass
class Pair:
    """Where one image and its label map are read from; ``sizes`` are those of the two files in bytes."""

    name: str
    image: Callable[[], bytes]
    label: Callable[[], bytes]
    sizes: Callable[[], tuple[int, int]]


@dataclass
class PairedFiles:
    """A data set as it lies there: pairs of each split, files without a partner, names by id (if given)."""

    name: str
    splits: dict[str, list[Pair]]  # by "train", "val", "test", or "" where it isn't split
    unmatched: dict[str, list[tuple[str, str]]]
    names: dict[int, str] | None


def find_pairs(data: str | None) -> PairedFiles:
    """The images with label maps of what the user named; raises UserError where there are none."""
    if data is None:
        raise UserError("segmentation has no data of its own: name a folder or tar of images/ and labels/")
    prefix, _, rest = os.fspath(data).partition("/")
    if prefix.lower() == "torch" and rest and not os.path.exists(data):
        name, _, root = rest.partition(":")
        if name not in ("voc", "cityscapes"):
            raise UserError(
                f"of torchvision's sets for segmentation torch/voc and torch/cityscapes are known, got {data!r}"
            )
        return (_voc if name == "voc" else _cityscapes)(root or "data")
    files = open_files(data)
    found = PairedFiles(files.name, {}, {}, _class_file(files, Path(data)))
    images: dict[tuple[str, str], str] = {}
    labels: dict[tuple[str, str], str] = {}
    for name in files.names():
        found_as = _parse_path(name)
        if found_as is not None:
            kind, split, stem = found_as
            if kind == "other":
                found.unmatched.setdefault(split, []).append((name, "not an image by its name"))
            else:
                (images if kind == "image" else labels)[split, stem] = name
    for key, name in sorted(images.items()):
        if key in labels:
            sizes = partial(_sizes, files, name, labels[key])
            pair = Pair(name, partial(files.read, name), partial(files.read, labels[key]), sizes)
            found.splits.setdefault(key[0], []).append(pair)
        elif key[0] in {split for split, _ in labels}:  # a split without any labels is none
            found.unmatched.setdefault(key[0], []).append((name, "no label map of this name"))
    for key, name in sorted(labels.items()):
        if key not in images:
            found.unmatched.setdefault(key[0], []).append((name, "a label map without an image"))
    if not found.splits:
        raise UserError(
            f"no images with label maps in {data!r}; expected images/train/NAME.jpg and labels/train/NAME.png, "
            f"and the same for val and test{first_reasons(found.unmatched)}"
        )
    return found


def _parse_path(name: str) -> tuple[str, str, str] | None:
    """("image", "label" or "other", split, stem) of a file by its path; None for what lies elsewhere, or beside."""
    words = name.split("/")
    kind = split = ""
    while len(words) > 1:
        word = words[0].lower()
        synonym = next((key for key, names in SPLITS.items() if word in names), "")
        if not kind and word in IMAGE_FOLDERS + LABEL_FOLDERS:
            kind = "image" if word in IMAGE_FOLDERS else "label"
        elif not split and synonym:
            split = synonym
        else:
            break
        words.pop(0)
    if not kind or (not is_image_name(words[-1]) and lies_beside(words[-1])):
        return None
    if not is_image_name(words[-1]):
        kind = "other"
    return kind, split, os.path.splitext("/".join(words))[0]


def _class_file(files: Files, path: Path) -> dict[int, str] | None:
    """Names by id from ``classes.txt`` in the data or beside it."""
    beside = path.parent / "classes.txt"
    try:
        text = files.read("classes.txt").decode()
    except BrokenImage:
        if path.is_dir() or not beside.is_file():
            return None
        text = beside.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"classes.txt of {path.name} is not in UTF-8") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    numbered = [re.fullmatch(r"(\d{1,9})\s*[\s:,]\s*(.*)", line) for line in lines]
    ids = [int(match[1]) for match in numbered if match]
    names = {int(match[1]): match[2] for match in numbered if match}
    if not (len(names) == len(ids) == len(lines) and all(names.values())):
        names = dict(enumerate(lines))
    if max(names, default=0) > MAX_ID:
        raise UserError(f"classes.txt of {path.name} has the id {max(names)}; class ids are from 0 to {MAX_ID}")
    return names


def _voc(root: str) -> PairedFiles:
    """torchvision's VOCSegmentation of 2012."""
    from torchvision.datasets import VOCSegmentation

    splits = {}
    for split in ("train", "val"):
        dataset = _torchvision(VOCSegmentation, root, year="2012", image_set=split)
        splits[split] = [_files(image, label) for image, label in zip(dataset.images, dataset.masks, strict=True)]
    return PairedFiles("voc2012", splits, {}, dict(enumerate(VOC)))


def _cityscapes(root: str) -> PairedFiles:
    """torchvision's Cityscapes, fine annotations, with the 19 classes that its benchmark scores."""
    from torchvision.datasets import Cityscapes

    splits = {}
    for split in ("train", "val"):
        dataset = _torchvision(Cityscapes, root, split=split, mode="fine", target_type="semantic")
        splits[split] = [_files(image, label[0]) for image, label in zip(dataset.images, dataset.targets, strict=True)]
    scored = {c.id: c.name if 0 <= c.train_id < 255 else "void" for c in Cityscapes.classes if c.id >= 0}
    return PairedFiles("cityscapes", splits, {}, scored)


def _torchvision(cls: Any, root: str, **settings: Any) -> Any:
    try:
        return cls(root, **settings)
    except (RuntimeError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"torchvision can't open {cls.__name__} in {root!r}: {reason}") from error


def _files(image: str, label: str) -> Pair:
    sizes = partial(_file_sizes, image, label)
    return Pair(Path(image).name, partial(_read_file, image), partial(_read_file, label), sizes)


def _sizes(files: Files, image: str, label: str) -> tuple[int, int]:
    return files.size(image), files.size(label)


def _file_sizes(image: str, label: str) -> tuple[int, int]:
    return os.path.getsize(image), os.path.getsize(label)


def _read_file(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise BrokenImage(error.strerror or str(error)) from error
