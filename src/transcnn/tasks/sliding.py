"""Sliding-window inference and test-time flipping: what networks trained on small crops gain from."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import UserError
from ..onnx.dense import window_starts

__all__ = ["average", "sliding_window_inference"]


def sliding_window_inference(
    network: Callable[[Tensor], Tensor], images: Tensor, classes: int, *, window: int | None = None, flip: bool = False
) -> Tensor:
    """Logits of images, (B, C, H, W) -> (B, classes, H, W) as float32; averages are of probabilities, as logarithms.

    Args:
        network: (B, C, h, w) of any size to logits (B, classes, h, w).
        window: Side of windows that overlap by a third of it or more; None is the image as a whole.
        flip: Average with the prediction for the mirrored image.
    """
    if window is not None and window < 32:
        raise UserError(f"window must be 32 or more pixels, got {window}")
    if not flip:
        return _windows(network, images, classes, window)
    both = [_windows(network, x, classes, window) for x in (images, images.flip(-1))]
    return average(both[0], both[1].flip(-1))


def average(*logits: Tensor) -> Tensor:
    """The mean of the probabilities of logits (B, classes, ...), as logarithms."""
    return torch.stack([each.log_softmax(1) for each in logits]).logsumexp(0) - math.log(len(logits))


def _windows(network: Callable[[Tensor], Tensor], images: Tensor, classes: int, window: int | None) -> Tensor:
    height, width = images.shape[-2:]
    if window is None or (height <= window and width <= window):
        return network(images).float()
    total = images.new_zeros(len(images), classes, height, width, dtype=torch.float32)
    for top in window_starts(height, window):
        for left in window_starts(width, window):
            part = (..., slice(top, top + window), slice(left, left + window))
            total[part] += network(images[part]).float().softmax(1)
    return total.clamp_min(1e-12).log()  # counts of windows are the same for all classes of a pixel
