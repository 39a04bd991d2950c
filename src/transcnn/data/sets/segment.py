"""Data for segmentation: images with label maps, whatever they lie in.

    splits = open_splits("camvid.tar", {"ignore_index": 11})
    splits.train.read(0)        # image, label map of int16: indices into splits.class_names, IGNORE elsewhere

A label map's values are the data's own ids. What a network learns are indices 0, 1, ... into the names of the classes
that are not ignored; ``task_args["label_ids"]`` says which id each index stands for.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from ...errors import UserError
from ..bands import PixelRange
from ..images import BrokenImage, read_oriented
from ..names import distinct_names
from ..sources.annotations import Alignment
from ..sources.label_maps import Pair, PairedFiles, find_pairs
from ..sources.source import abbreviate, check_fraction
from ..transforms.segment import IGNORE
from .channels import measure_channels
from .dense_dataset import DenseDataset, DenseSource
from .splits import Splits, choose_split, hold_back, make_splits

__all__ = ["class_shares", "open_parts", "open_set", "open_splits"]

logger = logging.getLogger(__name__)

EXAMINED = 32  # label maps of a split that are looked at for which classes occur
MAX_CLASSES = 4096  # where values are counted, not named: a stray large one isn't meant as so many classes
SOFT = range(245, 255)  # the largest value but 255 of masks of 0 and 255 that were smoothed or resized
MAX_READ = 20_000  # label maps of a split up to which each one's checksum is taken
VOID = {"void", "unlabelled", "unlabeled", "ignore", "ignored"}  # names that are no class


class Ids:
    """From the values in label maps to indices of classes.

    Args:
        ids: Value of each class.
        ignored: Values that don't count; all others make a label map unusable.
        indices: Index of each class; None is 0, 1, 2, ...
    """

    def __init__(self, ids: Sequence[int], ignored: set[int], indices: Sequence[int] | None = None) -> None:
        self.ids = list(ids)
        self.table = np.full(1 << 16, -2, dtype=np.int16)
        self.table[[value for value in ignored if 0 <= value < 1 << 16]] = IGNORE
        self.table[self.ids] = np.arange(len(self.ids)) if indices is None else indices

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
) -> Splits:
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
    found = find_pairs(data)
    names, ids, colours = _classes(found, settings.get("ignore_index"))
    make, keep = partial(_make_set, found, ids, strict), partial(_hold_back, found, val_fraction, seed)
    sets = make_splits(found.splits, make, keep)
    train, val = sets["train"], sets["val"]
    if train is None or val is None:
        raise UserError(f"{data!r} has too few images with label maps to learn from and to validate on")
    if len(names) < 2:
        raise UserError(_too_few_classes(str(data), found, names))
    _check_classes(str(data), found, ids, names, train)
    for split, images in (("val", val), ("test", sets["test"])):
        if images is not None:
            _check_counted(str(data), split, images)
    channels = measure_channels(sets, in_chans)
    args: dict[str, Any] = {"label_ids": ids.ids, "colours": colours}
    if settings.get("class_weights", "none") != "none":
        args["shares"] = class_shares(train, len(names)).tolist()
    return Splits(train, val, sets["test"], names, found.name, channels, args)


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
    held: Collection[str] | None = None,
) -> DenseDataset:
    """Open one split for evaluation, its labels as indices into ``class_names``.

    Where the data names its classes they are matched by name, else its ids are taken to be ``label_ids``. ``held`` are
    names of images that a run held back, as for classification.

    Raises:
        UserError: No such data or split, or classes that are not among ``class_names``.
    """
    found = find_pairs(data)
    ignored = _ignored(found.names, (settings or {}).get("ignore_index"))
    if found.names is None:
        ids = Ids(label_ids, ignored - set(label_ids))
    else:
        values = [value for value in sorted(found.names) if value not in ignored]
        names = distinct_names(found.names[value] for value in values)
        known = {name: index for index, name in enumerate(distinct_names(class_names))}
        unknown = [name for name in names if name not in known]
        if unknown:
            raise UserError(
                f"{data!r} has classes that the model does not know: {abbreviate(unknown)}; "
                f"it knows {abbreviate(list(known))}"
            )
        ids = Ids(values, ignored, [known[name] for name in names])
    chosen = choose_split(
        str(data),
        found.splits,
        partial(_make_set, found, ids, strict),
        split,
        partial(_hold_back, found, val_fraction, seed, held=held),
    )
    _check_counted(str(data), chosen.split, chosen)
    return chosen


def open_parts(data: str | None) -> tuple[dict[str, DenseDataset], list[str], list[list[int]] | None]:
    """Each split as it lies there ("" where there are none), the classes' names, and their colours if they have any."""
    found = find_pairs(data)
    names, ids, colours = _classes(found, None)
    return {split: _make_set(found, ids, False, split, None, replace=False) for split in found.splits}, names, colours


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


def _hold_back(
    found: PairedFiles, fraction: float, seed: int, split: str, held: Collection[str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    return hold_back([pair.name for pair in found.splits[split]], fraction, seed, held)


def _make_set(
    found: PairedFiles, ids: Ids, strict: bool, split: str, indices: np.ndarray | None, *, replace: bool
) -> DenseDataset:
    pairs, unmatched = found.splits[split], found.unmatched.get(split, [])
    if strict and unmatched:
        raise UserError(f"{unmatched[0][0]!r} can't be used: {unmatched[0][1]}")
    names, load, entry = [pair.name for pair in pairs], partial(_load, pairs, ids), partial(_entry, pairs)
    source = DenseSource(names, load, entry, unmatched, partial(_raw, pairs))
    made = DenseDataset(source, indices, strict=strict, replace=replace)
    made.listed = list(unmatched)
    return made


def _raw(pairs: list[Pair], i: int) -> bytes:
    return pairs[i].image()


def _entry(pairs: list[Pair], i: int) -> tuple[str, int]:
    """The label map's checksum, of many its size, and the image's size."""
    image, label = pairs[i].sizes()
    if len(pairs) <= MAX_READ:
        with suppress(BrokenImage, OSError):  # which shows when it is used
            return f"{zlib.crc32(pairs[i].label()):08x}", image
    return str(label), image


def _load(pairs: list[Pair], ids: Ids, i: int, pixel_range: PixelRange | None = None) -> tuple[Image.Image, np.ndarray]:
    """Image and label map (H, W) of int16 indices."""
    pair = pairs[i]
    image, orientation = read_oriented(pair.image(), pixel_range)
    try:
        values, _ = pair.ids()
    except BrokenImage as error:
        raise BrokenImage(f"its label map: {error}") from error
    if orientation >= 5 and values.shape == (image.width, image.height) != (image.height, image.width):
        values = Alignment(values.shape[::-1], orientation).mask(values, image.size)  # it is for the stored pixels
    if values.shape != (image.height, image.width):
        raise BrokenImage(
            f"the image is {image.width}x{image.height}, its label map {values.shape[1]}x{values.shape[0]} pixels"
        )
    return image, ids(values)


# --- classes ----------------------------------------------------------------------------------------------------------


def _ignored(names: Mapping[int, str] | None, ignore_index: int | None) -> set[int]:
    ignored = {255} - set(names or ())
    if ignore_index is not None:
        return ignored | {ignore_index}
    return ignored | {value for value, name in (names or {}).items() if name.lower() in VOID}


def _classes(found: PairedFiles, ignore_index: int | None) -> tuple[list[str], Ids, list[list[int]] | None]:
    """Names, ids and colours (of a palette, if the first label map has one) of the classes that count."""
    pairs = [pair for split in ("train", "", "val", "test") for pair in found.splits.get(split, ())]
    ignored = _ignored(found.names, ignore_index)
    names, palette = found.names, None
    for pair in pairs[:8]:
        try:
            palette = pair.ids()[1]
            break
        except BrokenImage:
            continue
    if names is None:
        top = _largest(pairs, ignored)
        if top >= MAX_CLASSES:
            raise UserError(
                f"label maps of {found.name!r} hold the value {top}, which would make {top + 1} classes; at most "
                f"{MAX_CLASSES} are possible. If only some values are classes, name them in classes.txt (lines such as "
                f"'0 background'); --ignore_index leaves one out"
            )
        if top in SOFT and 255 in ignored:
            logger.warning(
                "%s: label maps hold values up to %d, which are taken for so many classes, and perhaps 255, which is "
                "ignored, as masks of 0 and 255 with soft edges do; masks of these two values alone can be learnt if "
                "classes.txt names them (lines such as '0 background' and '255 object')",
                found.name,
                top,
            )
        names = {value: str(value) for value in range(top + 1)}
    kept = [value for value in sorted(names) if value not in ignored]
    if len(kept) > MAX_CLASSES:
        raise UserError(f"{found.name!r} names {len(kept)} classes; at most {MAX_CLASSES} are possible")
    colours = [found.colours.colours[value] for value in kept] if found.colours is not None else None
    if palette and kept and 3 * max(kept) + 3 <= len(palette):
        colours = [palette[3 * value : 3 * value + 3] for value in kept]
    return distinct_names(names[value] for value in kept), Ids(kept, ignored), colours


def _largest(pairs: Sequence[Pair], ignored: set[int]) -> int:
    """The largest id that counts in all label maps that can be read."""
    top = 0
    for pair in pairs:
        try:
            values = np.unique(pair.ids()[0])
        except BrokenImage:
            continue
        top = max([top, *(value for value in values.tolist() if value not in ignored)])
    return top


def _too_few_classes(data: str, found: PairedFiles, names: Sequence[str]) -> str:
    """What was found instead of two classes, and what to do about it."""
    values: set[int] = set()
    problem = ""
    for pair in [pair for pairs in found.splits.values() for pair in pairs][:EXAMINED]:
        try:
            values |= set(np.unique(pair.ids()[0]).tolist())
        except BrokenImage as error:  # noqa: PERF203
            problem = problem or f"{pair.name!r}: {error}"
    if not values:
        return f"none of the label maps of {data!r} can be read; the first is that of {problem}"
    ignored = " 255 is ignored unless classes.txt names it (lines such as '0 background' and '255 object')."
    return (
        f"{data!r} has {len(names)} class ({abbreviate(names)}); 2 or more are needed. Its label maps hold the values "
        f"{abbreviate([str(value) for value in sorted(values)])}.{ignored * (255 in values)}".rstrip(".")
    )


def _check_classes(data: str, found: PairedFiles, ids: Ids, names: Sequence[str], train: DenseDataset) -> None:
    """Warn of classes that occur nowhere in the training split; UserError where fewer than two do.

    Of a large split some label maps are looked at, and all only where these show fewer than two classes.
    """
    pairs = found.splits["train" if found.splits.get("train") else ""]
    order = train.indices[np.argsort(np.arange(len(train)) % -(-len(train) // EXAMINED), kind="stable")]
    occurring: set[int] = set()
    pixels, ignored, examined = 0, dict[int, int](), 0
    for i in order.tolist():
        if examined >= EXAMINED and len(occurring) >= 2:
            break
        examined += 1
        try:
            values, _ = pairs[i].ids()
            indices = ids(values)
        except BrokenImage:
            continue
        occurring |= set(np.unique(indices[indices != IGNORE]).tolist())
        pixels += values.size
        for value, count in zip(*np.unique(values[indices == IGNORE], return_counts=True), strict=True):
            ignored[int(value)] = ignored.get(int(value), 0) + int(count)
    if not pixels or (examined < len(order) and len(occurring) >= 2):
        return  # nothing can be read, which is said later; or not all was looked at
    missing = [name for index, name in enumerate(names) if index not in occurring]
    shares = [f"{count / pixels:.0%} of the pixels is {value}, which is ignored" for value, count in ignored.items()]
    if len(occurring) < 2:
        shown = abbreviate([names[index] for index in sorted(occurring)]) or "none"
        reasons = "; ".join([*shares, *(["name 255 in classes.txt if it is a class"] if 255 in ignored else [])])
        raise UserError(f"{data!r}: of its {len(names)} classes {shown} occurs in the training split alone; {reasons}")
    if missing:
        logger.warning("%s: no training image shows %s", data, "; ".join([abbreviate(missing), *shares]))


def _check_counted(data: str, split: str, images: DenseDataset) -> None:
    """UserError where no pixel of a whole split counts: there would be nothing to score."""
    readable = False
    for i in range(len(images)):
        try:
            label = images.read(i)[1]
        except BrokenImage:
            continue
        if (label != IGNORE).any():
            return
        readable = True
    if readable:  # else that is what is said
        raise UserError(f"{data!r}: every pixel of the {split} split is ignored, so it can't be scored")
