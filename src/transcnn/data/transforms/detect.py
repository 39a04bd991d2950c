"""Transforms of an image together with its boxes and masks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from ..rng import seeded
from .pixels import check_colours, to_pixels, zero_to_one

__all__ = ["DetectTransform"]


class DetectTransform:
    """PIL image and its truth -> float (C, H, W) from 0 to 1, and tensors; the detector resizes and normalises.

    Args:
        in_chans: Channels of the images.
        masks: Whether masks are wanted.
        training: Leave out crowds, flip and jitter colours.
        hflip, vflip: Probabilities.
        color_jitter: Strength of changes of brightness, contrast and saturation.
        bands: Whether images are :class:`~..bands.Bands`, of which there is no ``color_jitter``.
    """

    stacks = False

    def __init__(
        self,
        *,
        in_chans: int = 3,
        masks: bool = False,
        training: bool = False,
        hflip: float = 0.5,
        vflip: float = 0.0,
        color_jitter: float | None = None,
        bands: bool = False,
    ) -> None:
        check_colours(in_chans, bands, color_jitter=color_jitter)
        self.in_chans = in_chans
        self.masks = masks
        self.training = training
        self.flips = (hflip, vflip)
        jitters = color_jitter and in_chans in (1, 3)
        self.colours = v2.ColorJitter(color_jitter, color_jitter, color_jitter) if jitters else None

    def __call__(self, image: Any, truth: Any = None, seed: int = 0) -> tuple[Tensor, Any]:
        pixels = to_pixels(image, self.in_chans)
        target = None if truth is None else self._target(truth, image.size)
        if self.training and target is not None:
            pixels = self._augment(pixels, target, seed)
        return zero_to_one(pixels), target

    def blank(self) -> tuple[Tensor, dict[str, Tensor]]:
        """One black sample, which doesn't count."""
        empty: dict[str, Any] = {"boxes": np.zeros((0, 4), np.float32), "labels": np.zeros(0, np.int64)}
        empty |= {"crowd": np.zeros(0, bool), "area": np.zeros(0, np.float32), "masks": []}
        return torch.zeros(self.in_chans, 32, 32), {**self._target(empty, (32, 32)), "counts": torch.tensor(False)}

    def _target(self, truth: dict[str, Any], size: tuple[int, int]) -> dict[str, Tensor]:
        chosen = np.flatnonzero(~truth["crowd"]) if self.training else np.arange(len(truth["boxes"]))
        target = {name: torch.from_numpy(truth[name][chosen]) for name in ("boxes", "labels", "crowd", "area")}
        if self.masks:
            masks = [truth["masks"][k]() for k in chosen]
            stacked = np.stack(masks) if masks else np.zeros((0, size[1], size[0]), bool)
            target["masks"] = torch.from_numpy(stacked.astype(np.uint8))
        return {**target, "counts": torch.tensor(True)}

    def _augment(self, pixels: Tensor, target: dict[str, Tensor], seed: int) -> Tensor:
        """Random flips and colour jitter; ``target`` is changed in place."""
        rng = np.random.default_rng(seed)
        for dim, probability in zip((-1, -2), self.flips, strict=True):
            if rng.random() < probability:
                pixels = pixels.flip(dim)
                first, last = (0, 2) if dim == -1 else (1, 3)
                boxes = target["boxes"]
                boxes[:, [first, last]] = pixels.shape[dim] - boxes[:, [last, first]]
                if "masks" in target:
                    target["masks"] = target["masks"].flip(dim)
        if self.colours is not None:
            with seeded(int(rng.integers(1 << 62))):
                pixels = self.colours(pixels)
        return pixels
