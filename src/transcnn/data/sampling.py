"""The order of samples: the same for the same (seed, epoch), shared out over processes, resumable anywhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import numpy as np
from torch.utils.data import DataLoader, DistributedSampler

from ..errors import UserError
from .randomness import sample_seeds

__all__ = ["EpochSampler", "Loader", "Sample"]


WINDOW = 8  # files, of those that are slow to get, that samples are drawn from at a time


class Sample(NamedTuple):
    """What a sampler asks a set for. The epoch travels with the index, so loader workers need not be told of it."""

    i: int
    epoch: int
    counts: bool = True  # False: padding that makes processes equally long, not to be counted


class EpochSampler(DistributedSampler):
    """Indices of one process, in an order given by (seed, epoch) alone; starts at any batch without reading others.

    Process r of R takes places r, r + R, r + 2R, ... of the common order: a global batch holds the same samples
    whatever R is. In training the rest that doesn't divide is left out, another in each epoch; in evaluation
    every sample is given once and the rest is filled up with samples whose ``counts`` is False.

    Where ``groups`` gives the file of each sample, ``WINDOW`` files drawn at random are gone through at a time, their
    samples in random order: few files need to have been fetched when an epoch begins.

    (A ``DistributedSampler``, so that Lightning leaves it in place.)
    """

    def __init__(
        self,
        length: int,
        *,
        training: bool,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        groups: np.ndarray | None = None,
    ) -> None:
        self.length = length
        self.groups = groups
        super().__init__(
            range(length),  # pyright: ignore[reportArgumentType]  (only its length is looked at)
            world_size,
            rank,
            shuffle=training,
            seed=seed,
            drop_last=training,
        )
        self.training = training
        self.start = 0  # samples of this process to leave out, in the present epoch

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch; one that is under way already (see ``fast_forward``) is left as it is."""
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def fast_forward(self, epoch: int, samples: int) -> None:
        """Go to an epoch and leave out its first ``samples`` samples of this process, once."""
        self.epoch, self.start = epoch, samples

    def __iter__(self) -> Iterator[Sample]:
        mine = self.mine()
        start, self.start = self.start, 0
        for index in mine[start:].tolist():
            yield Sample(index, self.epoch)
        for _ in range(self.num_samples - len(mine)):
            yield Sample(0, self.epoch, counts=False)

    def mine(self) -> np.ndarray:
        """The indices of this process in the present epoch, in order and without padding."""
        order = np.arange(self.length)
        if self.training:
            rng = np.random.default_rng(int(sample_seeds(self.seed, self.epoch, [-1])[0]))
            if self.groups is not None:
                turn = rng.permutation(self.groups.max(initial=0) + 1)[self.groups]  # when each sample's file comes
                order = np.lexsort((rng.random(self.length), turn // WINDOW))
            else:
                order = rng.permutation(order)
        return order[self.rank : self.num_samples * self.num_replicas : self.num_replicas]


class Loader(DataLoader):
    """A ``DataLoader`` over an :class:`EpochSampler` that can be told where to go on, and can tell where it is.

    ``len`` is always that of a whole epoch. ``state_dict`` and ``load_state_dict`` are what Lightning stores in the
    middle of an epoch and restores, so that a resumed run sees the rest of the epoch and nothing twice.
    """

    given = 0  # batches of the present epoch given so far
    waited = 0.0  # seconds of the present epoch that were spent waiting for batches
    read_timeout = 600.0  # seconds that loader processes may take for a batch

    @property
    def order(self) -> EpochSampler:
        """The sampler."""
        return cast(EpochSampler, self.sampler)

    def __iter__(self) -> Iterator[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.given = self.order.start // (self.batch_size or 1)
        self.timeout = self.read_timeout if self.num_workers else 0
        self.waited = 0.0
        batches: Iterator[Any] | None = None
        while True:
            asked = time.monotonic()
            try:
                batches = batches or super().__iter__()
                batch = next(batches)
            except StopIteration:
                return
            except UserError as error:  # a worker's comes with its traceback in the text
                raise UserError(str(error).rpartition("UserError: ")[2].strip()) from error
            except RuntimeError as error:
                if "DataLoader" not in str(error):
                    raise
                raise UserError(self._what_happened(str(error))) from error
            self.waited += time.monotonic() - asked
            self.given += 1  # before the batch is out: whoever asks while it is worked on counts it as given
            yield batch

    def _what_happened(self, error: str) -> str:
        """A loader process that died or is stuck, with the files of the batch that was waited for."""
        what = f"no images came for {self.read_timeout:.0f} s" if "timed out" in error else error.splitlines()[0]
        files = ", ".join(repr(name) for name in self.names(self.given)[:4])
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
        self.given = batch

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many of its batches were given."""
        return {"epoch": self.order.epoch, "batch": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where ``state_dict`` was taken."""
        if state["batch"] < len(self):
            self.fast_forward(state["epoch"], state["batch"])
        else:
            self.fast_forward(state["epoch"] + 1, 0)
