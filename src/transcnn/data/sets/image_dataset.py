"""Labelled images as a dataset: decoded and transformed; files that can't be read are replaced."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..bands import bands_of_image, is_per_channel
from ..images import BrokenImage, read_image
from ..rng import sample_seeds
from ..sources.source import Source, with_progress
from ..transforms.classify import Transform
from .fault_tolerant import FaultTolerantDataset, Sample

__all__ = ["IGNORE", "ImageDataset"]

IGNORE = -1  # the label of what is not to be counted in evaluation: a broken file, or padding between processes;
# where labels are floats, NaN is
CACHE_BYTES = 2 << 30  # decoded images are kept in memory up to this size, each set for itself


class ImageDataset(FaultTolerantDataset):
    """Labelled images as a map-style dataset; ``set[i]`` is (float tensor (C, H, W), label).

    A label is an int, or a float tensor where the source has a row of them for each image.

    ``i`` is an index, or a :class:`~.fault_tolerant.Sample` that also says the epoch, as the loaders send it. Whatever
    ``transform`` draws at random depends on ``seed``, the epoch, the index and how often the epoch has had it only.

    A file that can't be read is recorded in ``broken``. In a training set another sample takes its place (always
    the same one in an epoch); with ``replace=False``, as for evaluation, a black image does, labelled ``IGNORE`` (-1;
    NaN where labels are floats), which must not be counted. ``strict=True`` raises :class:`UserError` at the first one
    instead.

    Args:
        source: Where the images are.
        indices: Which of the source's images are in the set; None is all.
        transform: Must be set before samples are taken, here or as an attribute.
        seed: What random numbers depend on, beside epoch and index.
        strict, replace: What to do about a file that can't be read, see above.

    Attributes:
        labels: One for each image: int64, or rows of float32.
        class_names: In the order of the labels.
        epoch: The epoch that plain indices are taken to be of.
    """

    def __init__(
        self,
        source: Source,
        indices: np.ndarray | None = None,
        *,
        transform: Transform | None = None,
        seed: int = 0,
        strict: bool = False,
        replace: bool = True,
    ) -> None:
        self.indices = np.arange(len(source)) if indices is None else indices
        super().__init__(len(self.indices), strict=strict, replace=replace)
        self.source = source
        self.labels = source.labels[self.indices]
        self.class_names = source.class_names
        self.groups = None if source.groups is None else source.groups[self.indices]
        self.transform = transform
        self.seed = seed
        self.epoch = 0
        self._cache: Tensor | None = None  # (N, C, H, W), what the transform's first step gives
        self._cached_for: object = None

    def name(self, i: int) -> str:
        """The i-th image's file name, or what stands for one."""
        return self.source.name_of(int(self.indices[i]))

    def entry(self, i: int) -> tuple[str, Any, int]:
        """Name, label, and size in bytes (-1 where it isn't known) of the i-th image."""
        size_of = self.source.size_of
        return self.name(i), _plain(self.labels[i]), -1 if size_of is None else size_of(int(self.indices[i]))

    def shares_source(self, other: Any) -> bool:
        """Whether two sets hold images of one source, as where one was split off."""
        return self.source is other.source

    def read(self, i: int) -> tuple[Any, Any, str]:
        """The i-th image as it lies there (mode L, LA, RGB or RGBA, or Bands), its label and its name.

        Raises:
            BrokenImage: It can't be read.
        """
        return self._load(i), self._label(i), self.name(i)

    def _label(self, i: int) -> Any:
        return int(self.labels[i]) if self.labels.ndim == 1 else torch.from_numpy(self.labels[i])

    def _load(self, i: int) -> Any:
        index = int(self.indices[i])
        if self.source.raw is None:
            image = self.source.load(index)
            return bands_of_image(image, self.pixel_range) if is_per_channel(self.pixel_range) else image
        if self.pixel_range is None:
            return self.source.load(index)
        return read_image(self.source.raw(index), self.pixel_range)

    def __getitem__(self, i: int | Sample) -> tuple[Tensor, Any]:
        return self.__getitems__([i])[0]

    def __getitems__(self, wanted: Sequence[int | Sample]) -> list[tuple[Tensor, Any]]:
        """Samples for a whole batch: its last steps are done on all images together."""
        transform = self._need_transform()
        samples = [i if isinstance(i, Sample) else Sample(range(len(self))[i], self.epoch) for i in wanted]
        indices, epochs, repeats = (np.array([getattr(s, key) for s in samples]) for key in ("i", "epoch", "repeats"))
        seeds = sample_seeds(self.seed, epochs, indices, repeats)
        if self._cache is not None and self._cached_for == transform.prepare_key and not self._is_broken.any():
            raw, labels = self._cache[torch.from_numpy(indices)], self.labels[indices]
        else:
            pairs = [self._prepared(i, int(seed)) for i, seed in zip(indices.tolist(), seeds, strict=True)]
            raw, labels = torch.stack([image for image, _ in pairs]), np.array([label for _, label in pairs])
        counts = np.array([s.counts for s in samples])
        labels = np.where(counts if labels.ndim == 1 else counts[:, None], labels, self.ignore)
        plain = labels.tolist() if labels.ndim == 1 else torch.from_numpy(labels.astype(np.float32))
        return list(zip(transform.finish(raw, seeds), plain, strict=True))

    @property
    def ignore(self) -> float:
        """In place of a label: not to be counted."""
        return IGNORE if self.labels.dtype.kind == "i" else math.nan

    def fill_cache(self, limit: int = CACHE_BYTES, *, progress: bool = False) -> bool:
        """Decode all images once and keep them as uint8, if the transform allows it and ``limit`` bytes suffice.

        Returns:
            Whether they are in memory now.
        """
        transform = self._need_transform()
        height, width = transform.size
        size = len(self) * transform.in_chans * height * width * transform.dtype.itemsize
        if not transform.cacheable or size > limit:
            return False
        key = transform.prepare_key
        if self._cache is not None and self._cached_for == key:
            return True
        cache = torch.zeros(len(self), transform.in_chans, height, width, dtype=transform.dtype)
        for i in with_progress(range(len(self)), f"reading {len(self)} images", progress):
            image = self._try(i, 0)
            if image is not None:
                cache[i] = image
        self._cache, self._cached_for = cache, key
        return True

    def _need_transform(self) -> Transform:
        if self.transform is None:
            raise ValueError("the set has no transform: use with_transform(...)")
        return self.transform

    def _prepared(self, i: int, seed: int) -> tuple[Tensor, Any]:
        """uint8 (C, H, W) and label of sample i, or of what takes its place."""
        image = self._try(i, seed)
        if image is not None:
            return image, self.labels[i]
        transform = self._need_transform()
        if not self.replace:
            return torch.zeros(transform.in_chans, *transform.size, dtype=transform.dtype), np.full_like(
                self.labels[i], self.ignore
            )
        for other in self.substitutes(seed):
            image = self._try(other, seed)
            if image is not None:
                return image, self.labels[other]
        raise AssertionError("unreachable: substitutes ends with an error")

    def _try(self, i: int, seed: int) -> Tensor | None:
        """uint8 (C, H, W) of sample i, None if it is broken."""
        if self._is_broken[i]:
            return None
        transform = self._need_transform()
        if self._cache is not None and self._cached_for == transform.prepare_key:
            return self._cache[i]
        try:
            return transform.prepare(self._load(i), seed)
        except BrokenImage as error:
            self.note_broken(i, error)
            return None


def _plain(label: Any) -> Any:
    """A label as JSON holds it: an int, or a list of numbers with None for NaN."""
    if not np.ndim(label):
        return int(label)
    return [None if math.isnan(value) else value for value in label.tolist()]
