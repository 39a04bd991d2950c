"""How many levels of H-MHSA an image's size calls for, so that cost stays linear in the number of pixels.

With two levels, the published layout, every position attends to H·W/r² merged tokens: cheap at 256x256, quadratic in
the end. Each further level divides the tokens by r² again (arXiv 2106.03180, section 3.2: "step by step").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

__all__ = ["auto_levels"]

FEW = 12  # a map of up to FEW x FEW tokens is attended to as a whole


def auto_levels(
    grid_sizes: Sequence[Any], pool_ratios: Sequence[Any], img_size: int | Sequence[int], stem_stride: int = 4
) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
    """Grid sizes and pool ratios for images of ``img_size`` (a side, or height and width), a tuple a stage.

    The given ones, an int or a tuple a stage and None for plain attention, are kept; levels of grids of 8 are added
    behind them until at most 12x12 tokens are left. Up to 384x384 the published layouts stay as they are.
    """
    sides = [img_size] if isinstance(img_size, int) else list(img_size)
    if not sides or min(sides) < 1:
        raise ValueError(f"img_size must be 1 or more, got {img_size}")
    grids, ratios = [], []
    for i, (given_grids, given_ratios) in enumerate(zip(grid_sizes, pool_ratios, strict=True)):
        g, r = _tuple(given_grids), _tuple(given_ratios)
        r = r if g else ()
        side = math.ceil(max(sides) / (stem_stride * 2**i))
        for ratio in r:
            side = math.ceil(side / ratio)
        while side > FEW:
            ratio = min(8, 2 ** round(math.log2(side / 7.5)))  # leaves about 8 tokens to a side, as published at 256
            g, r = (*g, 8), (*r, ratio)
            side = math.ceil(side / ratio)
        grids.append(g)
        ratios.append(r)
    return tuple(grids), tuple(ratios)


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
    auto = auto_levels(grids, ratios, size, arguments.get("stem_stride", 4))
    own = tuple(map(_tuple, grids))
    if pretrained and auto[0] != own:
        raise ValueError(
            f"the published weights hold {_count(own)} levels a stage, 'auto' for img_size={size} wants "
            f"{_count(auto[0])}, and further levels have weights of their own to train; leave out either pretrained, "
            "or grid_sizes and pool_ratios (transcnn.optimize keeps memory in bounds with two levels, too)"
        )
    return {**arguments, "grid_sizes": auto[0], "pool_ratios": auto[1]}


def _tuple(value: Any) -> tuple[int, ...]:
    return () if value is None else (value,) if isinstance(value, int) else tuple(value)


def _count(grids: Sequence[Sequence[int]]) -> str:
    return "-".join(str(len(g) + 1) for g in grids)
