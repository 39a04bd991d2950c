"""The splits of a data set: those that it has, and a validation split held back where it has none."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...errors import UserError
from ..bands import PixelRange
from .channels import Channels

__all__ = ["Splits", "choose_split", "hold_back", "make_splits", "split_by_names", "split_off"]

logger = logging.getLogger(__name__)

CHOICES = ("auto", "train", "val", "test", "all")
MakeSet = Callable[..., Any]  # (split, indices within it or None for all, replace=...) -> the set
HoldBack = Callable[[str], tuple[np.ndarray, np.ndarray]]  # split -> indices within it to keep, and to hold back


@dataclass
class Splits:
    """The splits of one data set, as :class:`~.fault_tolerant.FaultTolerantDataset`.

    Attributes:
        train, val: What is learnt from, and what the best model is chosen by.
        test: What only the final figure is measured on; None where the data has no such split.
        class_names: In the order of the labels.
        name: A short name for run directories.
        channels: How many channels images have, and what these hold.
        task_args: What the task needs to know of the data.
    """

    train: Any
    val: Any
    test: Any
    class_names: list[str]
    name: str
    channels: Channels
    task_args: dict[str, Any] = field(default_factory=dict)

    @property
    def in_chans(self) -> int:
        """Channels of the images."""
        return self.channels.count

    @property
    def pixel_range(self) -> PixelRange | None:
        """Values that are black and white, see ``images.read_image``."""
        return self.channels.pixel_range

    def read_as(self, channels: Channels) -> None:
        """Have all splits read as another data set, or this one at another time, was measured."""
        self.channels = channels
        for split in (self.train, self.val, self.test):
            if split is not None:
                split.pixel_range = channels.pixel_range

    @property
    def broken(self) -> list[tuple[str, str]]:
        """(name, reason) of every file that could not be used so far, in all splits."""
        return [entry for split in (self.train, self.val, self.test) if split is not None for entry in split.broken]


def make_splits(present: Mapping[str, Any], make: MakeSet, hold_back: HoldBack) -> dict[str, Any]:
    """``train``, ``val`` and ``test`` (None where there is none) of what a data set holds by split.

    ``""`` is what lies in no split. Where there is no validation split, training images are held back for it.
    """
    sets: dict[str, Any] = dict.fromkeys(("train", "val", "test"))
    for split in ("val", "test"):
        if present.get(split):
            sets[split] = make(split, None, replace=False)
    whole = "train" if present.get("train") else ""
    if whole and present.get(""):
        logger.warning("%s images lie in none of the splits that there are, and are left out", f"{len(present['']):,}")
    if not present.get(whole):
        return sets
    rest = None
    if sets["val"] is None:
        rest, held = hold_back(whole)
        if not len(held) or not len(rest):
            return sets
        sets["val"] = make(whole, held, replace=False)
        sets["val"].listed = []  # the training split lists what can't be read
    sets["train"] = make(whole, rest, replace=True)
    return sets


def choose_split(what: str, present: Mapping[str, Any], make: MakeSet, split: str, hold_back: HoldBack) -> Any:
    """One split for evaluation: ``auto`` is the test split, else the validation split of the data itself, else ``all``.

    Raises:
        UserError: No such split, or ``all`` of data in several.
    """
    if split not in CHOICES:
        raise UserError(f"split must be one of {', '.join(CHOICES)}, got {split!r}")
    if split == "auto":
        split = next((name for name in ("test", "val") if present.get(name)), "all")
    if split == "all":
        if len(present) > 1:
            raise UserError(f"{what!r} comes in splits; choose one of {', '.join(present)} as split, got 'all'")
        chosen = make(next(iter(present)), None, replace=False)
    else:
        chosen = make_splits(present, make, hold_back)[split]
    if chosen is None:
        raise UserError(f"{what!r} has no {split} split")
    chosen.replace = False
    chosen.split = split
    return chosen


def hold_back(
    names: Sequence[str], fraction: float, seed: int, held: Collection[str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the rest and of what is held back: the images of the names ``held``, else a ``fraction`` by chance."""
    return split_by_names(names, held) or split_off(len(names), fraction, seed)


def split_by_names(names: Sequence[str], held: Collection[str] | None) -> tuple[np.ndarray, np.ndarray] | None:
    """Indices of the rest and of the images of the names ``held``; None where there are no such names."""
    among = np.array([name in held for name in names], bool) if held else np.zeros(0, bool)
    return (np.flatnonzero(~among), np.flatnonzero(among)) if among.any() else None


def split_off(count: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the rest and of a ``fraction``, at least one of each where there are two or more."""
    order = np.random.default_rng(seed).permutation(count)
    held = min(max(1, round(fraction * count)), count - 1) if count > 1 else 0
    return np.sort(order[held:]), np.sort(order[:held])
