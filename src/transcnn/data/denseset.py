"""Images with a truth for each place in them (a label map, boxes) as a dataset, for segmentation and detection."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from ..errors import UserError
from .images import BrokenImage
from .randomness import sample_seeds
from .sampling import Sample
from .tolerant import Tolerant

__all__ = ["DenseSet", "DenseSource", "DenseSplits", "DenseTransform", "choose_part", "part_sets"]


@dataclass
class DenseSource:
    """Images with their truths, read one by one.

    Attributes:
        names: Of the images, for reports.
        load: Index -> (decoded image, truth); raises BrokenImage. What a truth is, the task knows.
        broken: (name, reason) of what was found but makes no sample: an image without a label map, for instance.
    """

    names: list[str]
    load: Callable[[int], tuple[Image.Image, Any]]
    broken: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.names)


class DenseTransform(Protocol):
    """An image and its truth to tensors.

    Attributes:
        stacks: Whether all results are of one size, so that a batch of them is one tensor.
    """

    stacks: bool

    def __call__(self, image: Image.Image, truth: Any, seed: int) -> tuple[Tensor, Any]:
        """What the task's batches hold for one sample; random draws follow from ``seed`` alone."""
        ...

    def blank(self) -> tuple[Tensor, Any]:
        """What stands for a sample that is not to be counted."""
        ...


class DenseSet(Tolerant):
    """Images with truths; ``set[i]`` is what ``transform`` makes of sample i.

    ``i`` is an index, or a :class:`~.sampling.Sample` that also says the epoch. Random draws depend on ``seed``, the
    epoch and the index only. See :class:`~.tolerant.Tolerant` for files that can't be read.
    """

    def __init__(
        self,
        source: DenseSource,
        indices: np.ndarray | None = None,
        *,
        seed: int = 0,
        strict: bool = False,
        replace: bool = True,
    ) -> None:
        self.indices = np.arange(len(source)) if indices is None else indices
        super().__init__(len(self.indices), strict=strict, replace=replace)
        self.source = source
        self.seed = seed
        self.epoch = 0
        self.transform: Any = None  # a DenseTransform, set before samples are taken

    def name(self, i: int) -> str:
        """The i-th image's file name."""
        return self.source.names[int(self.indices[i])]

    def read(self, i: int) -> tuple[Image.Image, Any]:
        """The i-th image and its truth as they lie there; raises BrokenImage."""
        return self.source.load(int(self.indices[i]))

    def __getitem__(self, i: int | Sample) -> tuple[Tensor, Any]:
        sample = i if isinstance(i, Sample) else Sample(range(len(self))[i], self.epoch)
        if not sample.counts:
            return self.transform.blank()
        seed = int(sample_seeds(self.seed, sample.epoch, [sample.i])[0])
        made = self._try(sample.i, seed)
        if made is not None:
            return made
        if not self.replace:
            return self.transform.blank()
        for other in self.substitutes(seed):
            made = self._try(other, seed)
            if made is not None:
                return made
        raise AssertionError("unreachable: substitutes ends with an error")

    def collate(self, samples: Sequence[tuple[Tensor, Any]]) -> Any:
        """A batch: tensors where all samples are of one size, else lists."""
        if self.transform.stacks:
            return default_collate(list(samples))
        return [list(column) for column in zip(*samples, strict=True)]

    def fill_cache(self, limit: int = 0, *, progress: bool = False) -> bool:
        """Nothing is kept in memory: training looks at another part of an image each time."""
        return False

    def _try(self, i: int, seed: int) -> tuple[Tensor, Any] | None:
        """Sample i, None if it is broken."""
        if self._is_broken[i]:
            return None
        try:
            return self.transform(*self.read(i), seed)
        except BrokenImage as error:
            self.note_broken(i, error)
            return None


@dataclass
class DenseSplits:
    """The parts of one data set; as :class:`~.classify.ClassifySplits`, with ``task_args`` for what the task needs."""

    train: DenseSet
    val: DenseSet
    test: DenseSet | None
    class_names: list[str]
    name: str
    in_chans: int
    task_args: dict[str, Any] = field(default_factory=dict)

    @property
    def broken(self) -> list[tuple[str, str]]:
        """(name, reason) of every file that could not be used so far, in all parts."""
        return [entry for part in (self.train, self.val, self.test) if part is not None for entry in part.broken]


MakeSet = Callable[..., DenseSet]  # (part, indices or None, replace=...) -> the set


def part_sets(parts: Mapping[str, Sized], make: MakeSet, val_fraction: float, seed: int) -> dict[str, DenseSet | None]:
    """``train``, ``val`` and ``test`` of what a data set holds by part; ``""`` is what lies in no part.

    Where there is no validation part a share of the training images is held back for it.
    """
    sets: dict[str, DenseSet | None] = dict.fromkeys(("train", "val", "test"))
    for part in ("val", "test"):
        if parts.get(part):
            sets[part] = make(part, None, replace=False)
    whole = "train" if parts.get("train") else ""
    if not parts.get(whole):
        return sets
    rest = np.arange(len(parts[whole]))
    if sets["val"] is None:
        rest, held = split_off(len(rest), val_fraction, seed)
        if not len(held):
            return sets
        sets["val"] = make(whole, held, replace=False)
        sets["val"].listed = []  # the training part lists them
    sets["train"] = make(whole, rest, replace=True)
    return sets


def choose_part(
    data: str | None, parts: Mapping[str, Sized], make: MakeSet, split: str, val_fraction: float, seed: int
) -> DenseSet:
    """One part for evaluation: ``auto`` is the test part, else the validation part, else everything.

    Raises:
        UserError: No such part.
    """
    choices = ("auto", "train", "val", "test", "all")
    if split not in choices:
        raise UserError(f"split must be one of {', '.join(choices)}, got {split!r}")
    if split == "auto":
        split = next((part for part in ("test", "val") if parts.get(part)), "all")
    if split == "all" and "" not in parts:
        raise UserError(f"{data!r} comes in parts; choose one of {', '.join(parts)} as split, got 'all'")
    chosen = make("", None, replace=False) if split == "all" else part_sets(parts, make, val_fraction, seed)[split]
    if chosen is None:
        raise UserError(f"{data!r} has no {split} part")
    chosen.replace = False
    chosen.split = split
    return chosen


def split_off(count: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the rest and of a ``fraction``, at least one of each where there are two or more."""
    order = np.random.default_rng(seed).permutation(count)
    held = min(max(1, round(fraction * count)), count - 1) if count > 1 else 0
    return np.sort(order[held:]), np.sort(order[:held])
