"""Images with label maps: pairs of files in a folder or a tar, or of torchvision's data sets."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError
from ..images import BrokenImage, read_colours, read_ids
from ..listing import image_names, is_image_name, lies_beside
from .class_files import ColourTable, read_class_file
from .files import Files, open_files
from .source import SPLITS, first_reasons, split_of_name

__all__ = ["Pair", "PairedFiles", "find_pairs"]

IMAGE_FOLDERS = ("images", "image", "img", "imgs", "jpegimages")
LABEL_FOLDERS = ("labels", "label", "annotations", "masks", "mask")
VOC = [
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
]


@dataclass
class Pair:
    """Where one image and its label map are read from; ``sizes`` are those of the two files in bytes.

    ``colours`` says which class a colour of the label map is, where it doesn't hold ids.
    """

    name: str
    image: Callable[[], bytes]
    label: Callable[[], bytes]
    sizes: Callable[[], tuple[int, int]]
    colours: ColourTable | None = None

    def ids(self) -> tuple[np.ndarray, list[int] | None]:
        """The class ids (H, W), and the palette if there is one; raises BrokenImage."""
        return read_ids(self.label()) if self.colours is None else (self.colours.ids(read_colours(self.label())), None)


@dataclass
class PairedFiles:
    """A data set as it lies there: pairs of each split, files without a partner, names by id (if given)."""

    name: str
    splits: dict[str, list[Pair]]  # by "train", "val", "test", or "" where it isn't split
    unmatched: dict[str, list[tuple[str, str]]]
    names: dict[int, str] | None
    colours: ColourTable | None = None


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
    names, colours = read_class_file(files, Path(data))
    found = PairedFiles(files.name, {}, {}, names, colours)
    images: dict[tuple[str, str], str] = {}
    labels: dict[tuple[str, str], str] = {}
    there = files.names()
    beside = _labels_beside(there)
    features = {name for name in there if is_image_name(name.rpartition("/")[2])} - {*image_names(there)}
    for name in there:
        if name in features:
            continue
        found_as = beside.get(name) or _parse_path(name)
        if found_as is not None:
            kind, split, stem = found_as
            if kind == "other":
                found.unmatched.setdefault(split, []).append((name, "not an image by its name"))
            else:
                place = images if kind == "image" else labels
                if (other := place.get((split, stem))) is not None:
                    found.unmatched.setdefault(split, []).append((other, f"{name} is taken, which has the same stem"))
                place[split, stem] = name
    for key, name in sorted(images.items()):
        if key in labels:
            sizes = partial(_sizes, files, name, labels[key])
            pair = Pair(name, partial(files.read, name), partial(files.read, labels[key]), sizes, colours)
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


def _labels_beside(names: list[str]) -> dict[str, tuple[str, str, str]]:
    """Label maps that lie otherwise than in a folder ``labels``, as ``_parse_path`` gives them.

    ``x_mask.png`` beside ``x.jpg``, as Roboflow writes it, and CamVid's own ``LabeledApproved_full/x_L.png`` for
    ``701_StillsRaw_full/x.png``.
    """
    there = image_names(names)
    stems = {os.path.splitext(name)[0]: name for name in there}
    found: dict[str, tuple[str, str, str]] = {}
    for stem, name in stems.items():
        image = stems.get(stem.removesuffix("_mask")) if stem.endswith("_mask") else None
        if image is not None:
            split = next((s for word in stem.split("/")[:-1] if (s := split_of_name(word, ""))), "")
            key = stem.removesuffix("_mask")
            found[name], found[image] = ("label", split, key), ("image", split, key)
    camvid = [name for name in there if re.search(r"(^|/)LabeledApproved[^/]*/", name)]
    bases = {name.rpartition("/")[2].rpartition(".")[0]: name for name in there if name not in set(camvid)}
    for name in camvid:
        key = name.rpartition("/")[2].rpartition(".")[0].removesuffix("_L")
        found[name] = ("label", "", key)
        if key in bases:
            found[bases[key]] = ("image", "", key)
    return found


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
