"""What a file of weights says of itself, checked before anything is built from it.

Files may be damaged or made up: what they say must end in one clear error, and never in a file that is read, written or
fetched, nor in a network or an image that doesn't fit into memory. (Needs no torch: exported files are checked, too.)
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..data.bands import LARGEST, MAX_CHANNELS, MOST_OF_PILLOW, RESAMPLING
from ..errors import MAX_SIDE, UserError, first_line
from ..plain import check_plain
from .arguments import TASKS, check_task_args, short

__all__ = ["check_class_names", "check_data_config", "check_header", "read_values", "refused"]

MAX_CLASSES = 1 << 16
MAX_HEADER = 16 << 20  # characters of JSON, which take forty times as many bytes as values
MAX_RESIZED = 10_000  # pixels of a side before the margin is cropped
MAX_NAME = 1000  # characters of a class's name
INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "lanczos", "hamming", "box", "random")
CROP_MODES = ("center", "squash", "border")


def read_values(stored: Mapping[str, str]) -> dict[str, Any]:
    """What a file holds as JSON under several names; raises ValueError for what is none, or more than is read."""
    if (length := sum(map(len, stored.values()))) > MAX_HEADER:
        raise ValueError(f"it says {length:,} characters of itself, which no network needs")
    return {key: json.loads(value) for key, value in stored.items()}


def check_header(info: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """See that class names, preprocessing and the task's settings are what they should be.

    Raises:
        UserError: They aren't.
    """
    with refused(path):
        _check(info)


@contextmanager
def refused(path: str | os.PathLike[str]) -> Iterator[None]:
    """Errors of the checks inside as one of the file at ``path``: a UserError of one line."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, OverflowError) as error:
        reason = f"{short(error.args[0])} is missing" if isinstance(error, KeyError) else first_line(error)
        raise UserError(f"what {os.fspath(path)} says of itself is damaged: {reason}") from error


def _check(info: dict[str, Any]) -> None:
    check_plain(info, "the header")
    names = info["class_names"]
    check_class_names(names)
    task = info.get("task", "classify")
    if task not in TASKS:
        raise ValueError(f"there is no task {short(task)}")
    for key in ("model_args", "task_args", "settings"):
        if not isinstance(info.get(key, {}) or {}, dict):
            raise ValueError(f"{key} must be names with values, got {short(info[key])}")
    check_task_args(task, info.get("task_args") or {}, len(names))
    check_data_config(info["data_config"])
    args = info.get("model_args") or {}
    for key, value in (("num_classes", len(names)), ("in_chans", info["data_config"]["input_size"][0])):
        if args.get(key, value) != value:
            raise ValueError(f"model_args: {key} is {short(args[key])}, all else is for {value}")
    for key, value in info.items():
        if (key == "epoch" or key.startswith(("val_", "test_"))) and not (
            _is_finite(value) or isinstance(value, float)
        ):
            raise ValueError(f"{short(key)} must be a number, got {short(value)}")
    settings = info.get("settings") or {}
    if not isinstance(settings.get("data") or "", str):
        raise ValueError(f"settings: data must be a text, got {short(settings['data'])}")
    fraction, seed = settings.get("val_fraction", 0.1), settings.get("seed", 0)
    if not _is_finite(fraction) or not 0 <= fraction < 1 or not _is_int(seed):
        raise ValueError(f"settings: val_fraction {short(fraction)} and seed {short(seed)} can't be meant")
    for key in ("data", "version"):
        if not isinstance(info.get(key) or "", str):
            raise ValueError(f"{key} must be a text, got {short(info[key])}")


def check_class_names(names: Any) -> None:
    """Raise ValueError unless ``names`` is a list of names, not too many nor too long."""
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError("class_names must be a list of names")
    if len(names) > MAX_CLASSES or max(map(len, names)) > MAX_NAME:
        raise ValueError(f"class_names may be {MAX_CLASSES:,} names of {MAX_NAME:,} characters at most")


def check_data_config(config: Any) -> None:
    """Raise ValueError unless ``config`` says how images become input, in timm's words."""
    if not isinstance(config, dict):
        raise ValueError(f"data_config must be names with values, got {short(config)}")
    channels, *sides = config["input_size"]
    if not all(_is_int(side) and 1 <= side <= MAX_SIDE for side in sides) or len(sides) != 2:
        raise ValueError(f"input_size must be channels, height and width, got {short(config['input_size'])}")
    if not _is_int(channels) or not 1 <= channels <= MAX_CHANNELS:
        raise ValueError(f"images have 1 to {MAX_CHANNELS} channels, got {short(channels)}")
    for key in ("mean", "std"):
        values = config[key]
        if not isinstance(values, list) or len(values) != channels or not all(_is_finite(value) for value in values):
            raise ValueError(f"{key} must be a number for each channel, got {short(values)}")
    if min(config["std"]) <= 0:
        raise ValueError(f"std must be above 0, got {short(config['std'])}")
    if config["interpolation"] not in INTERPOLATIONS:
        raise ValueError(f"there is no interpolation {short(config['interpolation'])}")
    if not _is_finite(config["crop_pct"]) or not 0.05 <= config["crop_pct"] <= 2:
        raise ValueError(f"crop_pct must be from 0.05 to 2, got {short(config['crop_pct'])}")
    if max(sides) / config["crop_pct"] > MAX_RESIZED:  # images are made so large, and cropped then
        raise ValueError(f"crop_pct {short(config['crop_pct'])} of {max(sides)} pixels can't be meant")
    _check_pixel_range(config.get("pixel_range", [0, 1]), channels, config)
    if config.get("crop_mode", "center") not in CROP_MODES:
        raise ValueError(f"crop_mode must be one of {', '.join(CROP_MODES)}, got {short(config['crop_mode'])}")


def _check_pixel_range(pixel_range: Any, channels: int, config: dict[str, Any]) -> None:
    """Two numbers, or a pair of them for each channel: images are then read as any numbers."""
    per_channel = isinstance(pixel_range, list) and bool(pixel_range) and isinstance(pixel_range[0], list)
    pairs = pixel_range if per_channel else [pixel_range]
    if not all(isinstance(pair, list) and len(pair) == 2 and all(map(_is_measured, pair)) for pair in pairs):
        raise ValueError(f"pixel_range must be two numbers, or two for each channel, got {short(pixel_range)}")
    if not all(low < high for low, high in pairs):
        raise ValueError(f"pixel_range must be two numbers, the smaller first, got {short(pixel_range)}")
    if per_channel and len(pairs) != channels:
        raise ValueError(f"pixel_range must be two numbers for each of {channels} channels, got {len(pairs)} pairs")
    if channels > MOST_OF_PILLOW and not per_channel:
        raise ValueError(f"images of {channels} channels need a pixel_range for each")
    if per_channel and (config["interpolation"] not in RESAMPLING or config.get("crop_mode") == "border"):
        raise ValueError(f"images of any numbers are resized by {', '.join(RESAMPLING)}, without a border")


def _is_measured(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9 and math.isfinite(value)
