"""How an image becomes a network's input and what to make of the output, as sentences for any language.

They say all that it takes for the answers of ``transcnn predict``; ``tests/test_export_steps.py`` follows them.
"""

from __future__ import annotations

import math
from typing import Any

from ..data.bands import is_per_channel
from ..data.images import MAX_ASPECT_RATIO, MIN_SHORT_SIDE, aspect_limit

__all__ = ["steps"]

FILTERS = {
    "nearest": "taking the pixel floor(s / 2 + s + s ...) of the input, s = input side / output side, added i times",
    "bilinear": "the triangle 1 - |x|, |x| < 1",
    "bicubic": "the cubic with a = -0.5, |x| < 2",
    "lanczos": "sinc(x) * sinc(x / 3), |x| < 3",
}
REACH = {"bilinear": 1, "bicubic": 2, "lanczos": 3}
ROUND = "rounded to the nearest (halves to even)"
NORMALISE = "divide by 255, subtract mean, divide by std (data_config), for each channel"
ORDER = "order as (batch, channel, row, column), float32"


def steps(task: str, config: dict[str, Any], args: dict[str, Any]) -> list[str]:
    """The steps of a task, the input's first.

    Args:
        task: ``classify``, ``multilabel``, ``regress``, ``segment`` or ``detect``.
        config: timm's data config.
        args: The task's settings.
    """
    own = {
        "classify": _classify,
        "multilabel": _multilabel,
        "regress": _regress,
        "segment": _segment,
        "detect": _detect,
    }[task]
    if is_per_channel(config.get("pixel_range")):
        return [*_scale(config["input_size"][0]), *own(config, args)]
    return [*_decode(config["input_size"][0]), *own(config, args)]


def _scale(channels: int) -> list[str]:
    return [
        f"read the numbers of {channels} channels as they are stored (TIFF: bands, or pages one after another; .npy: "
        "rows, columns, channels)",
        "each number v becomes (v - low) * 255 / (high - low), low and high being its channel's pair in "
        "data_config.pixel_range, which also stand for minus infinity, infinity and (low) NaN; nothing is rounded or "
        "cut off, here and in what follows",
    ]


def _decode(channels: int) -> list[str]:
    white = "where there is alpha a, put it on white: (v * a + 255 * (255 - a)) / 255, rounded"
    grey = "of colours grey is (19595 R + 38470 G + 7471 B + 32768) / 65536, rounded down"
    return [
        "decode; turn upright (EXIF); of an animation take the first frame",
        "more than 8 bits become 8: (v - low) * 255 / (high - low), rounded, kept from 0 to 255, low and high of "
        "data_config.pixel_range, else 0 and 65535, of floats 0 and 1",
        "palettes become colours, with alpha if they have any; CMYK and others RGB",
        {
            1: f"grey: {white}; {grey}",
            2: f"grey and alpha, which is 255 where there is none; {grey}",
            3: f"RGB: {white}; grey stands for all three",
            4: "RGBA: alpha is 255 where there is none; grey stands for all three colours",
        }.get(channels, f"{channels} channels"),
    ]


def _as_pillow(interpolation: str) -> str:
    if interpolation == "nearest":
        return FILTERS["nearest"]
    return (
        "as Pillow does: with s = input side / output side, f = max(s, 1) and c = (i + 0.5) * s, output pixel i is the "
        "mean of the input pixels j from floor(c - r * f + 0.5) to below floor(c + r * f + 0.5), within the image, "
        f"r = {REACH[interpolation]}, weighted by {FILTERS[interpolation]}, at x = (j - c + 0.5) / f; weights sum to 1 "
        "and are rounded to multiples of 2^-22; first along rows, then along columns, each result rounded and kept "
        "from 0 to 255"
    )


def _classify(config: dict[str, Any], args: dict[str, Any]) -> list[str]:
    return [*_whole_image(config), "softmax of the output over its second axis gives probabilities"]


def _multilabel(config: dict[str, Any], args: dict[str, Any]) -> list[str]:
    return [
        *_whole_image(config),
        "1 / (1 + exp(-output)) gives each label's probability",
        "the labels hold whose probability is at least that of task_args.thresholds, 0.5 without it",
    ]


def _regress(config: dict[str, Any], args: dict[str, Any]) -> list[str]:
    return [*_whole_image(config), "output * task_args.std + task_args.mean are the numbers of class_names"]


def _whole_image(config: dict[str, Any]) -> list[str]:
    _, height, width = config["input_size"]
    tall, wide = (math.floor(side / config["crop_pct"]) for side in (height, width))
    mode = config.get("crop_mode") or "center"
    cut = aspect_limit((height, width), config["crop_pct"])
    limit = cut if mode == "center" else max(MAX_ASPECT_RATIO, height, width)
    narrow = (
        f"where a side has more than {limit} times the pixels of the other, keep {limit} times, from (longer - "
        f"{limit} * shorter) / 2 on, rounded down"
    )
    fill = "round(255 * mean)" if mode == "border" else "black"
    if mode == "squash":
        size = f"to {tall}x{wide} (rows x columns), whatever the aspect ratio"
    elif mode == "border":
        size = f"both sides by 1 / max(width / {wide}, height / {tall}), {ROUND}, so that it just fits {tall}x{wide}"
    elif tall == wide:
        size = f"the shorter side to {tall}, the longer one to {tall} * longer / shorter, rounded down"
    else:
        size = f"both sides by 1 / min(width / {wide}, height / {tall}), {ROUND}, so that it just covers {tall}x{wide}"
    return [
        *([] if mode == "squash" else [narrow]),
        f"resize {size}, {_as_pillow(config['interpolation'])}",
        f"cut out the middle {height}x{width} (rows x columns): from row (rows - {height}) / 2 and column (columns - "
        f"{width}) / 2 on, {ROUND}; where the image is smaller, fill up with {fill}, half of it before, rounded down",
        NORMALISE,
        ORDER,
    ]


def _segment(config: dict[str, Any], args: dict[str, Any]) -> list[str]:
    resize, window = args.get("resize"), args.get("window")
    windows = f"cut into windows of {window} pixels a side that overlap by a third or more; sum their probabilities"
    return [
        *([f"{_fitted(resize)}, {_as_pillow('bilinear')}"] if resize else []),
        NORMALISE,
        *([windows] if window else []),
        ORDER,
        *(["do the same mirrored left to right, and add the probabilities of both"] if args.get("flip") else []),
        "resize the output to the image's own size where that differs: bilinear, corners not aligned",
        "the largest output over the second axis is a pixel's class; task_args.label_ids has the data's own number",
    ]


def _fitted(resize: int) -> str:
    limit = MAX_ASPECT_RATIO * resize
    return (
        f"resize both sides by min({resize} / shorter side, {limit} / longer side), {ROUND} and 1 at least, where that "
        "is not 1"
    )


def _detect(config: dict[str, Any], args: dict[str, Any]) -> list[str]:
    short, long = args["short_side"], args["long_side"]
    return [
        f"add black below or on the right until both sides have ceil(longer side * {MIN_SHORT_SIDE} / {long}) pixels",
        NORMALISE,
        f"resize by min({short} / shorter side, {long} / longer side), sides rounded down: bilinear, corners not "
        "aligned, without smoothing",
        ORDER,
        "boxes are x1, y1, x2, y2 in pixels of the input, the most confident first; image says to which each belongs; "
        "masks are probabilities inside the box",
        "multiply boxes by padded side / input side, clip them to the image, leave out those without area",
    ]
