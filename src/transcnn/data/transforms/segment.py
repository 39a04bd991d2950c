"""Transforms of an image together with its label map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

from ...errors import UserError
from ..images import fit_factor
from ..rng import seeded
from .classify import IMAGENET_MEAN, IMAGENET_STD, channel_stats
from .pixels import check_colours, to_pixels, zero_to_one

__all__ = ["IGNORE", "EvalTransform", "TrainTransform"]

IGNORE = -1  # index of pixels that don't count


class EvalTransform:
    """PIL image and label map -> float (C, h, w), normalised, and int64 (H, W): all of the image, whatever its size.

    Args:
        resize: Short side that images are resized to; None leaves them. The label map keeps its size: scores are
            measured there.
    """

    stacks = False

    def __init__(
        self,
        *,
        in_chans: int = 3,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        resize: int | None = None,
    ) -> None:
        self.in_chans = in_chans
        self.mean = channel_stats(mean, in_chans)
        self.std = channel_stats(std, in_chans)
        self.resize = resize

    def __call__(self, image: Any, truth: Any = None, seed: int = 0) -> tuple[Tensor, Any]:
        pixels = self.normalise(self.scale(self.pixels(image)))
        return pixels, None if truth is None else torch.from_numpy(truth.astype(np.int64))

    def blank(self) -> tuple[Tensor, Tensor]:
        """One black sample, none of whose pixels count."""
        return torch.zeros(self.in_chans, 32, 32), torch.full((32, 32), IGNORE)

    def pixels(self, image: Any) -> Tensor:
        """uint8 (C, H, W), of Bands float32."""
        return to_pixels(image, self.in_chans)

    def scale(self, pixels: Tensor) -> Tensor:
        """The short side as ``resize`` says."""
        factor = self.factor(*pixels.shape[-2:])
        if factor == 1:
            return pixels
        size = [max(1, round(side * factor)) for side in pixels.shape[-2:]]
        return tvf.resize(pixels, size, antialias=True)

    def factor(self, height: int, width: int) -> float:
        """The scale factor of the first resize."""
        return fit_factor((width, height), self.resize) if self.resize else 1.0

    def normalise(self, pixels: Tensor) -> Tensor:
        """From 0 to 255 -> float with the network's mean and standard deviation."""
        return tvf.normalize(zero_to_one(pixels), list(self.mean), list(self.std))


class TrainTransform(EvalTransform):
    """A random crop at a random scale of image and label map, flipped, with colour jitter.

    The crop is taken before it is resized, so that large images cost no more than small ones. Where it leaves the
    image there is the mean colour, which doesn't count.

    Args:
        crop: Height and width of what comes out.
        scale_range: Smallest and largest enlargement, relative to the image as ``resize`` leaves it.
        hflip, vflip: Probabilities.
        color_jitter: Strength of changes of brightness, contrast and saturation.
        bands: Whether images are :class:`~..bands.Bands`, of which there is no ``color_jitter``.
    """

    stacks = True

    def __init__(
        self,
        crop: tuple[int, int],
        *,
        scale_range: tuple[float, float] = (0.5, 2.0),
        hflip: float = 0.5,
        vflip: float = 0.0,
        color_jitter: float | None = None,
        bands: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        check_colours(self.in_chans, bands, color_jitter=color_jitter)
        low, high = scale_range
        if not 0 < low <= high:
            raise UserError(f"scale_range must be two numbers above 0, the smaller first, got {list(scale_range)}")
        self.crop = crop
        self.scale_range = scale_range
        self.flips = (hflip, vflip)
        jitters = color_jitter and self.in_chans in (1, 3)
        self.colours = v2.ColorJitter(color_jitter, color_jitter, color_jitter) if jitters else None

    def __call__(self, image: Any, truth: Any = None, seed: int = 0) -> tuple[Tensor, Any]:
        rng = np.random.default_rng(seed)
        pixels, label = self.pixels(image), torch.from_numpy(truth)[None]  # (C, H, W), (1, H, W)
        height, width = pixels.shape[-2:]
        factor = self.factor(height, width) * rng.uniform(*self.scale_range)
        window = [max(1, round(side / factor)) for side in self.crop]
        top, left = (_start(rng, size, side) for size, side in zip((height, width), window, strict=True))
        fill = [round(255 * value) for value in self.mean]
        pixels, label = _crop(pixels, top, left, window, fill), _crop(label, top, left, window, [IGNORE])
        if window != list(self.crop):
            pixels, label = (
                tvf.resize(pixels, list(self.crop), antialias=True),
                tvf.resize(label, list(self.crop), tvf.InterpolationMode.NEAREST_EXACT),
            )
        for probability, flip in zip(self.flips, (tvf.horizontal_flip, tvf.vertical_flip), strict=True):
            if rng.random() < probability:
                pixels, label = flip(pixels), flip(label)
        if self.colours is not None:
            with seeded(int(rng.integers(1 << 62))):
                pixels = self.colours(pixels)
        return self.normalise(pixels), label[0].long()

    def blank(self) -> tuple[Tensor, Tensor]:
        """One black sample, none of whose pixels count."""
        return torch.zeros(self.in_chans, *self.crop), torch.full(self.crop, IGNORE)


def _start(rng: np.random.Generator, size: int, window: int) -> int:
    """Where a window begins: anywhere inside, or, where it is larger, so that all of the image is in it."""
    low, high = sorted((0, size - window))
    return int(rng.integers(low, high + 1))


def _crop(pixels: Tensor, top: int, left: int, window: Sequence[int], fill: Sequence[float]) -> Tensor:
    """The window of (C, H, W); outside of the image each channel has its value of ``fill``."""
    height, width = pixels.shape[-2:]
    inside = pixels[:, max(0, top) : max(0, top + window[0]), max(0, left) : max(0, left + window[1])]
    right, bottom = max(0, left + window[1] - width), max(0, top + window[0] - height)
    return tvf.pad(inside, [max(0, -left), max(0, -top), right, bottom], list(fill))
