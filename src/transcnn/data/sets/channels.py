"""What the channels of a training split's images hold: how many there are, their ranges, means and deviations."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ...errors import UserError, check_range
from ..bands import LARGEST, MAX_CHANNELS, MOST_OF_PILLOW, RESAMPLING, PixelRange, is_per_channel
from ..broken import NoPhotograph
from ..images import BrokenImage
from ..rasters import is_tiff, tiff_layout
from ..sources.source import abbreviate
from .fault_tolerant import FaultTolerantDataset

__all__ = ["Channels", "measure_channels"]

logger = logging.getLogger(__name__)

LOOKED_AT = 16  # images, for what kind they are
OPENED = 512  # images whose mode is looked at
GREY = ("L", "LA", "1", "I", "I;16", "I;16B", "F")  # modes
DARK = 32  # of 255: below it all looks black
MEASURED = 64  # images whose numbers are gone through
MOST_NUMBERS = 1 << 22  # that means and deviations are of
LIMITS: dict[str, Any] = {"u": np.iinfo, "i": np.iinfo, "f": np.finfo}


@dataclass(frozen=True)
class Channels:
    """What images are made into input by, as far as the training split says it.

    Attributes:
        count: Channels of the images: as asked for, else of Bands their own, 1 if a sample is all grey, else 3.
        pixel_range: Values that are black and white, see ``images.read_image``; a pair for each channel of Bands.
        mean, std: Of each channel on the scale from 0 to 1 that ``pixel_range`` gives; None but for Bands, which are no
            photographs.
    """

    count: int
    pixel_range: PixelRange | None = None
    mean: list[float] | None = None
    std: list[float] | None = None

    @classmethod
    def of(cls, config: dict[str, Any]) -> Channels:
        """From a data config that they were added to."""
        count, ends = config["input_size"][0], config.get("pixel_range")
        return cls(count, ends, config["mean"], config["std"]) if is_per_channel(ends) else cls(count, ends)

    def added_to(self, config: dict[str, Any]) -> dict[str, Any]:
        """timm's data config with what was measured in it; of Bands also ways of resizing that suit any numbers."""
        if self.pixel_range is None:
            return config
        if self.mean is None:
            return {**config, "pixel_range": list(self.pixel_range)}
        plain = config["interpolation"] if config["interpolation"] in RESAMPLING else "bicubic"
        mode = "center" if config.get("crop_mode") == "border" else config.get("crop_mode") or "center"
        ends = [list(pair) for pair in self.pixel_range]  # pyright: ignore
        measured = {"pixel_range": ends, "mean": self.mean, "std": self.std}
        return {**config, **measured, "interpolation": plain, "crop_mode": mode}


def measure_channels(sets: Mapping[str, FaultTolerantDataset | None], in_chans: int | None) -> Channels:
    """What the training split holds; all splits are read by its ``pixel_range`` from now on.

    Args:
        sets: ``train`` among them.
        in_chans: Channels asked for.

    Raises:
        UserError: Images of several numbers of channels, or none of as many as asked for.
    """
    check_range(1, MAX_CHANNELS, in_chans=in_chans)
    train = sets["train"]
    assert train is not None
    # Files at a URL aren't fetched for this, if what is asked for says enough: of these the dtype decides.
    remote = train.groups is not None
    looks = [] if remote and in_chans is not None else [_Look.at(image) for image in _sample(train, LOOKED_AT, [])]
    if (count := _bands_of(train, in_chans, looks)) is not None:
        found = _measured(train, count)
    else:
        _warn_of_dark(looks)
        ends = None if remote else _range_of(looks)
        if ends is not None:  # a brighter image beyond it would be cut off at white
            ends = _range_of([_Look.at(image) for image in _sample(train, MEASURED, [])])
        found = Channels(in_chans or _colours_of(looks), ends)
        if in_chans is None and found.count == 1:
            _warn_of_colours(train)
    for images in sets.values():
        if images is not None:
            images.pixel_range = found.pixel_range
    return found


class _Look(NamedTuple):
    """What kind an image is: its mode, its channels if it is read as Bands, its dtype and ends if these are kept.

    ``most`` is the largest value of 8 bits in its colours.
    """

    mode: str
    channels: int | None
    values: tuple[str, float, float] | None
    most: int = 255

    @classmethod
    def at(cls, image: Any) -> _Look:
        if isinstance(image, NoPhotograph):
            return cls("", image.channels, None)
        bands, ends = image.getbands(), image.getextrema()
        colours = [ends] if len(bands) == 1 else [end for end, band in zip(ends, bands, strict=True) if band != "A"]
        return cls(image.mode, None, image.info.get("values"), max(int(most) for _, most in colours))


def _warn_of_dark(looks: Sequence[_Look]) -> None:
    """Log that images of 8 bits are all nearly black, as those are that were made of fewer bits or of numbers to 1."""
    known = [look.most for look in looks if look.values is None and look.channels is None]
    if known and len(known) == len(looks) and max(known) < DARK:
        logger.warning(
            "%d images from all over the training split are nearly black: no value is above %d of 255. So are read "
            "colours of 16 bits of which only some are used (with --in_chans 3 TIFF's are read whole), and numbers "
            "from 0 to 1 that were written as 8 bits",
            len(known),
            max(known),
        )


def _warn_of_colours(images: FaultTolerantDataset) -> None:
    """Log images in colours among grey ones, as far as the beginnings of their files say."""
    raw: Any = getattr(getattr(images, "source", None), "raw", None)
    coloured = []
    for i in _spread(images, OPENED) if raw is not None and images.groups is None else ():
        with suppress(Exception), Image.open(io.BytesIO(raw(int(images.indices[i])))) as image:  # pyright: ignore
            coloured += [images.name(i)] * (image.mode not in GREY)  # what can't be opened is told where it is read
    if coloured:
        logger.warning(
            "images are read as grey, as nearly all are; %s is not: --in_chans 3 keeps its colours",
            abbreviate(coloured[:1]),
        )


def _bands_of(images: FaultTolerantDataset, in_chans: int | None, looks: Sequence[_Look]) -> int | None:
    """The number of channels of images that are read as Bands; None where Pillow's modes do."""
    if in_chans is not None and in_chans > MOST_OF_PILLOW:
        return in_chans
    held = [look.channels for look in looks if look.channels is not None]
    counts = {*held} if 2 * len(held) > len(looks) else set()  # among photographs it is a damaged one
    if in_chans is not None:
        return in_chans if counts or (looks and _holds_bands(images, in_chans)) else None
    if len(counts) > 1:
        raise UserError(f"images have {' and '.join(map(str, sorted(counts)))} channels; --in_chans takes one number")
    return counts.pop() if counts else None


def _holds_bands(images: FaultTolerantDataset, in_chans: int) -> bool:
    """Whether TIFF files hold exactly so many channels, of which Pillow would give others, or only their first bits."""
    raw: Any = getattr(getattr(images, "source", None), "raw", None)
    for i in _spread(images, LOOKED_AT) if raw is not None and in_chans > 1 else ():
        with suppress(BrokenImage):
            content = raw(int(images.indices[i]))  # pyright: ignore
            if not is_tiff(content[:4]):
                continue
            count, bits = tiff_layout(io.BytesIO(content))
            if count == in_chans and (bits > 8 or len(images.read(i)[0].getbands()) != in_chans):  # else Pillow's do
                return True
    return False


def _measured(images: FaultTolerantDataset, count: int) -> Channels:
    """The range, mean and standard deviation of each channel of up to ``MEASURED`` images from all over a set.

    The range is that of all pixels, the others are of some of each image.
    """
    view = images.with_transform(None, pixel_range=[(0.0, 1.0)] * count)
    least, most = np.full(count, np.inf), np.full(count, -np.inf)
    reasons: list[str] = []
    chosen, eight_bits, rng = [], True, np.random.default_rng(0)
    for bands in _sample(view, MEASURED, reasons):
        values = bands.pixels.reshape(-1, count)
        eight_bits &= values.dtype == np.uint8
        finite = np.isfinite(values)
        least = np.minimum(least, values.min(0, where=finite, initial=LIMITS[values.dtype.kind](values.dtype).max))
        most = np.maximum(most, values.max(0, where=finite, initial=LIMITS[values.dtype.kind](values.dtype).min))
        some = rng.permutation(len(values))[: max(1, MOST_NUMBERS // (MEASURED * count))]
        chosen.append(values[some][finite[some].all(1)].astype(np.float64))
    if not chosen:
        raise UserError(f"none of {len(reasons)} images can be read with {count} channels; the first: {reasons[0]}")
    if eight_bits:
        least, most = np.zeros(count), np.full(count, 255.0)
    numbers = np.concatenate(chosen)
    if not len(numbers) or not np.abs([least, most]).max() <= LARGEST:
        raise UserError(f"a channel of the images holds no numbers, or larger ones than {LARGEST:g}")
    most = np.where(most > least, most, least + np.maximum(1, np.abs(least)))  # a channel that is the same everywhere
    scaled = (numbers - least) / (most - least)
    mean, std = scaled.mean(0), scaled.std(0)
    std = np.where(std > 1e-6, std, 1.0)
    return Channels(count, list(zip(least.tolist(), most.tolist(), strict=True)), mean.tolist(), std.tolist())


def _colours_of(looks: Sequence[_Look]) -> int:
    """1 if images are all grey (transparent or not), else 3."""
    modes = {look.mode for look in looks}
    return 1 if modes and modes <= {"L", "LA"} else 3


def _range_of(looks: Sequence[_Look]) -> tuple[float, float] | None:
    """Which values are black and white in grey images of more than 8 bits.

    The smallest of the common ranges (8, 10, 12, 14 or 16 bits; 0 to 1 for floats) that holds their values, or holds
    them but for a tenth beyond its end; None where the dtype's own range is right, or all images are of 8 bits.
    """
    values = [look.values for look in looks if look.values is not None]
    kinds = {kind == "f" for kind, _, _ in values}
    if len(kinds) != 1 or len(values) < len(looks):
        return None
    low, high = min(entry[1] for entry in values), max(entry[2] for entry in values)
    own, common = (1, (1, 255, 65535)) if kinds == {True} else (65535, (255, 1023, 4095, 16383, 65535))
    if low < 0:
        return low, high
    top = next((float(top) for top in common if high <= 1.1 * top), high)
    return None if top == own else (0.0, top)


def _sample(images: FaultTolerantDataset, count: int, reasons: list[str]) -> Iterator[Any]:
    """Those of up to ``count`` images from all over a set that can be read; why others can't goes to ``reasons``.

    For what is no photograph its error comes.
    """
    for i in _spread(images, count):
        try:
            yield images.read(i)[0]
        except NoPhotograph as error:  # noqa: PERF203
            yield error
        except BrokenImage as error:
            reasons.append(f"{images.name(i)!r}: {error}")


def _spread(images: FaultTolerantDataset, count: int) -> Sequence[int]:
    """Up to ``count`` indices from all over a set, but of one file where files are slow to get."""
    groups = images.groups
    indices = np.arange(len(images)) if groups is None else np.flatnonzero(groups == groups[0])
    return indices[np.linspace(0, len(indices) - 1, min(count, len(indices))).astype(int)].tolist()
