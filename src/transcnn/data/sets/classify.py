"""Splits of a data set for classification."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from ...errors import UserError
from ..names import distinct_names, match_names
from ..sources.opening import open_source
from ..sources.source import SPLITS, Source, SourceSplits, abbreviate, check_fraction, split_stratified
from .fault_tolerant import channels_of, set_pixel_range
from .image_dataset import ImageDataset
from .splits import Splits, choose_split, make_splits

__all__ = ["open_set", "open_splits"]


def open_splits(
    data: str | None = None,
    *,
    val_fraction: float = 0.1,
    seed: int = 0,
    strict: bool = False,
    in_chans: int | None = None,
) -> Splits:
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
    present = _present(splits)
    sets = make_splits(present, partial(_make_set, present, strict), partial(_hold_back, present, val_fraction, seed))
    train, val = sets["train"], sets["val"]
    if train is None or val is None:
        raise UserError(f"{what!r} has {len(splits.train)} images, too few to split off a validation split")
    channels = channels_of(train, in_chans)
    pixel_range = set_pixel_range(sets)
    return Splits(train, val, sets["test"], train.class_names, splits.name, channels, pixel_range=pixel_range)


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
    splits = open_source(data)
    what = splits.name if data is None else data
    present = _present(splits)
    if split == "all" and splits.train is not None and splits.test_indices is not None:  # split by convention alone
        present = {"": (splits.train, None)}
    make, hold_back = partial(_make_set, present, strict), partial(_hold_back, present, val_fraction, seed)
    chosen = choose_split(str(what), present, make, split, hold_back)
    if class_names is not None:
        _relabel(chosen, class_names, str(what))
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
    present: Mapping[str, tuple[Source, np.ndarray | None]], fraction: float, seed: int, split: str
) -> tuple[np.ndarray, np.ndarray]:
    source, members = present[split]
    return split_stratified(source.labels if members is None else source.labels[members], fraction, seed)


def _relabel(chosen: ImageDataset, class_names: Sequence[str], what: str) -> None:
    """Make labels indices into ``class_names``; raises UserError for classes that are not among them."""
    order, unknown = match_names(chosen.class_names, class_names)
    if unknown:
        raise UserError(
            f"{what!r} has {len(chosen.class_names)} classes, of which the model does not know {abbreviate(unknown)}; "
            f"it knows {len(class_names)}: {abbreviate(class_names)}"
        )
    chosen.labels, chosen.class_names = np.array(order)[chosen.labels], distinct_names(class_names)
