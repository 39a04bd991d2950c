"""What all datasets here have in common: files that can't be read don't end a run."""

from __future__ import annotations

import copy
import csv
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ...errors import UserError
from ...text import csv_cell
from ..images import BrokenImage, to_channels

__all__ = ["FaultTolerantDataset", "Sample", "channels_of", "set_pixel_range", "write_skipped"]

logger = logging.getLogger(__name__)


class Sample(NamedTuple):
    """What a sampler yields and a dataset is indexed with: the epoch travels with the index to the loader's workers."""

    i: int
    epoch: int
    counts: bool = True  # False: padding that makes processes equally long, not to be counted


class FaultTolerantDataset(Dataset):
    """A map-style dataset that keeps account of the samples that can't be read.

    A sample that can't be read is recorded in ``broken``. In a training set another takes its place (always the same
    one in an epoch); with ``replace=False``, as for evaluation, a blank one does, which isn't scored.
    ``strict=True`` raises :class:`UserError` at the first one instead. A subclass has ``name(i)``, and ``read(i)``,
    which raises BrokenImage.
    """

    def __init__(self, length: int, *, strict: bool = False, replace: bool = True) -> None:
        self.seed = 0
        self.strict = strict
        self.replace = replace
        self.transform: Any = None  # see with_transform
        self.pixel_range: Sequence[float] | None = None  # see ``images.read_image``
        self.groups: np.ndarray | None = None  # for each sample the file that it lies in, where these are slow to get
        self.split = ""  # the split of the data that it is, where it was opened as one
        self.listed: list[tuple[str, str]] = []  # files without a sample that were found broken when listing
        # Loader workers are processes of their own: this memory is shared, a list would stay theirs.
        self._is_broken = torch.zeros(length, dtype=torch.uint8).share_memory_()
        self._reasons: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._is_broken)

    def name(self, i: int) -> str:
        """The i-th sample's file name, or what stands for one."""
        raise NotImplementedError

    def read(self, i: int) -> Any:
        """The i-th sample as it lies there; raises BrokenImage."""
        raise NotImplementedError

    def entry(self, i: int) -> tuple[str, Any, int]:
        """Name, label (or what stands for it) and size in bytes of the i-th sample, by which changes are noticed."""
        raise NotImplementedError

    def shares_source(self, other: Any) -> bool:
        """Whether two sets hold samples of one source, as where one was split off."""
        raise NotImplementedError

    def with_indices(self, indices: Sequence[int]) -> Any:
        """The same with other samples of its source."""
        chosen = np.array(indices, dtype=np.int64)
        made = type(self)(self.source, chosen, seed=self.seed, strict=self.strict, replace=self.replace)  # pyright: ignore
        for name in ("transform", "pixel_range", "listed", "split"):
            setattr(made, name, getattr(self, name))
        return made

    def with_transform(self, transform: Any, *, seed: int = 0, pixel_range: Sequence[float] | None = None) -> Any:
        """The same samples by another transform; a file that can't be read is on the account of both."""
        made = copy.copy(self)
        made.transform, made.seed, made.pixel_range = transform, seed, pixel_range
        return made

    def fill_cache(self, limit: int = 0, *, progress: bool = False) -> bool:
        """Decode all samples once and keep them, where ``limit`` bytes suffice; whether they are in memory now."""
        return False

    @property
    def broken(self) -> list[tuple[str, str]]:
        """(name, reason) of each file that could not be read so far, by this process and its loader's workers."""
        for i in torch.nonzero(self._is_broken).flatten().tolist():
            if i not in self._reasons:  # a worker met it; what was wrong is found out by trying again
                try:
                    self.read(i)
                    self._reasons[i] = "could be read at a second try only"
                except BrokenImage as error:
                    self._reasons[i] = str(error)
        return [*self.listed, *((self.name(i), self._reasons[i]) for i in sorted(self._reasons))]

    def note_broken(self, i: int, error: BrokenImage) -> None:
        """Record sample i as broken; with ``strict`` raise."""
        if self.strict:
            raise UserError(f"{self.name(i)!r} can't be read: {error}") from error
        self._is_broken[i] = 1
        self._reasons[i] = str(error)
        logger.debug("%s is left out: %s", self.name(i), error)

    def substitutes(self, seed: int) -> Iterator[int]:
        """Samples that may take the place of a broken one, in an order that ``seed`` gives.

        Raises:
            UserError: All were asked for and none would do.
        """
        yield from np.random.default_rng(seed).permutation(len(self)).tolist()
        name, reason = self.broken[0]
        raise UserError(f"none of the {len(self)} images can be read; the first is {name!r}: {reason}")


def channels_of(images: FaultTolerantDataset, in_chans: int | None = None) -> int:
    """``in_chans``, which must be from 1 to 4; without it 1 if up to 16 images are grey (transparent or not), else 3.

    They are from all over the set, but of one file where files are slow to get.
    """
    if in_chans is not None:
        to_channels(Image.new("L", (1, 1)), in_chans)  # refuses what is not 1 to 4
        return in_chans
    modes = set()
    for i in _spread(images, 16):
        with suppress(BrokenImage):
            modes.add(images.read(i)[0].mode)
    return 1 if modes and modes <= {"L", "LA"} else 3


def pixel_range_of(images: FaultTolerantDataset) -> tuple[float, float] | None:
    """Which values are black and white in a set's images of more than 8 bits, by up to 16 images from all over it.

    The smallest of the common ranges (8, 10, 12, 14 or 16 bits; 0 to 1 for floats) that holds their values, or holds
    them but for a tenth beyond its end; None where the dtype's own range is right, or all images are of 8 bits.
    """
    found = []
    for i in _spread(images, 16):
        with suppress(BrokenImage):
            found.append(images.read(i)[0].info.get("values"))
    values = [entry for entry in found if entry is not None]
    kinds = {kind == "f" for kind, _, _ in values}
    if len(kinds) != 1 or len(values) < len(found):
        return None
    low, high = min(entry[1] for entry in values), max(entry[2] for entry in values)
    own, common = (1, (1, 255, 65535)) if kinds == {True} else (65535, (255, 1023, 4095, 16383, 65535))
    if low < 0:
        return low, high
    top = next((float(top) for top in common if high <= 1.1 * top), high)
    return None if top == own else (0.0, top)


def set_pixel_range(sets: Mapping[str, FaultTolerantDataset | None]) -> tuple[float, float] | None:
    """Have all splits read with the range that the training split has, and return it."""
    train = sets["train"]
    # Files at a URL aren't fetched for this: of these the dtype decides.
    found = None if train is None or train.groups is not None else pixel_range_of(train)
    for images in sets.values():
        if images is not None:
            images.pixel_range = found
    return found


def _spread(images: FaultTolerantDataset, count: int) -> list[int]:
    """Up to ``count`` indices from all over a set, but of one file where files are slow to get."""
    groups = images.groups
    indices = np.arange(len(images)) if groups is None else np.flatnonzero(groups == groups[0])
    return indices[np.linspace(0, len(indices) - 1, min(count, len(indices))).astype(int)].tolist()


def write_skipped(path: Path, broken: Iterable[tuple[str, str]]) -> None:
    """A CSV file of the files that could not be read: name and reason."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("file", "reason"), *(map(csv_cell, row) for row in broken)])
