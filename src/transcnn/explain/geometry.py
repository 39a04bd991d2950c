"""Between the positions of a map and the pixels of an image, exactly: nothing is lost at borders or by rounding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..grids import Size, per_axis

MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}

__all__ = ["carry", "cell_of", "edges", "smooth"]


def cell_of(fine: int, coarse: int, side: int | None = None) -> Tensor:
    """Which of ``coarse`` cells along a line each of ``fine`` positions belongs to, (fine,).

    Cells have ``side`` positions, the last one fewer. Without ``side`` it is the power of two that gives ``coarse``
    cells, as halvings that round up do, else cells are as equal as can be.
    """
    positions = torch.arange(fine)
    if side is None:
        side = 1
        while -(-fine // side) > coarse:
            side *= 2
    if -(-fine // side) == coarse:
        return positions // side
    return positions * coarse // fine


def edges(fine: int, coarse: int) -> list[int]:
    """Where each cell begins, and the end of the last one, ``coarse`` + 1 numbers."""
    return torch.searchsorted(cell_of(fine, coarse), torch.arange(coarse + 1)).tolist()


def carry(values: Tensor, size: Sequence[int], side: Size | None = None) -> Tensor:
    """Bring a map to another size, its sum kept: a cell's value is shared evenly by, or summed over, what it covers.

    (..., *s) -> (..., *S), S being ``size``; ``side`` as in :func:`cell_of`, or one for each dimension.
    """
    ndim = len(size)
    sides = (None,) * ndim if side is None else per_axis(side, ndim)
    for dim, length, each in zip(range(-ndim, 0), size, sides, strict=True):
        had = values.shape[dim]
        if length == had:
            continue
        if length > had:
            cell = cell_of(length, had, each).to(values.device)
            covered = cell.bincount(minlength=had).clamp(min=1).view(-1, *(1,) * (-1 - dim))
            values = (values / covered).index_select(dim, cell)
        else:
            cell = cell_of(had, length, each).to(values.device)
            shape = list(values.shape)
            shape[dim] = length
            values = values.new_zeros(shape).index_add(dim, cell, values)
    return values


def smooth(values: Tensor, size: Sequence[int]) -> Tensor:
    """Bring a map to an image's size by linear interpolation between the middles of its cells, (*s) -> (*S)."""
    sides = [int((cell_of(n, had) == 0).sum()) for n, had in zip(size, values.shape, strict=True)]
    whole = [side * had for side, had in zip(sides, values.shape, strict=True)]
    even = all(w >= n for w, n in zip(whole, size, strict=True))  # cells of one side, the last ones cut off
    target = list(whole if even else size)
    larger = F.interpolate(values[None, None], target, mode=MODES[len(size)], align_corners=False)[0, 0]
    return larger[tuple(map(slice, size))]
