"""Computation in tiles that fit a CPU's cache.

What is several times as wide as the map itself (Q, K and V together, the hidden map of an inverted residual) costs more
time on its way to memory and back than in arithmetic, and newly allocated memory costs even more. Computed and used a
few images, rows or tiles at a time it stays in the cache, and a large image needs little memory beyond its maps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from torch import Tensor

from ..dispatch import eager_cpu, traced

__all__ = ["Tile", "in_tiles"]

Tile = tuple[slice, slice, slice]  # of the images, rows and columns; an index of (B, H, W, C)
CACHE = 2**23  # bytes of the widest map of one tile


def in_tiles(
    compute: Callable[[Tile], Tensor],
    x: Tensor,
    channels: int,
    multiple: int = 1,
    halo: int = 0,
    out: Tensor | None = None,
) -> Tensor:
    """``compute(tile)`` for all tiles of ``x`` (B, H, W, C), joined.

    Tiles are some images, rows of one image (a multiple of ``multiple``, but for the last), or, where ``halo`` is
    given and rows would be too few, rows and columns of one image, so that a map of ``channels`` fits the cache. On a
    GPU, and where operations are traced or transformed, everything is one tile.

    Args:
        compute: Returns the result (b, h, w, C') of a tile; ``x[tile]`` is its part of ``x``.
        x: What the tiles are of.
        channels: Of the widest map that ``compute`` allocates.
        multiple: How many rows belong together.
        halo: How far beyond its tile ``compute`` reads; that border is computed twice, so tiles are kept compact.
        out: A map that may be overwritten with the results.
    """
    tiles = list(_tiles(x, channels, multiple, halo))
    if len(tiles) == 1:
        return compute(tiles[0])
    for tile in tiles:
        result = compute(tile)
        if out is None:
            out = result.new_empty(*x.shape[:3], result.shape[3])
        out[tile] = result
    assert out is not None
    return out


def _tiles(x: Tensor, channels: int, multiple: int, halo: int) -> Iterator[Tile]:
    batch, height, width, _ = x.shape
    if not eager_cpu(x) or traced() or not x.numel():
        yield slice(0, batch), slice(0, height), slice(0, width)
        return
    positions = max(1, CACHE // (channels * x.element_size()))  # that fit the cache
    images, rows, columns = max(1, positions // (height * width)), height, width
    if height * width > positions:
        min_side = max(1, 8 * halo)  # with a smaller one, a fifth and more would be computed twice
        if halo and positions // width < min_side:
            columns = _equal_size(width, max(min_side, math.isqrt(positions)))
        rows = max(multiple, min_side, positions // columns // multiple * multiple)
    for first in range(0, batch, images):
        for top in range(0, height, rows):
            for left in range(0, width, columns):
                yield (
                    slice(first, min(first + images, batch)),
                    slice(top, min(top + rows, height)),
                    slice(left, min(left + columns, width)),
                )


def _equal_size(length: int, max_size: int) -> int:
    """The size of equal pieces of ``length``, none larger than ``max_size``."""
    return math.ceil(length / math.ceil(length / max_size))
