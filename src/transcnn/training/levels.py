"""The levels of H-MHSA that a run's network gets: as many as the sizes call for that it will see."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch

from ..levels import auto_levels
from ..plugging.build import build_model
from ..plugging.cost import count
from ..variants import VARIANTS

__all__ = ["LEVELS", "choose_levels"]

LEVELS = ("grid_sizes", "pool_ratios")  # arguments of a network


def choose_levels(name: str, args: dict[str, Any], size: tuple[int, int], *, fixed: bool, quiet: bool) -> None:
    """Add the levels that images of ``size`` (height and width) call for to a network's arguments, and say so.

    Nothing is added where they are given, where the default ones do, or for networks that aren't of this package. Where
    they are ``fixed`` by weights that are loaded, what they cost is said.
    """
    variant = VARIANTS.get(name.split(".")[0])
    if variant is None or any(level in args for level in LEVELS):
        return
    every: Mapping[str, Any] = {**variant, **args}
    default = [list(every.get(level, ())) for level in LEVELS]
    grids, ratios = auto_levels(default[0], default[1], size, every.get("stem_stride", 4))
    wanted = {"grid_sizes": [list(g) for g in grids], "pool_ratios": [list(r) for r in ratios]}
    if [len(g) for g in grids] == [len(_tuple(g)) for g in default[0]]:
        return
    before, after = (_giga_macs(name, {**args, **levels}, size) for levels in ({}, wanted))
    if not fixed:
        args.update(wanted)
    if not quiet:
        shape = f"{size[1]}x{size[0]}"
        counts = "-".join(str(len(g) + 1) for g in grids)
        if fixed:
            message = (
                f"the levels of attention are those of the weights: {_short(before)} G multiply-adds at {shape}; "
                f"with {counts} levels, to be learnt anew, they would be {_short(after)} G"
            )
        else:
            message = (
                f"{counts} levels of attention for images of up to {shape}: {_short(after)} G multiply-adds instead of "
                f"{_short(before)} G (--model_args gives others as grid_sizes and pool_ratios)"
            )
        print(f"{name}: {message}", file=sys.stderr)


def _tuple(value: Any) -> tuple[int, ...]:
    return () if value is None else (value,) if isinstance(value, int) else tuple(value)


def _short(number: float) -> str:
    return f"{number:.3g}" if number < 100 else f"{number:,.0f}"


def _giga_macs(name: str, args: dict[str, Any], size: tuple[int, int]) -> float:
    with torch.device("meta"):
        model = build_model(name, **{key: value for key, value in args.items() if key != "plug"}).eval()
        return count(model, torch.empty(1, args.get("in_chans", 3), *size)).macs / 1e9
