"""What all datasets here have in common: files that can't be read don't end a run."""

from __future__ import annotations

import copy
import csv
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from ...errors import UserError
from ...text import csv_cell
from ..bands import PixelRange
from ..images import BrokenImage

__all__ = ["FaultTolerantDataset", "Sample", "write_skipped"]

logger = logging.getLogger(__name__)


class Sample(NamedTuple):
    """What a sampler yields and a dataset is indexed with: the epoch travels with the index to the loader's workers."""

    i: int
    epoch: int
    counts: bool = True  # False: padding that makes processes equally long, not to be counted
    repeats: int = 0  # how often the epoch has had this sample before: it is augmented in another way each time


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
        self.pixel_range: PixelRange | None = None  # see ``images.read_image``
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

    def with_transform(self, transform: Any, *, seed: int = 0, pixel_range: PixelRange | None = None) -> Any:
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


def write_skipped(path: Path, broken: Iterable[tuple[str, str]]) -> None:
    """A CSV file of the files that could not be read: name and reason."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("file", "reason"), *(map(csv_cell, row) for row in broken)])
