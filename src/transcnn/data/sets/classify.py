"""Splits of a data set for classification."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...errors import UserError
from ..names import distinct_names, match_names
from ..sources.opening import open_source
from ..sources.source import Source, SourceSplits, abbreviate, check_fraction, split_stratified
from .fault_tolerant import channels_of, set_pixel_range
from .image_dataset import ImageDataset

__all__ = ["ClassifySplits", "open_set", "open_splits"]

SPLIT_CHOICES = ("auto", "train", "val", "test", "all")


@dataclass
class ClassifySplits:
    """The splits of one data set.

    Attributes:
        train, val: What is learnt from, and what the best model is chosen by.
        test: What only the final figure is measured on; None where the data has no such split.
        class_names: In the order of the labels.
        name: A short name for run directories.
        in_chans: Channels of the images: as asked for, else 1 if a sample of them is all grey, else 3.
        pixel_range: Values that are black and white in images of more than 8 bits, see ``images.read_image``.
    """

    train: ImageDataset
    val: ImageDataset
    test: ImageDataset | None
    class_names: list[str]
    name: str
    in_chans: int
    task_args: dict[str, Any] = field(default_factory=dict)  # nothing: labels are all that a classifier needs
    pixel_range: Sequence[float] | None = None

    @property
    def broken(self) -> list[tuple[str, str]]:
        """(name, reason) of every file that could not be read so far, in all splits."""
        return [entry for split in (self.train, self.val, self.test) if split is not None for entry in split.broken]


# --- opening ----------------------------------------------------------------------------------------------------


def open_splits(
    data: str | None = None,
    *,
    val_fraction: float = 0.1,
    seed: int = 0,
    strict: bool = False,
    in_chans: int | None = None,
) -> ClassifySplits:
    """Open a data set for training.

    What has no validation split gets one, split off from the training split: ``val_fraction`` of each class, the
    same one for the same ``seed``. A test split, if there is one, stays whole. Of the embedded digits the test split
    is always the same fifth.

    Args:
        data: None for the embedded digits; a folder of class folders, or of ``train/`` with ``val/`` or ``test/``
            that hold them; a folder that ``transcnn pack`` wrote; a Parquet file or a folder of them; the URL of
            either (``https://...``, ``s3://...``, ``hf://datasets/OWNER/NAME``), whose files are fetched as they are
            needed; other WebDataset shards on a local disk as ``wds/PATH/{000..015}.tar``; ``torch/NAME:FOLDER`` or
            ``hfds/NAME`` through timm's readers, which download everything first.
        val_fraction: Share of the training images that becomes the validation split.
        seed: Of that split.
        strict: Raise at the first file that can't be read, instead of leaving it out.
        in_chans: 1, 2, 3 or 4; None is 1 for grey images, else 3.

    Raises:
        UserError: No such data, nothing in it, fewer than two classes, or values that are not allowed.
    """
    check_fraction(val_fraction)
    splits = open_source(data)
    what = splits.name if data is None else data
    if splits.train is None:
        raise UserError(f"{what!r} has no train split, so there is nothing to learn from")
    if len(splits.train.class_names) < 2 or len(np.unique(splits.train.labels)) < 2:
        raise UserError(
            f"{what!r} has images of one class only ({abbreviate(splits.train.class_names)}); 2 or more are needed"
        )
    sets = _sets(splits, val_fraction, seed, strict)
    train, val = sets["train"], sets["val"]
    if train is None or val is None:
        raise UserError(f"{what!r} has {len(splits.train)} images, too few to split off a validation split")
    channels = channels_of(train, in_chans)
    pixel_range = set_pixel_range(sets)
    return ClassifySplits(train, val, sets["test"], train.class_names, splits.name, channels, pixel_range=pixel_range)


def open_set(
    data: str | None = None,
    split: str = "auto",
    *,
    class_names: Sequence[str] | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
    strict: bool = False,
) -> ImageDataset:
    """Open one split of a data set for evaluation: broken files are labelled ``IGNORE``, none is replaced.

    Args:
        data: As for :func:`open_splits`.
        split: ``train``, ``val`` and ``test`` are as ``open_splits`` with the same ``val_fraction`` and ``seed``
            makes them, ``all`` is everything; ``auto`` is the test split, else the validation
            split of the data itself, else everything.
        class_names: The model's classes: labels become indices into them.

    Raises:
        UserError: No such data or split, or classes that are not among ``class_names``.
    """
    if split not in SPLIT_CHOICES:
        raise UserError(f"split must be one of {', '.join(SPLIT_CHOICES)}, got {split!r}")
    splits = open_source(data)
    what = splits.name if data is None else data
    if split == "auto":
        if splits.test is not None or splits.test_indices is not None:
            split = "test"
        else:
            split = "all" if splits.val is None else "val"
    if split == "all":
        present = [split for split in (splits.train, splits.val, splits.test) if split is not None]
        if len(present) > 1:
            raise UserError(f"{what!r} comes in splits; choose one of train, val, test as split, got 'all'")
        chosen = _make_set(present[0], None, strict)
    else:
        chosen = _sets(splits, val_fraction, seed, strict)[split]
        if chosen is None:
            raise UserError(f"{what!r} has no {split} split")
    chosen.replace = False
    chosen.split = split
    if class_names is not None:
        _relabel(chosen, class_names, str(what))
    return chosen


def _sets(splits: SourceSplits, val_fraction: float, seed: int, strict: bool) -> dict[str, ImageDataset | None]:
    """The three sets, the validation split split off where there is none."""
    sets: dict[str, ImageDataset | None] = dict.fromkeys(("train", "val", "test"))
    for split, source in (("val", splits.val), ("test", splits.test)):
        if source is not None:
            sets[split] = _make_set(source, None, strict, replace=False)
    if splits.train is None:
        return sets
    rest = np.arange(len(splits.train))
    if splits.test_indices is not None:
        sets["test"] = _make_set(splits.train, splits.test_indices, strict, replace=False)
        rest = np.setdiff1d(rest, splits.test_indices)
    if sets["val"] is None:
        keep, held = split_stratified(splits.train.labels[rest], val_fraction, seed)
        if not len(held) or not len(keep):
            return sets
        sets["val"] = _make_set(splits.train, rest[held], strict, replace=False)
        rest = rest[keep]
    sets["train"] = _make_set(splits.train, rest, strict)
    sets["train"].listed = list(splits.train.broken)
    return sets


def _make_set(source: Source, indices: np.ndarray | None, strict: bool, *, replace: bool = True) -> ImageDataset:
    if strict and source.broken:
        raise UserError(f"{source.broken[0][0]!r} can't be read: {source.broken[0][1]}")
    made = ImageDataset(source, indices, strict=strict, replace=replace)
    if indices is None:
        made.listed = list(source.broken)
    return made


def _relabel(chosen: ImageDataset, class_names: Sequence[str], what: str) -> None:
    """Make labels indices into ``class_names``; raises UserError for classes that are not among them."""
    order, unknown = match_names(chosen.class_names, class_names)
    if unknown:
        raise UserError(
            f"{what!r} has {len(chosen.class_names)} classes, of which the model does not know {abbreviate(unknown)}; "
            f"it knows {len(class_names)}: {abbreviate(class_names)}"
        )
    chosen.labels, chosen.class_names = np.array(order)[chosen.labels], distinct_names(class_names)
