"""A data loader that is resumable in the middle of an epoch, and names the files where a worker process dies."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader

from ...errors import UserError
from ..sets.fault_tolerant import FaultTolerantDataset
from .read_ahead import read_ahead
from .sampler import EpochSampler

__all__ = ["Loader", "make_loader"]

PIECE = 8  # images that one thread reads at a time, of smaller batches fewer


class Loader(DataLoader):
    """A ``DataLoader`` over an :class:`EpochSampler` whose position in an epoch can be saved and restored.

    ``len`` is always that of a whole epoch. ``state_dict`` and ``load_state_dict`` are what Lightning stores in the
    middle of an epoch and restores, so that a resumed run sees the rest of the epoch and nothing twice.
    """

    yielded = 0  # batches of the present epoch so far
    waited = 0.0  # seconds of the present epoch that were spent waiting for batches
    read_timeout = 600.0  # seconds that loader processes may take for a batch
    threads = False  # whether threads of this process read a batch ahead, where no other processes read

    @property
    def order(self) -> EpochSampler:
        """The sampler."""
        return cast(EpochSampler, self.sampler)

    def __iter__(self) -> Iterator[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.yielded = self.order.start // (self.batch_size or 1)
        self.timeout = self.read_timeout if self.num_workers else 0
        self.waited = 0.0
        batches: Iterator[Any] | None = None
        while True:
            asked = time.monotonic()
            try:
                batches = batches or (self._by_threads() if self.threads else super().__iter__())
                batch = next(batches)
            except StopIteration:
                return
            except UserError as error:  # a worker's comes with its traceback in the text
                raise UserError(str(error).rpartition("UserError: ")[2].strip()) from error
            except RuntimeError as error:
                if "DataLoader" not in str(error):
                    raise
                raise UserError(self._diagnose(str(error))) from error
            self.waited += time.monotonic() - asked
            self.yielded += 1  # before the batch is out: whoever asks while it is worked on counts it
            yield batch

    def _by_threads(self) -> Iterator[Any]:
        """The batches, the next of which is read while one is worked on."""
        images = cast(Any, self.dataset)
        read = getattr(images, "__getitems__", None) or (lambda samples: [images[sample] for sample in samples])

        size = self.batch_size or 1
        step = max(1, min(PIECE, size // 4))

        def pieces() -> Iterator[tuple[list[Any], bool]]:
            for batch in self.batch_sampler or ():
                for start in range(0, len(batch), step):
                    yield batch[start : start + step], start + step >= len(batch)

        batch: list[Any] = []
        with closing(read_ahead(pieces(), lambda piece: read(piece[0]), -(-size // step))) as found:
            for (_, complete), samples in found:
                batch += cast(list[Any], samples)
                if complete:
                    yield self.collate_fn(batch)
                    batch = []

    def _diagnose(self, error: str) -> str:
        """A loader process that died or is stuck, with the files of the batch that was waited for."""
        what = f"no images came for {self.read_timeout:.0f} s" if "timed out" in error else error.splitlines()[0]
        files = ", ".join(repr(name) for name in self.names(self.yielded)[:4])
        return f"{what.rstrip('.')}; the batch that was waited for begins with {files}"

    def names(self, batch: int) -> list[str]:
        """The files of a batch of the present epoch, as far as the set knows names."""
        size, name = self.batch_size or 1, getattr(self.dataset, "name", str)
        return [name(int(i)) for i in self.order.mine()[batch * size : (batch + 1) * size]]

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch."""
        self.order.set_epoch(epoch)

    def fast_forward(self, epoch: int, batch: int) -> None:
        """Make the next iteration begin at ``batch`` of ``epoch``."""
        self.order.fast_forward(epoch, batch * (self.batch_size or 1))
        self.yielded = batch

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many of its batches were yielded."""
        return {"epoch": self.order.epoch, "batch": self.yielded}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where ``state_dict`` was taken."""
        if state["batch"] < len(self):
            self.fast_forward(state["epoch"], state["batch"])
        else:
            self.fast_forward(state["epoch"] + 1, 0)


def make_loader(
    images: FaultTolerantDataset,
    batch_size: int,
    *,
    training: bool = False,
    num_workers: int | None = 0,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    strata: np.ndarray | None = None,
) -> Loader:
    """A loader over a set, in order and each image once unless ``training``; ``strata``: see :class:`EpochSampler`.

    ``num_workers`` processes read; 0: this one reads when a batch is asked for; None, not in training: its threads do,
    a batch ahead.
    """
    sampler = EpochSampler(
        len(images),
        training=training,
        seed=seed,
        rank=rank,
        world_size=world_size,
        groups=images.groups,
        strata=strata,
    )
    workers: dict[str, Any] = {"persistent_workers": True, "prefetch_factor": 4} if num_workers else {}
    loader = Loader(
        images,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers or 0,
        collate_fn=getattr(images, "collate", None),  # images of one size need none of their own
        drop_last=training and len(sampler) >= batch_size,
        pin_memory=torch.cuda.is_available(),
        **workers,
    )
    loader.threads = num_workers is None and not training
    return loader
