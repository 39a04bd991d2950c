"""What one position of an image attends to, in every block: exactly the weights that ``forward`` uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..checkpoints.loading import Loaded
from ..errors import UserError
from .geometry import carry, cell_of, edges
from .record import ImageLike, Record, as_input, check_stage, heads_of, record, token_weights

__all__ = ["AttentionMap", "attention_maps", "maps_of"]


@dataclass(frozen=True, eq=False)
class AttentionMap:
    """The attention of one position in one step of one block: a row of the softmax.

    Attributes:
        name: The H-MHSA module's dotted name.
        stage: Its stage, from 0.
        step: ``local`` (inside its grid) or ``global`` (over the merged tokens; in plain attention over all positions).
        level: Of the hierarchy, from 1; the global step's is the last.
        head: ``mean`` or a head's number.
        weights: How much goes to each token, (h', w'); the sum is 1, outside of the grid all is 0.
        query: Row and column of the position that asks: among the step's tokens, in the global step on the map.
        ratio: Side of the patch of the map's positions that one token stands for.
        grid_size: Side of the grids in tokens; None in the global step.
        map_size: Height and width of the block's map.
        size: Height and width of the image.
    """

    name: str
    stage: int
    step: Literal["local", "global"]
    level: int
    head: Literal["mean"] | int
    weights: Tensor
    query: tuple[int, int]
    ratio: int
    grid_size: int | None
    map_size: tuple[int, int]
    size: tuple[int, int]

    @property
    def pixels(self) -> Tensor:
        """The map at the image's size, (H, W): each token's weight shared evenly by its pixels; the sum is 1."""
        return carry(carry(self.weights, self.map_size, side=self.ratio), self.size)

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Top, left, bottom and right of what the position can see, in pixels: its grid, or the image."""
        if self.grid_size is None:
            return 0, 0, *self.size
        ends = []
        for place, count, pixels in zip(self.query, self.map_size, self.size, strict=True):
            first = place // self.grid_size * self.grid_size * self.ratio
            lines = edges(pixels, count)
            ends.append((lines[first], lines[min(first + self.grid_size * self.ratio, count)]))
        return ends[0][0], ends[1][0], ends[0][1], ends[1][1]

    @property
    def seen(self) -> int:
        """How many tokens the position can see; an even share is 1 / ``seen``."""
        if self.grid_size is None:
            return self.weights.numel()
        sides = [
            min(p // self.grid_size * self.grid_size + self.grid_size, n) - p // self.grid_size * self.grid_size
            for p, n in zip(self.query, self.weights.shape, strict=True)
        ]
        return sides[0] * sides[1]


def attention_maps(
    model: nn.Module | Loaded,
    image: ImageLike,
    query: tuple[int, int],
    stage: int | None = None,
    head: Literal["mean"] | int = "mean",
) -> list[AttentionMap]:
    """Where the network looks from one position of an image: every step of every H-MHSA, in the order they run.

    A block of L levels gives L maps, local steps first; a block of plain attention gives one. The weights are exact:
    with the values of the layer they give what ``forward`` computes. Works for every network that holds H-MHSA, plugged
    ones too, at any image size. The model is run in evaluation mode and left as it was.

    Args:
        model: A network, or what :func:`transcnn.checkpoints.loading.load` gives.
        image: (C, H, W) or (1, C, H, W), normalised; or a PIL image or a file, normalised here, of its own size.
        query: Row and column of a pixel.
        stage: One stage only, from 0, or negative from the end; in networks that aren't ours, neighbouring H-MHSA
            with maps of one shape count as a stage. None is all.
        head: ``mean`` over the heads, or one head's number.

    Raises:
        UserError: The position is outside of the image; no such stage or head; the network runs no H-MHSA.
    """
    module, x = as_input(model, image)
    check_query(query, x.shape[2:])
    _, records = record(module, x)
    return [m for r in check_stage(records, stage) for m in maps_of(r, query, tuple(x.shape[2:]), head)]  # pyright: ignore


def check_query(query: tuple[int, int], size: Sequence[int]) -> None:
    """Refuse what is no pixel of the image."""
    height, width = size
    if len(query) != 2 or not (0 <= query[0] < height and 0 <= query[1] < width):
        raise UserError(
            f"the query (row, column) must be within (0, 0) and ({height - 1}, {width - 1}), got {tuple(query)}"
        )


def maps_of(
    r: Record, query: tuple[int, int], size: tuple[int, int], head: Literal["mean"] | int = "mean"
) -> list[AttentionMap]:
    """The maps of one record for a pixel of an image of ``size``."""
    heads = r.attn.num_heads
    if head != "mean" and not (isinstance(head, int) and 0 <= head < heads):
        raise UserError(f"head must be 'mean' or a number from 0 to {heads - 1} in {r.name}, got {head!r}")

    def choose(rows: Tensor) -> Tensor:  # (h, ...) -> (...)
        return (rows.mean(0) if head == "mean" else rows[head]).cpu()

    y, x = (int(cell_of(n, had)[q]) for n, had, q in zip(size, r.size, query, strict=True))
    maps, ratio = [], 1
    for level, (qkv, grid_size, pool) in enumerate(zip(r.qkv, r.attn.grid_sizes, r.attn.pool_ratios, strict=True), 1):
        place = (y // ratio, x // ratio)
        rows = choose(_local_row(qkv, place, r.attn.head_dim, grid_size))
        common = (ratio, grid_size, r.size, size)
        maps.append(AttentionMap(r.name, r.stage, "local", level, head, rows, place, *common))
        ratio *= pool
    q = heads_of(r.q, r.attn.head_dim)[:, y * r.size[1] + x, None]  # (h, 1, d)
    rows = token_weights(q, heads_of(r.k, r.attn.head_dim)).unflatten(2, r.k.shape[2:])[:, 0]  # (h, h', w')
    maps.append(
        AttentionMap(r.name, r.stage, "global", len(r.qkv) + 1, head, choose(rows), (y, x), ratio, None, r.size, size)
    )
    return maps


def _local_row(qkv: Tensor, place: tuple[int, int], head_dim: int, grid_size: int) -> Tensor:
    """The weights of one token inside its grid, on the map of all tokens, (h, H, W)."""
    height, width = qkv.shape[2:]
    top, left = (p // grid_size * grid_size for p in place)
    own = qkv[:, :, top : top + grid_size, left : left + grid_size]
    q, k, _ = own[0].flatten(1).unflatten(0, (3, -1, head_dim)).mT  # (h, n, d) each, n the grid's real positions
    n = (place[0] - top) * own.shape[3] + place[1] - left
    row = token_weights(q[:, n, None], k)  # (h, 1, n)
    full = torch.zeros(len(row), height, width, dtype=row.dtype, device=row.device)
    full[:, top : top + grid_size, left : left + grid_size] = row.unflatten(2, own.shape[2:])[:, 0]
    return full
