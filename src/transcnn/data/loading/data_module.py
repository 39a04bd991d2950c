"""Lightning's data module over the splits of a data set.

splits = open_splits("folder")
data = DataModule(splits, train_transform(224), eval_transform(224), batch_size=128, num_workers=8)
trainer.fit(task, data)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import lightning as L
import torch

from ...errors import UserError
from ..sets.fault_tolerant import FaultTolerantDataset
from ..sets.image_dataset import CACHE_BYTES
from .loader import Loader, make_loader

__all__ = ["DataModule"]


class DataModule(L.LightningDataModule):
    """Loaders of batches, ``(images, labels)`` in classification, over the splits of a data set.

    Batches are the same for the same (seed, epoch) whatever the number of workers; ``batch_size`` is that of one
    process, and R processes together see in each step what one process with R times the batch size sees. Training
    batches are full ones, unless the set is smaller than one. In evaluation every image is given once; labels below
    0 (``IGNORE``: broken files, padding between processes) are not to be counted.

    The training loader can stop and go on anywhere: Lightning stores and restores its position by itself, and
    ``fast_forward(epoch, batch)`` sets it by hand, without the images before it being read.

    Args:
        splits: From ``open_splits`` of the task; they stay as they are.
        train_transform, eval_transform: From the task's module in ``transforms``.
        batch_size, eval_batch_size: Images a batch, the latter by default twice the former.
        num_workers: Loader processes; 0 reads in this one.
        seed: Of order and augmentation.
        cache_bytes: A split whose decoded images take up to this much is decoded once and kept in memory.
        progress: Show a bar on standard error while that is done.
        balanced: Whether training goes through all classes equally often.
    """

    def __init__(
        self,
        splits: Any,
        train_transform: Any,
        eval_transform: Any,
        *,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        cache_bytes: int = CACHE_BYTES,
        progress: bool = True,
        balanced: bool = False,
    ) -> None:
        super().__init__()
        for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
            if value < least:
                raise UserError(f"{name} must be {least} or more, got {value}")
        self.splits = replace(
            splits,
            **{
                name: split.with_transform(
                    train_transform if name == "train" else eval_transform, seed=seed, pixel_range=split.pixel_range
                )
                for name in ("train", "val", "test")
                if (split := getattr(splits, name)) is not None
            },
        )
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or 2 * batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.cache_bytes = cache_bytes
        self.progress = progress
        self.balanced = balanced
        self._train_loader: Loader | None = None
        self._position = (0, 0)  # epoch, batch that training begins at

    def set_epoch(self, epoch: int) -> None:
        """Make the next pass over the training set that of ``epoch``, from its beginning."""
        self.fast_forward(epoch, 0)

    def fast_forward(self, epoch: int, batch: int) -> None:
        """Make the next pass over the training set begin at ``batch`` of ``epoch``."""
        self._position = (epoch, batch)
        if self._train_loader is not None:
            self._train_loader.fast_forward(epoch, batch)

    def train_dataloader(self) -> Loader:
        """Shuffled and augmented."""
        self._train_loader = self._loader(self.splits.train, training=True)
        self._train_loader.fast_forward(*self._position)
        return self._train_loader

    def val_dataloader(self) -> Loader:
        """In order, each image once."""
        return self._loader(self.splits.val, training=False)

    def test_dataloader(self) -> Loader:
        """The test split, or the validation split where there is none."""
        return self._loader(self.splits.test or self.splits.val, training=False)

    @property
    def broken(self) -> list[tuple[str, str]]:
        """(name, reason) of every file that could not be read so far, as this process knows."""
        return self.splits.broken

    def _loader(self, images: FaultTolerantDataset, *, training: bool) -> Loader:
        rank, world_size = self._rank()
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
            rank=rank,
            world_size=world_size,
            strata=images.labels if training and self.balanced else None,  # pyright: ignore
        )

    def _rank(self) -> tuple[int, int]:
        """This process's number and how many there are."""
        if self.trainer is not None:
            return self.trainer.global_rank, self.trainer.world_size
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1
