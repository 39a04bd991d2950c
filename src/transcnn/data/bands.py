"""Images of any number of channels and any numbers: what satellites, microscopes and other instruments give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias, TypeGuard

import numpy as np
from PIL import Image

from .broken import BrokenImage

__all__ = [
    "LARGEST",
    "MAX_CHANNELS",
    "MOST_OF_PILLOW",
    "RESAMPLING",
    "Bands",
    "PixelRange",
    "bands_of_image",
    "check_count",
    "is_per_channel",
    "to_bands",
]

MAX_CHANNELS = 1024
MOST_OF_PILLOW = 4  # channels that images of Pillow's may have
LARGEST = 1e30  # number in an image; float32 holds little more
RESAMPLING = ("nearest", "bilinear", "bicubic")  # that suit any numbers
DISPLAYED = (2, 98)  # percentiles of a channel that are black and white where people look at it

# Two numbers: what is black and white in grey images of more than 8 bits. A pair of them for each channel: images are
# read as Bands of so many channels.
PixelRange: TypeAlias = Sequence[float] | Sequence[Sequence[float]]


class Bands:
    """An image of any number of channels, in the place of one of Pillow's.

    It has what the way from a file to a network asks of an image. ``np.asarray(bands)`` is float32 (H, W, C) with each
    channel's range on the scale of 8-bit images, 0 to 255, so that all that follows is the same for both; values
    outside of the range stay outside, NaN becomes 0 and infinity an end of the range.

    Args:
        pixels: (H, W, C) of numbers as they were stored.
        pixel_range: For each channel the values that become 0 and 255. None goes by the dtype: 0 to 255 for uint8, 0 to
            65535 for other integers, 0 to 1 for floats.
        format: The kind of file, as Pillow would name it.
    """

    n_frames = 1

    def __init__(
        self, pixels: np.ndarray, pixel_range: Sequence[Sequence[float]] | None = None, format: str | None = None
    ) -> None:
        self.pixels = pixels
        self.pixel_range = pixel_range
        self.format = format
        self.info: dict[str, Any] = {}

    @property
    def height(self) -> int:
        """Rows."""
        return self.pixels.shape[0]

    @property
    def width(self) -> int:
        """Columns."""
        return self.pixels.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.width, self.height

    @property
    def channels(self) -> int:
        """How many there are."""
        return self.pixels.shape[2]

    @property
    def mode(self) -> str:
        """Channels and dtype, such as ``7 x uint16``: none of Pillow's modes."""
        return f"{self.channels} x {self.pixels.dtype.name}"

    def crop(self, box: tuple[int, int, int, int]) -> Bands:
        """The part from (left, top) to (right, bottom), which lies inside."""
        left, top, right, bottom = box
        return Bands(self.pixels[top:bottom, left:right], self.pixel_range, self.format)

    def resize(
        self, size: tuple[int, int], resample: int = Image.Resampling.BICUBIC, box: Any = None
    ) -> Bands:  # Pillow's names
        """At another (width, height), by Pillow's filters, on float32."""
        channels = [
            np.asarray(Image.fromarray(channel).resize(size, Image.Resampling(resample), box))
            for channel in np.ascontiguousarray(np.asarray(self).transpose(2, 0, 1))
        ]
        return Bands(np.stack(channels, axis=-1), [(0, 255)] * self.channels, self.format)

    def convert(self, mode: str) -> Image.Image:
        """For people's eyes, in a mode of Pillow's: the first three channels as red, green and blue, else the first.

        But for uint8, each is stretched so that 2 % of it are black and 2 % white.
        """
        shown = self.pixels[..., : 3 if self.channels >= 3 else 1]
        if shown.dtype != np.uint8:
            shown = np.stack([_stretched(shown[..., c]) for c in range(shown.shape[2])], axis=-1)
        image = Image.fromarray(np.ascontiguousarray(shown if shown.shape[2] == 3 else shown[..., 0]))
        return image.convert(mode)

    def tobytes(self) -> bytes:
        """What is equal for equal pixels."""
        return np.ascontiguousarray(self.pixels).tobytes()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        wide = self.pixels.dtype.itemsize > 2 and self.pixels.dtype != np.float32
        values = self.pixels.astype(np.float64 if wide else np.float32)
        ends = self.pixel_range or [_range_of(self.pixels.dtype)] * self.channels
        low, high = np.array(ends, values.dtype).T
        if self.pixels.dtype.kind == "f" and not (finite := np.isfinite(values)).all():
            values = np.where(finite, values, np.where(values == np.inf, high, low))
        values -= low
        values *= 255 / (high - low)
        return values.astype(dtype or np.float32, copy=False)


def is_per_channel(pixel_range: Any) -> TypeGuard[Sequence[Sequence[float]]]:
    """Whether a pixel range is one for each channel, so that images are read as :class:`Bands`."""
    return bool(pixel_range) and isinstance(pixel_range[0], list | tuple)


def to_bands(pixels: np.ndarray, pixel_range: Sequence[Sequence[float]] | None, format: str | None) -> Bands:
    """An array (H, W) or (H, W, C) as an image.

    Raises:
        BrokenImage: It is none, or one of another number of channels than ``pixel_range`` is for.
    """
    if pixels.dtype.kind not in "buif" or pixels.ndim not in (2, 3) or not pixels.size:
        raise BrokenImage(f"no image: (H, W) or (H, W, C) of numbers is one, got {pixels.shape} of {pixels.dtype}")
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    first, *_, channels = pixels.shape
    wanted = None if pixel_range is None else len(pixel_range)
    turned = "; arrays are (H, W, C): numpy.moveaxis(array, 0, -1) makes (C, H, W) so"
    if wanted is not None:
        check_count(channels, wanted, hint=turned * (first == wanted))
    elif first < 32 <= min(pixels.shape[1:]):
        raise BrokenImage(f"{pixels.shape} would be {channels} channels{turned}; --in_chans {channels} takes it as is")
    if channels > MAX_CHANNELS:
        raise BrokenImage(f"it has {channels} channels; at most {MAX_CHANNELS} are read")
    if pixels.dtype.kind == "b":
        pixels = pixels.astype(np.uint8)
    return Bands(pixels, pixel_range, format)


def check_count(channels: int, wanted: int, *, hint: str = "") -> None:
    """Raise BrokenImage for another number of channels than is wanted; none stand for others."""
    if channels != wanted:
        words = f"it has {channels} channel{'s' * (channels != 1)}, {wanted} {'are' if wanted != 1 else 'is'} wanted"
        raise BrokenImage(words + hint)


def bands_of_image(image: Image.Image, pixel_range: Sequence[Sequence[float]]) -> Bands:
    """An image of Pillow's as :class:`Bands`; palettes become colours.

    Raises:
        BrokenImage: It has another number of channels.
    """
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    return to_bands(np.asarray(image), pixel_range, image.format)


def _range_of(dtype: np.dtype) -> tuple[float, float]:
    return (0, 1) if dtype.kind == "f" else (0, 255) if dtype == np.uint8 else (0, 65535)


def _stretched(channel: np.ndarray) -> np.ndarray:
    """(H, W) of any numbers -> uint8, as :meth:`Bands.convert` says."""
    step = max(1, channel.size // (1 << 20))
    sample = channel.ravel()[::step].astype(np.float64)
    sample = sample[np.isfinite(sample)]
    low, high = np.percentile(sample, DISPLAYED) if len(sample) else (0.0, 1.0)
    values = np.nan_to_num(channel.astype(np.float64), nan=low, posinf=high, neginf=low)
    return ((values - low) * (255 / max(high - low, 1e-30)) + 0.5).clip(0, 255).astype(np.uint8)
