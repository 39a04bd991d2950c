"""Work in parts that fit a processor's cache.

What is several times as wide as the map itself (Q, K and V together, the hidden map of an inverted residual) costs more
time on its way to memory and back than in the arithmetic, and freshly taken memory costs even more. Made and used up a
few images or rows at a time it stays in the cache, and a large image needs little memory beyond its maps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

__all__ = ["eager_cpu", "in_parts"]

CACHE = 2**23  # bytes of the widest map of one part


def eager_cpu(x: Tensor) -> bool:
    """Whether this runs on a processor, operation by operation."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.compiler.is_exporting()


def in_parts(compute: Callable[[slice, slice], Tensor], x: Tensor, channels: int, unit: int = 1) -> Tensor:
    """``compute(images, rows)`` for all of ``x`` (B, H, W, C), put together again.

    Parts are some images with all their rows, or rows of one image (``unit`` rows or a multiple, but for the last), so
    that a map of ``channels`` fits the cache. Where there is no such cache to mind, the whole is one part.

    Args:
        compute: Gives the result (b, h, W, C') of these images' rows.
        x: What the parts are of.
        channels: Of the widest map that ``compute`` makes.
        unit: How many rows belong together.
    """
    found = list(_parts(x, channels, unit))
    if len(found) == 1:
        return compute(*found[0])
    out = None
    for images, rows in found:
        piece = compute(images, rows)
        if out is None:
            out = piece.new_empty(*x.shape[:3], piece.shape[3])
        out[images, rows] = piece
    assert out is not None
    return out


def _parts(x: Tensor, channels: int, unit: int) -> Iterator[tuple[slice, slice]]:
    batch, height, width, _ = x.shape
    if not eager_cpu(x) or not x.numel():
        yield slice(0, batch), slice(0, height)
        return
    row = width * channels * x.element_size()
    images, rows = max(1, CACHE // (row * height)), height
    if row * height > CACHE:
        rows = max(unit, CACHE // row // unit * unit)
    for first in range(0, batch, images):
        for top in range(0, height, rows):
            yield slice(first, min(first + images, batch)), slice(top, min(top + rows, height))
