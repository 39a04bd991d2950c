"""How many levels of H-MHSA an image's size calls for, so that cost stays linear in the number of pixels.

With two levels, the published layout, every position attends to H·W/r² merged tokens: cheap at 256x256, quadratic in
the end. Each further level divides the tokens by r² again (arXiv 2106.03180, section 3.2: "step by step").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

__all__ = ["auto_levels", "further_levels", "resolve_auto"]

# By the number of dimensions: a map of up to FEW tokens to a side is attended to as a whole, merging leaves about LEFT
# (those of 2-D are the published ones at 256x256), and further grids have GRID positions to a side.
FEW = {1: 144, 2: 12, 3: 5}
LEFT = {1: 56, 2: 7.5, 3: 3.8}
GRID = {1: 64, 2: 8, 3: 4}


def auto_levels(
    grid_sizes: Sequence[Any],
    pool_ratios: Sequence[Any],
    img_size: int | Sequence[int],
    stem_stride: int = 4,
    ndim: int = 2,
) -> tuple[tuple[tuple[Any, ...], ...], tuple[tuple[Any, ...], ...]]:
    """Grid sizes and pool ratios for images of ``img_size`` (a side, or height and width), a tuple a stage.

    Of sequences (``ndim`` 1) that is their length, of volumes (3) a side or depth, height and width.

    The given ones, an int or a tuple a stage and None for plain attention, are kept; levels of grids of 8 are added
    behind them until at most 12x12 tokens are left. Up to 384x384 the published layouts stay as they are.
    """
    sides = [img_size] * ndim if isinstance(img_size, int) else list(img_size)
    if not sides or min(sides) < 1:
        raise ValueError(f"img_size must be 1 or more, got {img_size}")
    grids, ratios = [], []
    for i, (given_grids, given_ratios) in enumerate(zip(grid_sizes, pool_ratios, strict=True)):
        g, r = _tuple(given_grids), _tuple(given_ratios)
        r = r if g else ()
        map_sides = [math.ceil(side / (stem_stride * 2**i)) for side in sides]
        more = further_levels(map_sides if ndim == 3 else [max(map_sides)] * ndim, r)
        grids.append((*g, *more[0]))
        ratios.append((*r, *more[1]))
    return tuple(grids), tuple(ratios)


def further_levels(sides: Sequence[int], ratios: Sequence[Any] = ()) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Grid sizes and pool ratios of the levels that a map of these ``sides`` needs after those of ``ratios``."""
    ndim = len(sides)
    for ratio in ratios:
        each = (ratio,) * ndim if isinstance(ratio, int) else ratio
        sides = [math.ceil(side / r) for side, r in zip(sides, each, strict=True)]
    grids, added = [], []
    while max(sides) > FEW[ndim]:
        each = [min(GRID[ndim], max(1, 2 ** round(math.log2(side / LEFT[ndim])))) for side in sides]
        grids.append(_one_if_equal([min(GRID[ndim], 2 ** math.ceil(math.log2(side))) for side in sides]))
        added.append(_one_if_equal(each))
        sides = [math.ceil(side / r) for side, r in zip(sides, each, strict=True)]
    return tuple(grids), tuple(added)


def resolve_auto(published: dict[str, Any], arguments: dict[str, Any], pretrained: bool) -> dict[str, Any]:
    """``arguments`` of a network with ``"auto"`` grid sizes and pool ratios replaced by :func:`auto_levels`.

    Args:
        published: The variant's arguments without the user's.
        arguments: All arguments, ``img_size`` among them if given (else 256).
        pretrained: Whether published weights are to be loaded, which have no weights for further levels.
    """
    asked = [arguments.get(name) for name in ("grid_sizes", "pool_ratios")]
    if not any(isinstance(value, str) for value in asked):
        return arguments
    if asked != ["auto", "auto"]:
        raise ValueError(f"grid_sizes and pool_ratios are both 'auto' or neither, got {asked[0]!r} and {asked[1]!r}")
    grids = published.get("grid_sizes", (8, 8, 8, None))
    ratios = published.get("pool_ratios", (8, 4, 2, None))
    size = arguments.get("img_size") or 256
    auto = auto_levels(grids, ratios, size, arguments.get("stem_stride", 4), arguments.get("ndim", 2))
    own = tuple(map(_tuple, grids))
    if pretrained and auto[0] != own:
        raise ValueError(
            f"the published weights hold {_count(own)} levels a stage, 'auto' for img_size={size} wants "
            f"{_count(auto[0])}, and further levels have weights of their own to train; leave out either pretrained, "
            "or grid_sizes and pool_ratios (transcnn.optimize keeps memory in bounds with two levels, too)"
        )
    return {**arguments, "grid_sizes": auto[0], "pool_ratios": auto[1]}


def _one_if_equal(sizes: Sequence[int]) -> Any:
    return sizes[0] if len(set(sizes)) == 1 else tuple(sizes)


def _tuple(value: Any) -> tuple[int, ...]:
    return () if value is None else (value,) if isinstance(value, int) else tuple(value)


def _count(grids: Sequence[Sequence[int]]) -> str:
    return "-".join(str(len(g) + 1) for g in grids)
