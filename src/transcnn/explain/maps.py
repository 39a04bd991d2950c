"""What one position of an image attends to, in every block: exactly the weights that ``forward`` uses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Literal

import torch
from torch import Tensor, nn

from ..checkpoints.loading import Loaded
from ..errors import UserError
from ..grids import Size, one_if_equal, per_axis, product
from .geometry import carry, cell_of, edges
from .record import ImageLike, Record, as_input, check_stage, heads_of, record, token_weights

__all__ = ["AttentionMap", "attention_maps", "maps_of"]


@dataclass(frozen=True, eq=False)
class AttentionMap:
    """The attention of one position in one step of one block: a row of the softmax.

    What is said of rows and columns, or height and width, is one number of a sequence and three of a volume.

    Attributes:
        name: The H-MHSA module's dotted name.
        stage: Its stage, from 0.
        step: ``local`` (inside its grid) or ``global`` (over the merged tokens; in plain attention over all positions).
        level: Of the hierarchy, from 1; the global step's is the last.
        head: ``mean`` or a head's number.
        weights: How much goes to each token, (h', w'); the sum is 1, outside of the grid all is 0.
        query: Row and column of the position that asks: among the step's tokens, in the global step on the map.
        ratio: Side of the patch of the map's positions that one token stands for; one a dimension where they differ.
        grid_size: Side of the grids in tokens, likewise; None in the global step.
        map_size: Height and width of the block's map.
        size: Height and width of the image.
    """

    name: str
    stage: int
    step: Literal["local", "global"]
    level: int
    head: Literal["mean"] | int
    weights: Tensor
    query: tuple[int, ...]
    ratio: Size
    grid_size: Size | None
    map_size: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def pixels(self) -> Tensor:
        """The map at the image's size, (H, W): each token's weight shared evenly by its pixels; the sum is 1."""
        return carry(carry(self.weights, self.map_size, side=self.ratio), self.size)

    @property
    def box(self) -> tuple[int, ...]:
        """Top, left, bottom and right of what the position can see, in pixels: its grid, or the image."""
        if self.grid_size is None:
            return *(0 for _ in self.size), *self.size
        starts, ends = [], []
        ndim = len(self.size)
        sides = zip(per_axis(self.grid_size, ndim), per_axis(self.ratio, ndim), strict=True)
        for place, count, pixels, (grid, ratio) in zip(self.query, self.map_size, self.size, sides, strict=True):
            first = place // grid * grid * ratio
            lines = edges(pixels, count)
            starts.append(lines[first])
            ends.append(lines[min(first + grid * ratio, count)])
        return *starts, *ends

    @property
    def seen(self) -> int:
        """How many tokens the position can see; an even share is 1 / ``seen``."""
        if self.grid_size is None:
            return self.weights.numel()
        grids = per_axis(self.grid_size, self.weights.ndim)
        return math.prod(min(g, n - p // g * g) for p, n, g in zip(self.query, self.weights.shape, grids, strict=True))


def attention_maps(
    model: nn.Module | Loaded,
    image: ImageLike,
    query: tuple[int, ...],
    stage: int | None = None,
    head: Literal["mean"] | int = "mean",
) -> list[AttentionMap]:
    """Where the network looks from one position of an image: every step of every H-MHSA, in the order they run.

    A block of L levels gives L maps, local steps first; a block of plain attention gives one. The weights are exact:
    with the values of the layer they give what ``forward`` computes. Works for every network that holds H-MHSA, plugged
    ones too, at any image size. The model is run in evaluation mode and left as it was.

    Args:
        model: A network, or what :func:`transcnn.checkpoints.loading.load` gives.
        image: (C, H, W) or (1, C, H, W), normalised; or a PIL image or a file, normalised here, of its own size. For
            networks of sequences (C, L), of volumes (C, D, H, W), or one of those with a batch of 1.
        query: Row and column of a pixel; of a sequence ``(position,)``, of a volume depth, row and column.
        stage: One stage only, from 0, or negative from the end; in networks that aren't ours, neighbouring H-MHSA
            with maps of one shape count as a stage. None is all.
        head: ``mean`` over the heads, or one head's number.

    Raises:
        UserError: The position is outside of the image; no such stage or head; the network runs no H-MHSA.
    """
    module, x = as_input(model, image)
    check_query(query, x.shape[2:])
    _, records = record(module, x)
    return [m for r in check_stage(records, stage) for m in maps_of(r, query, tuple(x.shape[2:]), head)]


def check_query(query: tuple[int, ...], size: Sequence[int]) -> None:
    """Refuse what is no pixel of the image."""
    whole = all(isinstance(q, Integral) for q in query)
    if len(query) != len(size) or not whole or not all(0 <= q < n for q, n in zip(query, size, strict=True)):
        names = {1: "(position,)", 2: "(row, column)", 3: "(depth, row, column)"}[len(size)]
        last = tuple(n - 1 for n in size)
        raise UserError(f"the query {names} must be within {(0,) * len(size)} and {last}, got {tuple(query)}")


def maps_of(
    r: Record, query: tuple[int, ...], size: tuple[int, ...], head: Literal["mean"] | int = "mean"
) -> list[AttentionMap]:
    """The maps of one record for a pixel of an image of ``size``."""
    heads = r.attn.num_heads
    if head != "mean" and not (isinstance(head, Integral) and 0 <= head < heads):
        raise UserError(f"head must be 'mean' or a number from 0 to {heads - 1} in {r.name}, got {head!r}")

    def choose(rows: Tensor) -> Tensor:  # (h, ...) -> (...)
        return (rows.mean(0) if head == "mean" else rows[head]).cpu()

    asks = tuple(int(cell_of(n, had)[q]) for n, had, q in zip(size, r.size, query, strict=True))
    maps: list[AttentionMap] = []
    ratio = per_axis(1, r.attn.ndim)
    for level, (qkv, grid_size, pool) in enumerate(zip(r.qkv, r.attn.grid_sizes, r.attn.pool_ratios, strict=True), 1):
        place = tuple(p // n for p, n in zip(asks, ratio, strict=True))
        rows = choose(_local_row(qkv, place, r.attn.head_dim, grid_size))
        common = (one_if_equal(ratio), grid_size, r.size, size)
        maps.append(AttentionMap(r.name, r.stage, "local", level, head, rows, place, *common))
        ratio = product(ratio, pool)
    q = heads_of(r.q[here(asks)], r.attn.head_dim)  # (h, 1, d)
    rows = token_weights(q, heads_of(r.k, r.attn.head_dim)).unflatten(2, r.k.shape[2:])[:, 0]  # (h, *S')
    maps.append(
        AttentionMap(
            r.name, r.stage, "global", len(r.qkv) + 1, head, choose(rows), asks, one_if_equal(ratio), None, r.size, size
        )
    )
    return maps


def here(place: Sequence[int]) -> tuple[slice, ...]:
    """An index of one position of a map (1, C, *S)."""
    return (slice(None), slice(None), *(slice(p, p + 1) for p in place))


def _local_row(qkv: Tensor, place: tuple[int, ...], head_dim: int, grid_size: Size) -> Tensor:
    """The weights of one token inside its grid, on the map of all tokens, (h, *S)."""
    sizes = per_axis(grid_size, len(place))
    grid = tuple(slice(p // g * g, p // g * g + g) for p, g in zip(place, sizes, strict=True))
    k = qkv[(slice(None), slice(None), *grid)]  # (1, 3C, *s), s the sizes that the grid really has
    q, own = (x.chunk(3, dim=1)[i] for x, i in ((qkv[here(place)], 0), (k, 1)))
    row = token_weights(heads_of(q, head_dim), heads_of(own, head_dim))  # (h, 1, n)
    full = torch.zeros(len(row), *qkv.shape[2:], dtype=row.dtype, device=row.device)
    full[(slice(None), *grid)] = row.unflatten(2, k.shape[2:])[:, 0]
    return full
