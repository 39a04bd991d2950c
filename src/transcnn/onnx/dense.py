"""Segmentation and detection by an exported file: from an image to the network's input, and from its output back.

The same numbers as the checkpoint's way through torch and torchvision, with Pillow and numpy alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from ..data.images import fit_factor, padding_of, to_channels

__all__ = ["bilinear", "class_logits", "class_map", "detections", "window_starts"]

Network = Callable[[np.ndarray], dict[str, np.ndarray]]


def class_map(network: Network, image: Image.Image, info: dict[str, Any]) -> np.ndarray:
    """The most probable class of each pixel of an image, (H, W); the arguments are those of :func:`class_logits`."""
    return class_logits(network, image, info).argmax(0)


def class_logits(network: Network, image: Image.Image, info: dict[str, Any]) -> np.ndarray:
    """The logits of each pixel of an image, (classes, H, W); of windows and mirror images together their logarithms.

    Args:
        network: (1, C, h, w) of any size to ``logits`` (1, classes, h, w).
        image: As :func:`transcnn.data.images.read_image` gives it.
        info: What the exported file holds.
    """
    args, config = info["task_args"], info["data_config"]
    resized = to_channels(image, config["input_size"][0])
    if args.get("resize"):
        factor = fit_factor(resized.size, args["resize"])
        width, height = (max(1, round(side * factor)) for side in resized.size)
        resized = resized.resize((width, height), Image.Resampling.BILINEAR)
    pixels = _normalised(_scaled(resized), config)[None]
    logits = _in_windows(network, pixels, args.get("window"))
    if args.get("flip"):
        mirrored = _in_windows(network, np.ascontiguousarray(pixels[..., ::-1]), args.get("window"))
        with np.errstate(invalid="ignore"):  # of a damaged file's NaN
            logits = np.logaddexp(_log_softmax(logits), _log_softmax(mirrored)[..., ::-1])
    if logits.shape[1:] != (image.height, image.width):
        logits = bilinear(logits, (image.height, image.width))
    return logits


def detections(network: Network, image: Image.Image, info: dict[str, Any]) -> dict[str, np.ndarray]:
    """What is in an image: ``boxes`` (N, 4), ``scores``, ``labels``, perhaps ``masks`` (N, 1, H, W).

    Args:
        network: (1, C, h, w) of any size to a detector's outputs (:class:`transcnn.export.detect.DetectorGraph`).
        image: As :func:`transcnn.data.images.read_image` gives it.
        info: What the exported file holds.
    """
    args, config = info["task_args"], info["data_config"]
    pixels = _scaled(to_channels(image, config["input_size"][0]))  # (C, H, W)
    below, beside = padding_of(image.size, args["long_side"])
    pixels = _normalised(np.pad(pixels, ((0, 0), (0, below), (0, beside))), config)
    full = pixels.shape[1:]
    scale = min(args["short_side"] / min(full), args["long_side"] / max(full))
    height, width = (math.floor(side * scale) for side in full)
    output = network(bilinear(pixels, (height, width))[None])
    boxes = output["boxes"] * np.array([full[1] / width, full[0] / height] * 2, np.float32)
    found = {"boxes": boxes, "scores": output["scores"], "labels": output["labels"]}
    if "masks" in output:
        found["masks"] = _pasted(output["masks"], boxes, full)[..., : image.height, : image.width]
    found["boxes"] = np.clip(boxes, 0, np.array([image.width, image.height] * 2, np.float32))
    inside = (found["boxes"][:, 2:] > found["boxes"][:, :2]).all(1)  # not in the padding alone
    return {name: value[inside] for name, value in found.items()}


def bilinear(maps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(..., h, w) -> (..., H, W) with corners that aren't aligned and no smoothing, as torch's ``interpolate``."""
    for axis, new in zip((-2, -1), size, strict=True):
        old = maps.shape[axis]
        source = np.maximum((np.arange(new, dtype=np.float32) + 0.5) * np.float32(old / new) - 0.5, 0)
        first = np.minimum(source.astype(np.int64), old - 1)
        weight = (source - first).astype(np.float32)
        weight = weight[:, None] if axis == -2 else weight
        near, far = (np.take(maps, indices, axis) for indices in (first, np.minimum(first + 1, old - 1)))
        maps = near * (1 - weight) + far * weight
    return maps


def window_starts(full: int, window: int) -> list[int]:
    """First pixels of windows that cover ``full`` evenly and overlap by a third or more."""
    if full <= window:
        return [0]
    count = math.ceil((full - window) / (window * 2 / 3)) + 1
    return [round(i * (full - window) / (count - 1)) for i in range(count)]


def _in_windows(network: Network, pixels: np.ndarray, window: int | None) -> np.ndarray:
    """(1, C, H, W) -> logits (classes, H, W), or logarithms of summed probabilities where there are windows."""
    height, width = pixels.shape[-2:]
    if window is None or (height <= window and width <= window):
        return network(pixels)["logits"][0]
    total: Any = 0.0
    for top in window_starts(height, window):
        for left in window_starts(width, window):
            window_slice = (..., slice(top, top + window), slice(left, left + window))
            logits = network(np.ascontiguousarray(pixels[window_slice]))["logits"][0]
            if isinstance(total, float):
                total = np.zeros((len(logits), height, width), np.float32)
            total[window_slice] += np.exp(_log_softmax(logits))
    return np.log(np.maximum(total, 1e-12))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits - logits.max(0)
    return logits - np.log(np.exp(logits).sum(0))


def _scaled(image: Image.Image) -> np.ndarray:
    """float32 (C, H, W) from 0 to 1."""
    return np.atleast_3d(np.asarray(image, np.float32)).transpose(2, 0, 1) / np.float32(255)


def _normalised(pixels: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    mean, std = (np.array(config[key], np.float32)[:, None, None] for key in ("mean", "std"))
    return (pixels - mean) / std


def _pasted(masks: np.ndarray, boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Masks (N, S, S) of boxes at their positions in the image, (N, 1, H, W), with the border that torchvision adds."""
    side = masks.shape[-1]
    masks = np.pad(masks, ((0, 0), (1, 1), (1, 1)))
    half = (boxes[:, 2:] - boxes[:, :2]) / 2 * np.float32((side + 2) / side)
    centre = (boxes[:, 2:] + boxes[:, :2]) / 2
    whole = np.zeros((len(masks), 1, *size), np.float32)
    corners = np.concatenate([centre - half, centre + half], 1).astype(np.int64).tolist()
    for target, mask, (left, top, right, bottom) in zip(whole[:, 0], masks, corners, strict=True):
        pasted = bilinear(mask, (max(bottom - top + 1, 1), max(right - left + 1, 1)))
        x, y = max(left, 0), max(top, 0)
        right, bottom = min(right + 1, size[1]), min(bottom + 1, size[0])
        target[y:bottom, x:right] = pasted[y - top : bottom - top, x - left : right - left]
    return whole
