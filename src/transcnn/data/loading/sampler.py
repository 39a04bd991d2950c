"""The order of samples: the same for the same (seed, epoch), sharded over processes, resumable anywhere."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import DistributedSampler

from ..rng import sample_seeds
from ..sets.fault_tolerant import Sample

__all__ = ["EpochSampler"]

WINDOW = 8  # files, of those that are slow to get, that samples are drawn from at a time


class EpochSampler(DistributedSampler):
    """Indices of one process, in an order given by (seed, epoch) alone; starts at any batch without reading others.

    Process r of R takes positions r, r + R, r + 2R, ... of the common order: a global batch holds the same samples
    whatever R is. In training the remainder that doesn't divide is dropped, another in each epoch; in
    evaluation every sample comes once and the rest is padded with samples whose ``counts`` is False.

    Where ``groups`` gives the file of each sample, ``WINDOW`` files drawn at random are gone through at a time, their
    samples in random order: few files need to have been fetched when an epoch begins.

    Where ``strata`` gives the class of each sample, a training epoch is as long as before but takes all classes equally
    often: of large ones others in each epoch, of small ones each sample as often as the others (``Sample.repeats`` says
    which time it is).

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
        strata: np.ndarray | None = None,
    ) -> None:
        self.length = length
        self.groups = groups
        self.strata = strata
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
        order = self._order()
        mine = self._share(order)
        repeats = np.zeros_like(mine) if self.strata is None else self._share(_times_before(order))
        start, self.start = self.start, 0
        for index, before in zip(mine[start:].tolist(), repeats[start:].tolist(), strict=True):
            yield Sample(index, self.epoch, repeats=before)
        for _ in range(self.num_samples - len(mine)):
            yield Sample(0, self.epoch, counts=False)

    def mine(self) -> np.ndarray:
        """The indices of this process in the present epoch, in order and without padding."""
        return self._share(self._order())

    def _share(self, order: np.ndarray) -> np.ndarray:
        """What of something in the common order is this process's."""
        return order[self.rank : self.num_samples * self.num_replicas : self.num_replicas]

    def _order(self) -> np.ndarray:
        """The indices of all processes in the present epoch."""
        order = np.arange(self.length)
        if self.training:
            rng = np.random.default_rng(int(sample_seeds(self.seed, self.epoch, [-1])[0]))
            if self.strata is not None:
                order = _balanced(self.strata, rng)
            elif self.groups is not None:
                position = rng.permutation(self.groups.max(initial=0) + 1)[self.groups]  # of each sample's file
                order = np.lexsort((rng.random(self.length), position // WINDOW))
            else:
                order = rng.permutation(order)
        return order


def _balanced(strata: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """As many indices as there are samples, equally many of each class up to one, in random order."""
    classes = rng.permutation(np.unique(strata))
    chosen = []
    for nth, label in enumerate(classes):
        members = np.flatnonzero(strata == label)
        count = len(strata) // len(classes) + (nth < len(strata) % len(classes))
        rounds = [rng.permutation(members) for _ in range(-(-count // len(members)))]
        chosen.append(np.concatenate(rounds)[:count] if rounds else members[:0])
    return rng.permutation(np.concatenate(chosen))


def _times_before(order: np.ndarray) -> np.ndarray:
    """How often each entry has occurred before its place."""
    by = np.argsort(order, kind="stable")
    alike = order[by]
    times = np.empty_like(order)
    times[by] = np.arange(len(order)) - np.searchsorted(alike, alike)
    return times
