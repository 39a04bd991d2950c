"""Data for segmentation: images with label maps, whatever they lie in.

    splits = open_splits("camvid.tar", {"ignore_index": 11})
    splits.train.read(0)        # image, label map of int16: indices into splits.class_names, IGNORE elsewhere

A label map's values are the data's own ids. What a network learns are indices 0, 1, ... into the names of the classes
that are not ignored; ``task_args["label_ids"]`` says which id each index stands for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...errors import UserError
from ..images import BrokenImage, is_image_name, read_ids, read_image
from ..sources.files import Files, open_files
from ..sources.source import SPLITS, abbreviate, check_fraction
from ..transforms.segment import IGNORE
from .dense_dataset import DenseDataset, DenseSource, DenseSplits, choose_split, make_splits
from .fault_tolerant import channels_of

__all__ = ["class_shares", "open_set", "open_splits"]

IMAGE_FOLDERS = ("images", "image", "img", "imgs", "jpegimages")
LABEL_FOLDERS = ("labels", "label", "annotations", "masks", "mask")
VOID = {"void", "unlabelled", "unlabeled", "ignore", "ignored"}  # names that are no class
VOC = [
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
]


@dataclass
class Pair:
    """Where one image and its label map are read from."""

    name: str
    image: Callable[[], bytes]
    label: Callable[[], bytes]


@dataclass
class Found:
    """A data set as it lies there: pairs of each split, files without a partner, names by id (if given)."""

    name: str
    splits: dict[str, list[Pair]]  # by "train", "val", "test", or "" where it isn't split
    unmatched: dict[str, list[tuple[str, str]]]
    names: dict[int, str] | None


class Ids:
    """From the values in label maps to indices of classes.

    Args:
        ids: Value of each class.
        ignored: Values that don't count; all others make a label map unusable.
    """

    def __init__(self, ids: Sequence[int], ignored: set[int]) -> None:
        self.ids = list(ids)
        self.table = np.full(1 << 16, -2, dtype=np.int16)
        self.table[[value for value in ignored if 0 <= value < 1 << 16]] = IGNORE
        self.table[self.ids] = np.arange(len(self.ids))

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """(H, W) of ids -> (H, W) of int16 indices; raises BrokenImage for ids that are nothing."""
        if values.max(initial=0) >= len(self.table) or values.min(initial=0) < 0:
            raise BrokenImage(f"label values from {values.min()} to {values.max()}: class ids are from 0 to 65535")
        indices = self.table[values]
        if indices.min(initial=0) < IGNORE:
            wrong = np.unique(values[indices < IGNORE]).tolist()
            raise BrokenImage(
                f"label value{'s' * (len(wrong) > 1)} {abbreviate([str(value) for value in wrong])} of none of the "
                f"{len(self.ids)} classes, and not ignored"
            )
        return indices


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
    """Open a data set for training; a split that it lacks is split off, as for classification.

    Args:
        data: A folder, or the tar of one, with ``images/{train,val,test}/`` and ``labels/{train,val,test}/`` (or
            ``train/images/`` and so on, or neither split), label maps with the same stems; ``classes.txt`` in it or
            beside it names the classes, one a line from id 0 on, or with the id before the name. Or
            ``torch/voc:FOLDER`` and ``torch/cityscapes:FOLDER`` as torchvision has them.
        settings: ``ignore_index``: the value that doesn't count; None is 255, and classes named void or unlabelled.
            ``class_weights`` other than ``none`` has the classes' shares counted.
        val_fraction, seed, strict, in_chans: As for classification.

    Raises:
        UserError: No such data, nothing in it that fits together, or fewer than two classes.
    """
    settings = settings or {}
    check_fraction(val_fraction)
    found = _find(data)
    names, ids, colours = _classes(found, settings.get("ignore_index"))
    sets = make_splits(found.splits, partial(_make_set, found, ids, strict), val_fraction, seed)
    train, val = sets["train"], sets["val"]
    if train is None or val is None:
        raise UserError(f"{data!r} has too few images with label maps to learn from and to validate on")
    if len(names) < 2:
        raise UserError(f"{data!r} has {len(names)} class ({abbreviate(names)}); 2 or more are needed")
    channels = channels_of(train, in_chans)
    args: dict[str, Any] = {"label_ids": ids.ids, "colours": colours}
    if settings.get("class_weights", "none") != "none":
        args["shares"] = class_shares(train, len(names)).tolist()
    return DenseSplits(train, val, sets["test"], names, found.name, channels, args)


def open_set(
    data: str | None,
    split: str,
    class_names: Sequence[str],
    label_ids: Sequence[int],
    settings: Mapping[str, Any] | None = None,
    *,
    val_fraction: float = 0.1,
    seed: int = 0,
    strict: bool = False,
) -> DenseDataset:
    """Open one split for evaluation, its labels as indices into ``class_names``.

    Where the data names its classes they are matched by name, else its ids are taken to be ``label_ids``.

    Raises:
        UserError: No such data or split, or classes that are not among ``class_names``.
    """
    found = _find(data)
    ignored = _ignored(found.names, (settings or {}).get("ignore_index"))
    if found.names is None:
        ids = Ids(label_ids, ignored - set(label_ids))
    else:
        kept = {name: value for value, name in found.names.items() if value not in ignored}
        unknown = [name for name in kept if name not in class_names]
        if unknown:
            raise UserError(
                f"{data!r} has classes that the model does not know: {abbreviate(unknown)}; "
                f"it knows {abbreviate(class_names)}"
            )
        ids = Ids([], ignored)
        for index, name in enumerate(class_names):
            if name in kept:
                ids.table[kept[name]] = index
        ids.ids = list(kept.values())
    return choose_split(data, found.splits, partial(_make_set, found, ids, strict), split, val_fraction, seed)


def class_shares(images: DenseDataset, classes: int) -> np.ndarray:
    """The share of each class among all pixels that count, (classes,)."""
    counts = np.zeros(classes, dtype=np.int64)
    for i in range(len(images)):
        try:
            label = images.read(i)[1]
        except BrokenImage as error:
            images.note_broken(i, error)
            continue
        counts += np.bincount(label[label != IGNORE].ravel(), minlength=classes)
    return counts / max(1, counts.sum())


def _make_set(
    found: Found, ids: Ids, strict: bool, split: str, indices: np.ndarray | None, *, replace: bool
) -> DenseDataset:
    pairs, unmatched = found.splits[split], found.unmatched.get(split, [])
    if strict and unmatched:
        raise UserError(f"{unmatched[0][0]!r} can't be used: {unmatched[0][1]}")
    source = DenseSource([pair.name for pair in pairs], partial(_load, pairs, ids), unmatched)
    made = DenseDataset(source, indices, strict=strict, replace=replace)
    made.listed = list(unmatched)
    return made


def _load(pairs: list[Pair], ids: Ids, i: int) -> tuple[Image.Image, np.ndarray]:
    """Image and label map (H, W) of int16 indices."""
    pair = pairs[i]
    image = read_image(pair.image())
    try:
        values, _ = read_ids(pair.label())
    except BrokenImage as error:
        raise BrokenImage(f"its label map: {error}") from error
    if values.shape != (image.height, image.width):
        raise BrokenImage(
            f"the image is {image.width}x{image.height}, its label map {values.shape[1]}x{values.shape[0]} pixels"
        )
    return image, ids(values)


# --- what lies there ------------------------------------------------------------------------------------------------


def _find(data: str | None) -> Found:
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
    found = Found(files.name, {}, {}, _class_file(files, Path(data)))
    images: dict[tuple[str, str], str] = {}
    labels: dict[tuple[str, str], str] = {}
    for name in files.names():
        found_as = _parse_path(name)
        if found_as is not None:
            kind, split, stem = found_as
            (images if kind == "image" else labels)[split, stem] = name
    for key, name in sorted(images.items()):
        if key in labels:
            pair = Pair(name, partial(files.read, name), partial(files.read, labels[key]))
            found.splits.setdefault(key[0], []).append(pair)
        elif key[0] in {split for split, _ in labels}:  # a split without any labels is none
            found.unmatched.setdefault(key[0], []).append((name, "no label map of this name"))
    for key, name in sorted(labels.items()):
        if key not in images:
            found.unmatched.setdefault(key[0], []).append((name, "a label map without an image"))
    if not found.splits:
        raise UserError(
            f"no images with label maps in {data!r}; expected images/train/NAME.jpg and labels/train/NAME.png, "
            "and the same for val and test"
        )
    return found


def _parse_path(name: str) -> tuple[str, str, str] | None:
    """("image" or "label", split, stem) of a file by its path; None for what is neither."""
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
    if not kind or not is_image_name(words[-1]):
        return None
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
    heads = [line.replace(":", " ").replace(",", " ").split(None, 1) for line in lines]
    if all(len(head) == 2 and head[0].isdigit() for head in heads) and len({head[0] for head in heads}) == len(heads):
        return {int(number): name for number, name in heads}
    return dict(enumerate(lines))


def _ignored(names: Mapping[int, str] | None, ignore_index: int | None) -> set[int]:
    ignored = {255} - set(names or ())
    if ignore_index is not None:
        return ignored | {ignore_index}
    return ignored | {value for value, name in (names or {}).items() if name.lower() in VOID}


def _classes(found: Found, ignore_index: int | None) -> tuple[list[str], Ids, list[list[int]] | None]:
    """Names, ids and colours (of a palette, if the first label map has one) of the classes that count."""
    pairs = [pair for split in ("train", "", "val", "test") for pair in found.splits.get(split, ())]
    ignored = _ignored(found.names, ignore_index)
    names, palette = found.names, None
    for pair in pairs[:8]:
        try:
            palette = read_ids(pair.label())[1]
            break
        except BrokenImage:
            continue
    if names is None:
        top = _largest(pairs, ignored)
        names = {value: str(value) for value in range(top + 1)}
    kept = [value for value in sorted(names) if value not in ignored]
    colours = None
    if palette and kept and 3 * max(kept) + 3 <= len(palette):
        colours = [palette[3 * value : 3 * value + 3] for value in kept]
    return [names[value] for value in kept], Ids(kept, ignored), colours


def _largest(pairs: Sequence[Pair], ignored: set[int]) -> int:
    """The largest id that counts in all label maps that can be read."""
    top = 0
    for pair in pairs:
        try:
            values = np.unique(read_ids(pair.label())[0])
        except BrokenImage:
            continue
        top = max([top, *(value for value in values.tolist() if value not in ignored)])
    return top


def _voc(root: str) -> Found:
    """torchvision's VOCSegmentation of 2012."""
    from torchvision.datasets import VOCSegmentation

    splits = {}
    for split in ("train", "val"):
        dataset = _torchvision(VOCSegmentation, root, year="2012", image_set=split)
        splits[split] = [_files(image, label) for image, label in zip(dataset.images, dataset.masks, strict=True)]
    return Found("voc2012", splits, {}, dict(enumerate(VOC)))


def _cityscapes(root: str) -> Found:
    """torchvision's Cityscapes, fine annotations, with the 19 classes that its benchmark scores."""
    from torchvision.datasets import Cityscapes

    splits = {}
    for split in ("train", "val"):
        dataset = _torchvision(Cityscapes, root, split=split, mode="fine", target_type="semantic")
        splits[split] = [_files(image, label[0]) for image, label in zip(dataset.images, dataset.targets, strict=True)]
    scored = {c.id: c.name if 0 <= c.train_id < 255 else "void" for c in Cityscapes.classes if c.id >= 0}
    return Found("cityscapes", splits, {}, scored)


def _torchvision(cls: Any, root: str, **settings: Any) -> Any:
    try:
        return cls(root, **settings)
    except (RuntimeError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"torchvision can't open {cls.__name__} in {root!r}: {reason}") from error


def _files(image: str, label: str) -> Pair:
    return Pair(Path(image).name, partial(_read_file, image), partial(_read_file, label))


def _read_file(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise BrokenImage(error.strerror or str(error)) from error
