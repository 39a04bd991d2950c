"""Splits of a data set whose images have labels as a whole: a class, several labels, numbers."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from ...errors import UserError, require
from ...settings import Table
from ..names import distinct_names
from ..sources.opening import open_source
from ..sources.source import SPLITS, Source, SourceSplits, check_fraction, split_stratified
from ..sources.targets import CLASSES, Targets
from .channels import measure_channels
from .image_dataset import ImageDataset
from .splits import Splits, choose_split, make_splits, split_by_names, split_off

__all__ = ["open_set", "open_splits"]


def open_splits(
    data: str | None = None,
    *,
    val_fraction: float = 0.1,
    seed: int = 0,
    strict: bool = False,
    in_chans: int | None = None,
    table: Table | None = None,
    targets: Targets = CLASSES,
) -> Splits:
    """Open a data set for training.

    What has no validation split gets one, split off from the training split: ``val_fraction`` of each class, the
    same one for the same ``seed``. A test split, if there is one, stays whole. Of the embedded digits the test split
    is always the same fifth.

    Args:
        data: None for the embedded digits; a folder of class folders, or of ``train/`` with ``val/`` or ``test/``
            that hold them; a table of files and labels (.csv, .tsv, .jsonl, .parquet, or a folder's metadata.csv); a
            folder that ``transcnn pack`` wrote; a Parquet file or a folder of them; the URL of
            either (``https://...``, ``s3://...``, ``hf://datasets/OWNER/NAME``), whose files are fetched as they are
            needed; other WebDataset shards on a local disk as ``wds/PATH/{000..015}.tar``; ``torch/NAME:FOLDER`` or
            ``hfds/NAME`` through timm's readers, which download everything first.
        val_fraction: Share of the training images that becomes the validation split.
        seed: Of that split.
        strict: Raise at the first file that can't be read, instead of leaving it out.
        in_chans: Channels of the images; None is what :func:`~.channels.measure_channels` finds.
        table: Which columns of a table are what.
        targets: What labels are made into.

    Raises:
        UserError: No such data, nothing in it, fewer than two classes, or values that are not allowed.
    """
    check_fraction(val_fraction)
    splits = open_source(data, table, targets)
    what = splits.name if data is None else data
    if splits.train is None:
        raise UserError(f"{what!r} has no train split, so there is nothing to learn from")
    targets.check(splits.train.labels, splits.train.class_names, repr(what))
    present = _present(splits)
    hold_back = partial(_hold_back, present, targets, val_fraction, seed)
    sets = make_splits(present, partial(_make_set, present, strict), hold_back)
    train, val = sets["train"], sets["val"]
    if train is None or val is None:
        raise UserError(f"{what!r} has {len(splits.train)} images, too few to split off a validation split")
    channels = measure_channels(sets, in_chans)
    return Splits(train, val, sets["test"], train.class_names, splits.name, channels)


def open_set(
    data: str | None = None,
    split: str = "auto",
    *,
    class_names: Sequence[str] | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
    strict: bool = False,
    held: Collection[str] | None = None,
    table: Table | None = None,
    targets: Targets = CLASSES,
) -> ImageDataset:
    """Open one split of a data set for evaluation: broken files are labelled ``IGNORE``, none is replaced.

    Args:
        data: As for :func:`open_splits`.
        split: ``train``, ``val`` and ``test`` are as ``open_splits`` with the same ``val_fraction`` and ``seed``
            makes them, ``all`` is everything; ``auto`` is the test split, else the validation
            split of the data itself, else everything.
        class_names: The model's classes: labels become indices into them.
        held: Names of images that a run held back: they are ``val``, instead of what ``val_fraction`` and ``seed`` draw
            from what the data is now.
        table, targets: As for :func:`open_splits`.

    Raises:
        UserError: No such data or split, or classes that are not among ``class_names``.
    """
    splits = open_source(data, table, targets)
    what = splits.name if data is None else data
    present = _present(splits)
    if split == "all" and splits.train is not None and splits.test_indices is not None:  # split by convention alone
        present = {"": (splits.train, None)}
    make = partial(_make_set, present, strict)
    hold_back = partial(_hold_back, present, targets, val_fraction, seed, held=held)
    chosen = choose_split(str(what), present, make, split, hold_back)
    if class_names is not None:
        chosen.labels = targets.relabelled(chosen.labels, chosen.class_names, class_names, repr(what))
        chosen.class_names = distinct_names(class_names)
    return chosen


def _present(splits: SourceSplits) -> dict[str, tuple[Source, np.ndarray | None]]:
    """Each split's source, and which of its images are in the split (None: all); ``""`` is data that isn't split."""
    found: dict[str, tuple[Source, np.ndarray | None]] = {
        split: (source, None) for split in SPLITS if (source := getattr(splits, split)) is not None
    }
    if splits.train is not None and splits.test_indices is not None:
        rest = np.setdiff1d(np.arange(len(splits.train)), splits.test_indices)
        found |= {"train": (splits.train, rest), "test": (splits.train, splits.test_indices)}
    return found


def _make_set(
    present: Mapping[str, tuple[Source, np.ndarray | None]],
    strict: bool,
    split: str,
    indices: np.ndarray | None,
    *,
    replace: bool,
) -> ImageDataset:
    source, members = present[split]
    if strict and source.broken:
        raise UserError(f"{source.broken[0][0]!r} can't be read: {source.broken[0][1]}")
    if members is not None:
        indices = members if indices is None else members[indices]
    made = ImageDataset(source, indices, strict=strict, replace=replace)
    made.listed = list(source.broken)
    return made


def _hold_back(
    present: Mapping[str, tuple[Source, np.ndarray | None]],
    targets: Targets,
    fraction: float,
    seed: int,
    split: str,
    held: Collection[str] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    source, members = present[split]
    indices = range(len(source)) if members is None else members.tolist()
    if held and (named := split_by_names([source.name_of(i) for i in indices], held)):
        return named
    labels = source.labels if members is None else source.labels[members]
    if source.together is not None:
        groups = source.together if members is None else source.together[members]
        return _split_groups(groups, targets.strata(labels), fraction, seed)
    strata = targets.strata(labels)
    return split_off(len(labels), fraction, seed) if strata is None else split_stratified(strata, fraction, seed)


def _split_groups(
    groups: np.ndarray, strata: np.ndarray | None, fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the rest and of about a ``fraction``, no group in both; shares of the strata as alike as can be."""
    if (count := len(np.unique(groups))) < 2:
        raise UserError("all images are of one group, so none can be held back without it; give --group another column")
    strata = np.zeros(len(groups), np.int64) if strata is None else strata
    folds = max(2, min(round(1 / fraction), count, int(np.unique(strata, return_counts=True)[1].max())))
    kind: Any = require("sklearn.model_selection", "train").StratifiedGroupKFold
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes with fewer members than folds
        return next(iter(kind(folds, shuffle=True, random_state=seed).split(groups, strata, groups)))
