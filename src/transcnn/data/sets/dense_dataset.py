"""Images with a dense ground truth (a label map, boxes) as a dataset, for segmentation and detection."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import Tensor
from torch.utils.data import default_collate

from ..bands import PixelRange
from ..images import BrokenImage
from ..rng import sample_seeds
from .fault_tolerant import FaultTolerantDataset, Sample

__all__ = ["DenseDataset", "DenseSource", "DenseTransform"]


@dataclass
class DenseSource:
    """Images with their truths, read one by one.

    Attributes:
        names: Of the images, for reports.
        load: (Index, pixel_range of ``read_image``) -> (decoded image, truth); raises BrokenImage. What a truth is, the
            task knows.
        entry: Index -> (what is equal for equal truths, the image's size in bytes), without decoding either.
        broken: (name, reason) of what was found but makes no sample: an image without a label map, for instance.
        raw: Index -> the image's bytes as they lie there, where there are any; raises BrokenImage.
    """

    names: list[str]
    load: Callable[[int, PixelRange | None], tuple[Any, Any]]
    entry: Callable[[int], tuple[str, int]]
    broken: list[tuple[str, str]] = field(default_factory=list)
    raw: Callable[[int], bytes] | None = None

    def __len__(self) -> int:
        return len(self.names)


class DenseTransform(Protocol):
    """An image and its truth to tensors.

    Attributes:
        stacks: Whether all results are of one size, so that a batch of them is one tensor.
    """

    stacks: bool

    def __call__(self, image: Any, truth: Any, seed: int) -> tuple[Tensor, Any]:
        """What the task's batches hold for one sample; random draws follow from ``seed`` alone."""
        ...

    def blank(self) -> tuple[Tensor, Any]:
        """What stands for a sample that is not to be counted."""
        ...


class DenseDataset(FaultTolerantDataset):
    """Images with truths; ``set[i]`` is what ``transform`` makes of sample i.

    ``i`` is an index, or a :class:`~.fault_tolerant.Sample` that also says the epoch. Random numbers depend on
    ``seed``, the epoch and the index only. For files that can't be read see
    :class:`~.fault_tolerant.FaultTolerantDataset`.
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

    def name(self, i: int) -> str:
        """The i-th image's file name."""
        return self.source.names[int(self.indices[i])]

    def entry(self, i: int) -> tuple[str, Any, int]:
        """Name, what is equal for equal truths, and size in bytes (-1 where it isn't known) of the i-th image."""
        return self.name(i), *self.source.entry(int(self.indices[i]))

    def shares_source(self, other: Any) -> bool:
        """Whether two sets hold images of one source, as where one was split off."""
        return self.source.names == other.source.names

    def read(self, i: int) -> tuple[Any, Any]:
        """The i-th image and its truth as they lie there; raises BrokenImage."""
        return self.source.load(int(self.indices[i]), self.pixel_range)

    def __getitem__(self, i: int | Sample) -> tuple[Tensor, Any]:
        sample = i if isinstance(i, Sample) else Sample(range(len(self))[i], self.epoch)
        if not sample.counts:
            return self.transform.blank()
        seed = int(sample_seeds(self.seed, sample.epoch, [sample.i], sample.repeats)[0])
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

    def _try(self, i: int, seed: int) -> tuple[Tensor, Any] | None:
        """Sample i, None if it is broken."""
        if self._is_broken[i]:
            return None
        try:
            return self.transform(*self.read(i), seed)
        except BrokenImage as error:
            self.note_broken(i, error)
            return None
