"""Data for classification: the sets, their transforms, and loaders that give the same data however they are asked.

    splits = open_splits("folder")                              # what is read
    data = ClassifyData(splits, train_transform(224), eval_transform(224), batch_size=128, num_workers=8)
    trainer.fit(task, data)

:mod:`.opening` finds images, :mod:`.imageset` reads them, :mod:`.augment` turns them into tensors, :mod:`.sampling`
orders them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import numpy as np
import torch

from ..errors import UserError
from .augment import Transform, eval_transform, train_transform
from .imageset import CACHE_BYTES, IGNORE, ImageSet
from .opening import open_parts
from .sampling import EpochSampler, Loader
from .sources import Parts, Source, check_fraction, few, split_stratified
from .tolerant import channels_of

__all__ = [
    "IGNORE",
    "ClassifyData",
    "ClassifySplits",
    "ImageSet",
    "eval_transform",
    "open_set",
    "open_splits",
    "train_transform",
]

SPLITS = ("auto", "train", "val", "test", "all")


@dataclass
class ClassifySplits:
    """The parts of one data set.

    Attributes:
        train, val: What is learnt from, and what the best model is chosen by.
        test: What only the final figure is measured on; None where the data has no such part.
        class_names: In the order of the labels.
        name: A short name for run directories.
        in_chans: Channels of the images: as asked for, else 1 if a sample of them is all grey, else 3.
    """

    train: ImageSet
    val: ImageSet
    test: ImageSet | None
    class_names: list[str]
    name: str
    in_chans: int
    task_args: dict[str, Any] = field(default_factory=dict)  # nothing: labels are all that a classifier needs

    @property
    def broken(self) -> list[tuple[str, str]]:
        """(name, reason) of every file that could not be read so far, in all parts."""
        return [entry for part in (self.train, self.val, self.test) if part is not None for entry in part.broken]


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

    What has no validation part gets one, split off from the training part: ``val_fraction`` of each class, the
    same one for the same ``seed``. A test part, if there is one, stays whole. Of the embedded digits the test part
    is always the same fifth.

    Args:
        data: None for the embedded digits; a folder of class folders, or of ``train/`` with ``val/`` or ``test/``
            that hold them; a folder that ``transcnn pack`` wrote; a Parquet file or a folder of them; the URL of
            either (``https://...``, ``s3://...``, ``hf://datasets/OWNER/NAME``), whose files are fetched as they are
            needed; other WebDataset shards on a local disk as ``wds/PATH/{000..015}.tar``; ``torch/NAME:FOLDER`` or
            ``hfds/NAME`` through timm's readers, which download everything first.
        val_fraction: Share of the training images that becomes the validation part.
        seed: Of that split.
        strict: Raise at the first file that can't be read, instead of leaving it out.
        in_chans: 1, 2, 3 or 4; None is 1 for grey images, else 3.

    Raises:
        UserError: No such data, nothing in it, fewer than two classes, or values that are not allowed.
    """
    check_fraction(val_fraction)
    parts = open_parts(data)
    what = parts.name if data is None else data
    if parts.train is None:
        raise UserError(f"{what!r} has no train part, so there is nothing to learn from")
    if len(parts.train.class_names) < 2 or len(np.unique(parts.train.labels)) < 2:
        raise UserError(f"{what!r} has images of one class only ({few(parts.train.class_names)}); 2 or more are needed")
    sets = _sets(parts, val_fraction, seed, strict)
    train, val = sets["train"], sets["val"]
    if train is None or val is None:
        raise UserError(f"{what!r} has {len(parts.train)} images, too few to split off a validation part")
    channels = channels_of(train, in_chans)
    return ClassifySplits(train, val, sets["test"], train.class_names, parts.name, channels)


def open_set(
    data: str | None = None,
    split: str = "auto",
    *,
    class_names: Sequence[str] | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
    strict: bool = False,
) -> ImageSet:
    """Open one part of a data set for evaluation: broken files are labelled ``IGNORE``, none is replaced.

    Args:
        data: As for :func:`open_splits`.
        split: ``train``, ``val`` and ``test`` are as ``open_splits`` with the same ``val_fraction`` and ``seed``
            makes them, ``all`` is everything; ``auto`` is the test part, else the validation part that lies there, else
            everything.
        class_names: The model's classes: labels become indices into them.

    Raises:
        UserError: No such data or part, or classes that are not among ``class_names``.
    """
    if split not in SPLITS:
        raise UserError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    parts = open_parts(data)
    what = parts.name if data is None else data
    if split == "auto":
        if parts.test is not None or parts.test_indices is not None:
            split = "test"
        else:
            split = "all" if parts.val is None else "val"
    if split == "all":
        present = [part for part in (parts.train, parts.val, parts.test) if part is not None]
        if len(present) > 1:
            raise UserError(f"{what!r} comes in parts; choose one of train, val, test as split, got 'all'")
        chosen = _make_set(present[0], None, strict)
    else:
        chosen = _sets(parts, val_fraction, seed, strict)[split]
        if chosen is None:
            raise UserError(f"{what!r} has no {split} part")
    chosen.replace = False
    chosen.split = split
    if class_names is not None:
        _relabel(chosen, list(class_names), str(what))
    return chosen


def _sets(parts: Parts, val_fraction: float, seed: int, strict: bool) -> dict[str, ImageSet | None]:
    """The three sets, the validation part split off where there is none."""
    sets: dict[str, ImageSet | None] = dict.fromkeys(("train", "val", "test"))
    for part, source in (("val", parts.val), ("test", parts.test)):
        if source is not None:
            sets[part] = _make_set(source, None, strict, replace=False)
    if parts.train is None:
        return sets
    rest = np.arange(len(parts.train))
    if parts.test_indices is not None:
        sets["test"] = _make_set(parts.train, parts.test_indices, strict, replace=False)
        rest = np.setdiff1d(rest, parts.test_indices)
    if sets["val"] is None:
        keep, held = split_stratified(parts.train.labels[rest], val_fraction, seed)
        if not len(held) or not len(keep):
            return sets
        sets["val"] = _make_set(parts.train, rest[held], strict, replace=False)
        rest = rest[keep]
    sets["train"] = _make_set(parts.train, rest, strict)
    sets["train"].listed = list(parts.train.broken)
    return sets


def _make_set(source: Source, indices: np.ndarray | None, strict: bool, *, replace: bool = True) -> ImageSet:
    if strict and source.broken:
        raise UserError(f"{source.broken[0][0]!r} can't be read: {source.broken[0][1]}")
    made = ImageSet(source, indices, strict=strict, replace=replace)
    if indices is None:
        made.listed = list(source.broken)
    return made


def _relabel(chosen: ImageSet, class_names: list[str], what: str) -> None:
    """Give labels the meaning that ``class_names`` has, by name; numbered classes go by number."""
    if chosen.class_names == class_names:
        return
    unnamed = chosen.class_names == [str(i) for i in range(len(chosen.class_names))]
    unknown = [name for name in chosen.class_names if name not in class_names]
    if unknown and not (unnamed and len(chosen.class_names) <= len(class_names)):
        raise UserError(
            f"{what!r} has {len(chosen.class_names)} classes, of which the model does not know {few(unknown)}; "
            f"it knows {len(class_names)}: {few(class_names)}"
        )
    if unknown:
        order = np.arange(len(chosen.class_names))
    else:
        order = np.array([class_names.index(name) for name in chosen.class_names])
    chosen.labels, chosen.class_names = order[chosen.labels], class_names


# --- loaders --------------------------------------------------------------------------------------------------------


class ClassifyData(L.LightningDataModule):
    """Loaders of ``(images, labels)`` batches over the parts of a data set.

    Batches are the same for the same (seed, epoch) whatever the number of workers; ``batch_size`` is that of one
    process, and R processes together see in each step what one process with R times the batch size sees. Training
    batches are full ones, unless the set is smaller than one. In evaluation every image is given once; labels below
    0 (``IGNORE``: broken files, padding between processes) are not to be counted.

    The training loader can stop and go on anywhere: Lightning stores and restores its place by itself, and
    ``fast_forward(epoch, batch)`` sets it by hand, without the images before it being read.

    Args:
        splits: From :func:`open_splits`; their ``transform``, ``seed`` are set here.
        train_transform, eval_transform: From the functions of these names.
        batch_size, eval_batch_size: Images a batch, the latter by default twice the former.
        num_workers: Loader processes; 0 reads in this one.
        seed: Of order and augmentation.
        cache_bytes: A part whose decoded images take up to this much is decoded once and kept in memory.
        progress: Show a bar on standard error while that is done.
    """

    def __init__(
        self,
        splits: ClassifySplits,
        train_transform: Transform,
        eval_transform: Transform,
        *,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        cache_bytes: int = CACHE_BYTES,
        progress: bool = True,
    ) -> None:
        super().__init__()
        for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
            if value < least:
                raise UserError(f"{name} must be {least} or more, got {value}")
        self.splits = splits
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or 2 * batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.cache_bytes = cache_bytes
        self.progress = progress
        self._train_loader: Loader | None = None
        self._place = (0, 0)  # epoch, batch that training begins at
        splits.train.transform = train_transform
        for part in (splits.train, splits.val, splits.test):
            if part is not None:
                part.seed = seed
                part.transform = part.transform if part is splits.train else eval_transform

    def set_epoch(self, epoch: int) -> None:
        """Make the next pass over the training set that of ``epoch``, from its beginning."""
        self.fast_forward(epoch, 0)

    def fast_forward(self, epoch: int, batch: int) -> None:
        """Make the next pass over the training set begin at ``batch`` of ``epoch``."""
        self._place = (epoch, batch)
        if self._train_loader is not None:
            self._train_loader.fast_forward(epoch, batch)

    def train_dataloader(self) -> Loader:
        """Shuffled and augmented."""
        self._train_loader = self._loader(self.splits.train, training=True)
        self._train_loader.fast_forward(*self._place)
        return self._train_loader

    def val_dataloader(self) -> Loader:
        """In order, each image once."""
        return self._loader(self.splits.val, training=False)

    def test_dataloader(self) -> Loader:
        """The test part, or the validation part where there is none."""
        return self._loader(self.splits.test or self.splits.val, training=False)

    @property
    def broken(self) -> list[tuple[str, str]]:
        """(name, reason) of every file that could not be read so far, as this process knows."""
        return self.splits.broken

    def _loader(self, images: ImageSet, *, training: bool) -> Loader:
        in_memory = images.fill_cache(self.cache_bytes, progress=self.progress)
        return make_loader(
            images,
            self.batch_size if training else self.eval_batch_size,
            training=training,
            # Finishing a batch of images in memory is quicker than sending it from one process to another.
            num_workers=0
            if in_memory and images.transform is not None and images.transform.light
            else self.num_workers,
            seed=self.seed,
            place=self._rank(),
        )

    def _rank(self) -> tuple[int, int]:
        """This process's number and how many there are."""
        if self.trainer is not None:
            return self.trainer.global_rank, self.trainer.world_size
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1


def make_loader(
    images: ImageSet,
    batch_size: int,
    *,
    training: bool = False,
    num_workers: int = 0,
    seed: int = 0,
    place: tuple[int, int] = (0, 1),
) -> Loader:
    """A loader over a set, in order and each image once unless ``training``; ``place`` is (rank, world size)."""
    groups = getattr(images, "groups", None)
    sampler = EpochSampler(len(images), training=training, seed=seed, rank=place[0], world_size=place[1], groups=groups)
    workers: dict[str, Any] = {"persistent_workers": True, "prefetch_factor": 4} if num_workers else {}
    return Loader(
        images,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=getattr(images, "collate", None),  # images of one size need none of their own
        drop_last=training and len(sampler) >= batch_size,
        pin_memory=torch.cuda.is_available(),
        **workers,
    )
