"""From an image to a tensor of its pixels, on the scale of 8-bit images."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

from ...errors import UserError
from ..bands import Bands
from ..images import to_channels

__all__ = ["check_colours", "to_pixels", "zero_to_one"]


def to_pixels(image: Any, in_chans: int) -> Tensor:
    """An image as uint8 (C, H, W), of :class:`~..bands.Bands` float32, its range from 0 to 255."""
    image = to_channels(image, in_chans)
    if isinstance(image, Bands):
        return torch.from_numpy(np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)))
    return tvf.pil_to_tensor(image)


def zero_to_one(pixels: Tensor) -> Tensor:
    """What :func:`to_pixels` gives as float32 from 0 to 1."""
    return pixels / 255 if pixels.is_floating_point() else tvf.to_dtype(pixels, torch.float32, scale=True)


def check_colours(in_chans: int, bands: bool, **settings: Any) -> None:
    """See that nothing is asked for that knows only colours of 8 bits.

    Args:
        in_chans: Channels of the images.
        bands: Whether they are read as :class:`~..bands.Bands`.
        settings: Augmentation by its names.

    Raises:
        UserError: Something is.
    """
    for name, value in settings.items():
        if bands and value:
            raise UserError(
                f"{name} changes the colours of 8-bit photographs, and these images are read as {in_chans} channels of "
                f"any numbers: leave {name}={value} out"
            )
