"""How a feature map is cut into grids and merged into fewer tokens, and how either is put back: what H-MHSA stands on.

How many dimensions a map has is data. Letters as in :mod:`transcnn.attention`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .masking import keep_real

__all__ = [
    "Size",
    "channels_first",
    "channels_last",
    "coarser",
    "cut_into_grids",
    "join_grids",
    "merge",
    "merge_real",
    "one_if_equal",
    "per_axis",
    "product",
    "real_positions",
    "spread",
]

Size = int | tuple[int, ...]  # of a grid or a merged patch: its side, or one for each dimension


def cut_into_grids(x: Tensor, size: Size, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Cut a map into grids of ``size`` from the top left corner, (B, C, *S) -> (B·G, N, C).

    Where sizes don't divide, border grids are filled up with zeros; the second result then marks the real
    positions from those, (B·G, 1, 1, N) and ready to be an attention mask. It is None where all are real.
    With ``mask`` (B, 1, *S) it tells those of the mask instead.
    """
    batch, _, *sides = x.shape
    ndim = len(sides)
    sizes = per_axis(size, ndim)
    grids = [_grids(side, g) for side, g in zip(sides, sizes, strict=True)]
    beyond = [n * g - side for n, g, side in zip(grids, sizes, sides, strict=True)]
    # A graph that is exported for any size can't ask whether sizes divide: it always fills up and masks.
    padding: list[int] = []
    if _is_symbolic(*sides) or any(beyond):
        padding = [0, 0, *(n for more in reversed(beyond) for n in (0, more))]
    keys = None

    def cut(x: Tensor) -> Tensor:  # (B, *S, C) -> (B·G, N, C)
        if ndim > 1:  # else they lie one behind the other
            x = x.reshape(batch, *(n for pair in zip(grids, sizes, strict=True) for n in pair), x.shape[-1])
            x = x.permute(0, *range(1, 2 * ndim, 2), *range(2, 2 * ndim + 1, 2), 2 * ndim + 1)  # (B, grids, sizes, C)
        return x.reshape(batch * math.prod(grids), math.prod(sizes), x.shape[-1])

    x = channels_last(x)
    if padding:
        x = F.pad(x, padding)
        keys = real_positions(sides, grids, sizes, x.device)  # (G, N)
        keys = keys.repeat(batch, 1)[:, None, None]  # (B·G, 1, 1, N)
    if mask is not None:
        mask = channels_last(mask)
        keys = cut(F.pad(mask, padding) if padding else mask).mT[:, None]  # (B·G, 1, 1, N)
    return cut(x), keys


def join_grids(x: Tensor, size: Size, batch: int, sides: Sequence[int]) -> Tensor:
    """Put grids back to where :func:`cut_into_grids` took them from, (B·G, N, C) -> (B, C, *S), S being ``sides``."""
    ndim = len(sides)
    sizes = per_axis(size, ndim)
    grids = [_grids(side, g) for side, g in zip(sides, sizes, strict=True)]
    if ndim > 1:
        x = x.reshape(batch, *grids, *sizes, x.shape[2])
        x = x.permute(
            0, *(n for i in range(1, ndim + 1) for n in (i, ndim + i)), 2 * ndim + 1
        )  # grid, size, grid, size
    x = x.reshape(batch, *(n * g for n, g in zip(grids, sizes, strict=True)), x.shape[-1])
    return channels_first(x[(slice(None), *map(slice, sides))])


def real_positions(sides: Sequence[int], grids: Sequence[int], sizes: Sequence[int], device: torch.device) -> Tensor:
    """Which positions of each grid lie inside the map, (G, N)."""
    real = torch.ones((), dtype=torch.bool, device=device)
    for i, (side, n, size) in enumerate(zip(sides, grids, sizes, strict=True)):
        shape = [1] * (2 * len(sides))
        shape[i], shape[len(sides) + i] = n, size
        real = real & (torch.arange(n * size, device=device) < side).view(shape)  # (grids, sizes)
    return real.reshape(math.prod(grids), math.prod(sizes))


def merge(x: Tensor, ratio: Size) -> Tensor:
    """Average each patch of ``ratio``, of its real positions only, (B, C, H, W) -> (B, C, ⌈H/r⌉, ⌈W/r⌉)."""
    if ratio == 1:
        return x
    if x.ndim == 4:
        return _average(x, ratio)
    # By the 2-D operation, which takes patches larger than the map and every dtype, and which ONNX knows.
    if x.ndim == 3:
        return _average(x[:, :, None], (1, *per_axis(ratio, 1)))[:, :, 0]
    depth, *sides = per_axis(ratio, 3)
    x = _average(x.flatten(1, 2), tuple(sides)).unflatten(1, x.shape[1:3])  # (B, C, D, H', W')
    return _average(x.flatten(3), (depth, 1)).unflatten(3, x.shape[3:])  # (B, C, D', H', W')


def _average(x: Tensor, ratio: Size) -> Tensor:
    if torch.compiler.is_exporting():
        return _average_padded(x, per_axis(ratio, 2))
    return F.avg_pool2d(x, ratio, ratio, ceil_mode=True, count_include_pad=False)


def _average_padded(x: Tensor, ratios: tuple[int, ...]) -> Tensor:
    """The same for exported graphs, by whole patches: OpenVINO refuses to pool a map that is smaller than a patch."""
    below, beside = (_grids(n, ratio) * ratio - n for n, ratio in zip(x.shape[2:], ratios, strict=True))

    def average(x: Tensor) -> Tensor:
        return F.avg_pool2d(F.pad(x, (0, beside, 0, below)), ratios, ratios)

    ones = x.new_ones(1, 16, *x.shape[2:])  # OpenVINO doesn't pool a single channel in bf16
    return average(x) / average(ones)[:, :1]  # by how much of a patch is real


def merge_real(x: Tensor, ratio: Size, mask: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`merge` where ``mask`` is true; also the tokens that stand for any such position, (B, 1, ⌈H/r⌉, ⌈W/r⌉)."""
    share = merge(mask.to(torch.promote_types(x.dtype, torch.float32)), ratio)  # of each patch that is real
    tokens = merge(keep_real(x, mask), ratio) / share.masked_fill(share == 0, 1)
    return tokens.to(x.dtype), share > 0


def coarser(mask: Tensor, stride: Size) -> Tensor:
    """Which patches of ``stride`` hold a real position, (B, 1, H, W) -> (B, 1, ⌈H/s⌉, ⌈W/s⌉)."""
    return merge(mask.float(), stride) > 0


def spread(x: Tensor, ratio: Size, like: Tensor) -> Tensor:
    """Give each merged token's value to all its positions, (B, C, ⌈H/r⌉, ⌈W/r⌉) -> (B, C, H, W) of ``like``."""
    for dim, r in enumerate(per_axis(ratio, x.ndim - 2), start=2):
        x = x.repeat_interleave(r, dim=dim)
    return x[(slice(None), slice(None), *map(slice, like.shape[2:]))]


def channels_last(x: Tensor) -> Tensor:
    """(B, C, *S) -> (B, *S, C), a view."""
    return x.permute(0, *range(2, x.ndim), 1)


def channels_first(x: Tensor) -> Tensor:
    """(B, *S, C) -> (B, C, *S), a view."""
    return x.permute(0, x.ndim - 1, *range(1, x.ndim - 1))


def per_axis(size: Size, ndim: int) -> tuple[int, ...]:
    """One number for each of ``ndim`` dimensions."""
    return (size,) * ndim if isinstance(size, int) else size


def product(ratio: tuple[int, ...], by: Size) -> tuple[int, ...]:
    """The ratio of tokens that are merged once more."""
    return tuple(r * b for r, b in zip(ratio, per_axis(by, len(ratio)), strict=True))


def one_if_equal(size: Size | Sequence[int]) -> Size:
    """One number where all are equal, so that equal arguments are one."""
    if isinstance(size, Sequence):
        return size[0] if len(set(size)) == 1 else tuple(size)
    return size


def _grids(length: int, size: int) -> int:
    """How many grids cover a side, ⌈length/size⌉; without negative numbers, whose division ONNX rounds otherwise."""
    return (length + size - 1) // size


def _is_symbolic(*sizes: int) -> bool:
    return torch.compiler.is_exporting() and any(isinstance(size, torch.SymInt) for size in sizes)
