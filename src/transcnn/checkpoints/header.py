"""What a file of weights says of itself, checked before anything is built from it.

Files come from strangers: damaged or made up, what they say must end in one clear error, and never in a network or an
image that doesn't fit into memory. (Needs no torch: exported files are checked here, too.)
"""

from __future__ import annotations

import math
import os
from typing import Any

from ..errors import UserError

__all__ = ["check_stored"]

LARGEST_SIDE = 1 << 14  # pixels of an input
LARGEST_NUMBER = 1 << 14  # among a network's arguments: widths, depths, sizes
INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "lanczos", "hamming", "box", "random")


def check_stored(info: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """See that class names, preprocessing and the network's arguments are what they should be.

    Raises:
        UserError: They aren't.
    """
    try:
        _check(info)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, OverflowError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else (str(error) or "?").splitlines()[0]
        raise UserError(f"what {os.fspath(path)} says of itself is damaged: {reason}") from error


def _check(info: dict[str, Any]) -> None:
    names = info["class_names"]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError("class_names must be a list of names")
    if info.get("task", "classify") not in ("classify", "segment", "detect"):
        raise ValueError(f"there is no task {_short(info['task'])}")
    for key in ("model_args", "task_args", "settings"):
        if not isinstance(info.get(key, {}) or {}, dict):
            raise ValueError(f"{key} must be names with values, got {_short(info[key])}")
    _check_numbers(info.get("model_args"))
    config = info["data_config"]
    channels, *sides = config["input_size"]
    if not all(_is_int(side) and 1 <= side <= LARGEST_SIDE for side in sides) or len(sides) != 2:
        raise ValueError(f"input_size must be channels, height and width, got {_short(config['input_size'])}")
    if not _is_int(channels) or not 1 <= channels <= 4:
        raise ValueError(f"images have 1 to 4 channels, got {_short(channels)}")
    for key in ("mean", "std"):
        values = config[key]
        if not isinstance(values, list) or len(values) != channels or not all(_is_finite(value) for value in values):
            raise ValueError(f"{key} must be a number for each channel, got {_short(values)}")
    if min(config["std"]) <= 0:
        raise ValueError(f"std must be above 0, got {_short(config['std'])}")
    if config["interpolation"] not in INTERPOLATIONS:
        raise ValueError(f"there is no interpolation {_short(config['interpolation'])}")
    if not _is_finite(config["crop_pct"]) or not 0.05 <= config["crop_pct"] <= 1:
        raise ValueError(f"crop_pct must be from 0.05 to 1, got {_short(config['crop_pct'])}")


def _check_numbers(value: Any) -> None:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            _check_numbers(item)
    elif isinstance(value, int | float) and not abs(value) <= LARGEST_NUMBER:
        raise ValueError(f"no network has an argument of {_short(value)}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e9 and math.isfinite(value)


def _short(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 1e18 else "a number of many digits"
    return text if len(text) <= 80 else f"{text[:80]}..."
