"""Counter-based random numbers: they depend on (seed, epoch, index) alone, so no order of calls matters."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["CounterRNG", "sample_seeds", "seeded"]


def sample_seeds(
    seed: int, epoch: int | np.ndarray, indices: Sequence[int] | np.ndarray, repeats: int | np.ndarray = 0
) -> np.ndarray:
    """One uint64 for each sample from (seed, epoch, index), unrelated for neighbours (splitmix64, applied in turn).

    ``repeats``: how often the epoch has had the sample before, where samples come more than once.
    """
    with np.errstate(over="ignore"):
        mixed = _mix(np.asarray([seed], dtype=np.int64).astype(np.uint64))
        mixed = _mix(mixed ^ np.asarray(epoch, dtype=np.int64).astype(np.uint64))
        mixed = _mix(mixed ^ np.asarray(indices, dtype=np.int64).astype(np.uint64))
        again = np.asarray(repeats, dtype=np.int64).astype(np.uint64)
        return np.where(again > 0, _mix(mixed ^ again), mixed)


class CounterRNG:
    """A counter-based generator of numbers in [0, 1) for B samples at a time: the n-th call mixes each seed with n."""

    def __init__(self, seeds: np.ndarray) -> None:
        self.seeds = np.asarray(seeds, dtype=np.uint64)
        self.counter = 0

    def __call__(self) -> np.ndarray:
        self.counter += 1
        with np.errstate(over="ignore"):
            return (_mix(self.seeds + np.uint64(self.counter)) >> np.uint64(11)) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64 (Steele, Lea, Flood 2014): every bit of the input moves every bit of the output."""
    x = x * np.uint64(0xD1342543DE82EF95) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The global generators set to ``seed`` for a while: timm and torchvision draw from all three."""
    before = random.getstate(), np.random.get_state(), torch.default_generator.get_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed % (1 << 32))  # noqa: NPY002
    torch.default_generator.manual_seed(seed % (1 << 63))
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.default_generator.set_state(before[2])
