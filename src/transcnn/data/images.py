"""Reading one image file right, or saying why it can't be read.

Everything that a folder of photographs holds sooner or later is dealt with here and nowhere else: orientation tags,
16-bit and palette images, transparency, CMYK, animations, truncated files, links to nothing, decompression bombs.
"""

from __future__ import annotations

import importlib
import io
import math
import os
import stat
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps

from ..errors import UserError
from .bands import Bands, PixelRange, bands_of_image, check_count, is_per_channel, to_bands
from .broken import BrokenImage, NoPhotograph
from .rasters import is_npy, is_tiff, read_npy, read_tiff

__all__ = [
    "BrokenImage",
    "aspect_limit",
    "crop_extreme_aspect",
    "decode",
    "fit_factor",
    "format_of",
    "grey_to_eight_bits",
    "padding_of",
    "read_bytes",
    "read_colours",
    "read_ids",
    "read_image",
    "read_oriented",
    "read_slice",
    "to_channels",
    "to_eight_bits",
    "upright",
]

# What Pillow may open. Formats that start other programs (EPS) or that nobody trains on are left out.
FORMATS = "JPEG MPO PNG GIF BMP DIB TIFF WEBP AVIF PPM TGA ICO JPEG2000 QOI PCX"
BOMB_PIXELS, BOMB_RATIO = 1 << 24, 10_000  # images of more pixels, and more a byte, are not decoded
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
# In classification the ends of longer images are not looked at; to segment, a long side is resized to at most so many
# times what the short one is meant to be.
MAX_ASPECT_RATIO = 8
MIN_SHORT_SIDE = 8  # pixels that a detector leaves of a short side
LOSSY = ("JPEG", "MPO", "WEBP", "AVIF", "JPEG2000")  # formats that may change pixels
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # by number of channels


def read_image(source: str | os.PathLike[str] | bytes | BinaryIO, pixel_range: PixelRange | None = None) -> Any:
    """Read and decode one image, upright, 8 bits a channel, in mode L, LA, RGB or RGBA; or as :class:`~.bands.Bands`.

    The EXIF orientation is applied; of an animation the first frame is taken; a palette becomes colours (with alpha
    if it has any); CMYK and other colour spaces become RGB. Grey of more than 8 bits is scaled from ``pixel_range`` to
    0..255, and the range of its values is kept in ``image.info["values"]``. Arrays (.npy) of uint8 are read as grey or
    RGB.

    Args:
        source: A path, the bytes of a file, or a binary file object (which stays open).
        pixel_range: Values that are black and white in integer images of more than 8 bits and in float images. None
            goes by the dtype: 0 to 65535 for integers, 0 to 1 for floats. A pair of them for each channel has every
            image read as Bands of so many channels, with the numbers that the file holds.

    Returns:
        An image of Pillow's, or :class:`~.bands.Bands`.

    Raises:
        BrokenImage: No such file, not a regular file, no permission, empty, no known image format, damaged or
            truncated, or more pixels than ``PIL.Image.MAX_IMAGE_PIXELS`` (checked before memory is taken for them).
        NoPhotograph: Channels or numbers that none of Pillow's modes holds, without a ``pixel_range`` for each.
    """
    if isinstance(source, str | os.PathLike):
        with _open_file(source) as file:
            return decode(file, pixel_range)
    if isinstance(source, bytes | bytearray | memoryview):
        if not len(source):
            raise BrokenImage("empty file")
        return decode(io.BytesIO(source), pixel_range)
    return decode(source, pixel_range)


def read_oriented(source: bytes, pixel_range: PixelRange | None = None) -> tuple[Any, int]:
    """As :func:`read_image`, from a file's bytes; also the EXIF orientation (1 to 8) that it was made upright by."""
    if not len(source):
        raise BrokenImage("empty file")
    orientations: list[int] = []

    def finish(image: Any) -> Any:
        orientations.append(_orientation(image))
        return _finished(image, pixel_range)

    return decode(io.BytesIO(source), pixel_range, finish), orientations[0]


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """A file as it lies there; raises BrokenImage with the reason where it can't be read or is empty."""
    with _open_file(path) as file:
        try:
            return file.read()
        except OSError as error:
            raise BrokenImage(error.strerror or str(error)) from error


def read_slice(path: str | os.PathLike[str], offset: int, size: int) -> bytes:
    """A part of a file, where an archive holds an image; raises BrokenImage where it can't be read or ends before."""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            content = file.read(size)
    except OSError as error:
        raise BrokenImage(error.strerror or str(error)) from error
    if len(content) < size:
        raise BrokenImage(f"{os.path.basename(path)} ends within it")
    return content


def read_ids(source: bytes) -> tuple[np.ndarray, list[int] | None]:
    """Read a label map: an image whose pixels are class ids, and its palette (r, g, b, r, ...) if it has one.

    Grey images of 8 or 16 bits, palette images, whose indices are the ids, and arrays of integers; (H, W) of int32.

    Raises:
        BrokenImage: As for :func:`read_image`, or an image of colours or with lossy compression.
    """
    if not len(source):
        raise BrokenImage("empty file")
    image = decode(io.BytesIO(source), finish=lambda image: image)
    if isinstance(image, Bands):
        if image.channels != 1 or image.pixels.dtype.kind not in "iu":
            raise BrokenImage(f"a label map must hold class ids, one integer a pixel, not {image.mode}")
        return image.pixels[..., 0].clip(-1, 1 << 16).astype(np.int32), None
    if image.format in LOSSY:
        raise BrokenImage(f"a label map must not be {image.format}, which changes class ids")
    if image.mode not in ("1", "L", "P", "I", "I;16", "I;16B", "I;16L"):
        raise BrokenImage(f"a label map must hold class ids (grey or palette), not {image.mode} colours")
    return np.asarray(image).astype(np.int32), image.getpalette() if image.mode == "P" else None


def read_colours(source: bytes) -> np.ndarray:
    """Read a label map whose pixels are colours: (H, W, 3) of uint8.

    Raises:
        BrokenImage: As for :func:`read_ids`, but for grey images and palettes, whose colours count.
    """
    if not len(source):
        raise BrokenImage("empty file")
    image = decode(io.BytesIO(source), finish=lambda image: image)
    if image.format in LOSSY:
        raise BrokenImage(f"a label map must not be {image.format}, which changes colours")
    return np.asarray(image.convert("RGB"))


def to_channels(image: Any, in_chans: int) -> Any:
    """Give the image 1 (L), 2 (LA), 3 (RGB) or 4 (RGBA) channels; where alpha goes, the image is put on white.

    :class:`~.bands.Bands` stay as they are: channels of theirs stand for no others.

    Raises:
        UserError: ``in_chans`` is not 1, 2, 3 or 4.
        BrokenImage: Bands of another number.
    """
    if isinstance(image, Bands):
        check_count(image.channels, in_chans)
        return image
    if in_chans not in MODES:
        raise UserError(f"images have 1, 2, 3 or 4 channels (L, LA, RGB, RGBA), got in_chans={in_chans}")
    mode = MODES[in_chans]
    if image.mode == mode:
        return image
    if in_chans in (1, 3) and image.mode in ("LA", "RGBA"):
        alpha = image.getchannel("A")
        image = image.convert(image.mode[:-1])
        if alpha.getextrema() != (255, 255):
            image = Image.composite(image, Image.new(image.mode, image.size, "white"), alpha)
    if mode == "LA" and image.mode == "RGB":
        image = image.convert("L")
    elif mode == "RGBA" and image.mode == "LA":
        return image.convert("RGBA")
    return image.convert(mode)


def aspect_limit(size: Sequence[int], crop_pct: float = 1.0) -> int:
    """The aspect ratio beyond which a crop of the centre at ``size`` sees nothing of an image's ends.

    Args:
        size: Height and width of the crop.
        crop_pct: The image is resized to cover ``size / crop_pct``.
    """
    short, long = sorted(math.floor(side / crop_pct) for side in size)
    return max(MAX_ASPECT_RATIO, -(-long // short))


def crop_extreme_aspect(image: Any, limit: int = MAX_ASPECT_RATIO) -> Any:
    """Crop the ends of an image whose aspect ratio is above ``limit``: resized by its short side it would be huge.

    What is cropped lies outside the centre crop of evaluation.
    """
    width, height = image.size
    if max(width, height) <= limit * min(width, height):
        return image
    keep_width, keep_height = min(width, limit * height), min(height, limit * width)
    left, top = (width - keep_width) // 2, (height - keep_height) // 2
    return image.crop((left, top, left + keep_width, top + keep_height))


def fit_factor(size: tuple[int, int], short_side: int) -> float:
    """What an image's sides are multiplied by so that the short one is ``short_side``, and the long one not huge."""
    return min(short_side / min(size), MAX_ASPECT_RATIO * short_side / max(size))


def padding_of(size: tuple[int, int], long_side: int) -> tuple[int, int]:
    """Rows below and columns beside an image of (width, height) that a detector adds: its short side would vanish.

    At least ``MIN_SHORT_SIDE`` pixels of it are left when the longer side becomes ``long_side``.
    """
    width, height = size
    least = math.ceil(max(size) * MIN_SHORT_SIDE / long_side)
    return max(0, least - height), max(0, least - width)


def _open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file; anything else (a pipe would wait for ever) is refused by what it is."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise BrokenImage("is a folder" if stat.S_ISDIR(status.st_mode) else "is not a regular file")
        if not status.st_size:
            raise BrokenImage("empty file")
        return Path(path).open("rb")
    except FileNotFoundError as error:
        raise BrokenImage("a link to nothing" if os.path.islink(path) else "no such file") from error
    except PermissionError as error:
        raise BrokenImage("no permission to read it") from error
    except OSError as error:  # link loops, names that are too long, disks that fail
        raise BrokenImage(error.strerror or str(error)) from error
    except ValueError as error:
        if isinstance(error, BrokenImage):
            raise
        raise BrokenImage(str(error)) from error  # a null byte in the name


def decode(file: BinaryIO, pixel_range: PixelRange | None = None, finish: Callable[[Any], Any] | None = None) -> Any:
    """Open and decode a file; ``finish`` (else: upright, 8 bits a channel) makes the result of what it holds."""
    Image.init()
    limit = Image.MAX_IMAGE_PIXELS
    try:
        if (read := _beyond_pillow(file, pixel_range)) is not None:
            return finish(read) if finish else _finished(read, pixel_range)
        with warnings.catch_warnings():
            # Pillow only warns up to twice its limit; the check below refuses what it warns of. Its other warnings
            # are about damaged metadata, which doesn't concern us.
            warnings.simplefilter("ignore")
            formats = FORMATS.split()
            if _is_heif(file):
                _register_heif()
                formats.append("HEIF")
            image = Image.open(file, formats=[name for name in formats if name in Image.OPEN])
            if limit and image.width * image.height > limit:
                raise BrokenImage(_too_large(image.size, limit))
            if image.width * image.height > max(BOMB_PIXELS, BOMB_RATIO * _length(file)):
                raise BrokenImage(f"a decompression bomb: {image.width}x{image.height} pixels of {_length(file)} bytes")
            image.load()
            if image.format == "PNG":
                _check_png(file)
            return finish(image) if finish else _finished(image, pixel_range)
    except BrokenImage:
        raise
    except Image.UnidentifiedImageError as error:
        if is_tiff(_head(file)):  # of a kind that Pillow has no mode for
            read = to_bands(read_tiff(file), None, "TIFF")
            return finish(read) if finish else _finished(read, pixel_range)
        raise BrokenImage("not an image, or of a format that is not read here") from error
    except Image.DecompressionBombError as error:
        raise BrokenImage(f"{error}".split(", could")[0]) from error
    except MemoryError as error:  # a damaged file may ask for more than there is, too
        raise BrokenImage("not enough memory to decode it") from error
    except Exception as error:  # decoders raise nearly anything on damaged data
        raise BrokenImage(f"damaged: {error or type(error).__name__}") from error


def _beyond_pillow(file: BinaryIO, pixel_range: PixelRange | None) -> Any:
    """What isn't read by Pillow: arrays, and TIFF where images are read as Bands; None for all else."""
    head = _head(file)
    ranges = pixel_range if is_per_channel(pixel_range) else None
    if is_npy(head):
        pixels = read_npy(file)
        if ranges is None and pixels.dtype == np.uint8 and (pixels.ndim == 2 or pixels.shape[2:] in ((1,), (3,))):
            return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels))
        return to_bands(pixels, ranges, "NPY")
    if ranges is not None and is_tiff(head):
        return to_bands(read_tiff(file, len(ranges)), ranges, "TIFF")
    return None


def _finished(image: Any, pixel_range: PixelRange | None) -> Any:
    """An image of Pillow's upright and in 8 bits a channel, or as Bands; Bands stay."""
    if isinstance(image, Bands):
        if not is_per_channel(pixel_range):
            raise NoPhotograph(image.channels, image.pixels.dtype.name)
        return image
    if is_per_channel(pixel_range):
        return bands_of_image(upright(image), pixel_range)
    return to_eight_bits(upright(image), pixel_range)


def _head(file: BinaryIO) -> bytes:
    """The first bytes of a file, which is left at its beginning."""
    file.seek(0)
    head = file.read(12)
    file.seek(0)
    return head


def format_of(source: bytes) -> str:
    """The kind of an image's file as Pillow names it, by its beginning; ``NPY`` of an array. Pillow's errors."""
    if is_npy(source[:6]):
        return "NPY"
    if is_tiff(source[:4]):
        return "TIFF"
    with Image.open(io.BytesIO(source)) as image:
        return str(image.format)


def _length(file: BinaryIO) -> int:
    """The size of an open file in bytes; its position stays."""
    position = file.tell()
    length = file.seek(0, os.SEEK_END)
    file.seek(position)
    return length


def _is_heif(file: BinaryIO) -> bool:
    head = _head(file)
    return head[4:8] == b"ftyp" and head[8:12] in HEIF_BRANDS


def _register_heif() -> None:
    """Let Pillow read HEIC; raises BrokenImage where the library for it is missing."""
    try:
        heif = importlib.import_module("pillow_heif")
    except ImportError as error:
        raise BrokenImage("HEIC images are read where pillow-heif is installed (pip install pillow-heif)") from error
    heif.register_heif_opener()


def _too_large(size: tuple[int, int], limit: int) -> str:
    return f"{size[0]}x{size[1]} pixels are more than the limit of {limit} (PIL.Image.MAX_IMAGE_PIXELS)"


def _check_png(file: BinaryIO) -> None:
    """Pillow doesn't look at the checksums of the pixel data; its ``verify`` does, on a file opened afresh."""
    file.seek(0)
    with Image.open(file, formats=["PNG"]) as image:
        image.verify()


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF
        return 1
    return value if value in range(1, 9) else 1


def upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF: the pixels are fine
        return image


def to_eight_bits(image: Image.Image, pixel_range: PixelRange | None = None) -> Image.Image:
    """In mode L, LA, RGB or RGBA."""
    if image.mode in MODES.values() and "transparency" not in image.info:
        return image
    if image.mode in ("P", "PA"):
        return image.convert("RGBA" if image.has_transparency_data else "RGB")
    if image.mode == "1":
        return image.convert("L")
    if image.mode in ("L", "RGB"):  # one grey value or colour stands for transparent
        return image.convert("LA" if image.mode == "L" else "RGBA")
    if image.mode in ("La", "RGBa"):  # premultiplied
        return image.convert(image.mode.upper())
    if image.mode[0] in "IF":
        return grey_to_eight_bits(np.asarray(image), pixel_range)
    if image.mode in MODES.values():
        return image
    return image.convert("RGB")


def grey_to_eight_bits(values: np.ndarray, pixel_range: PixelRange | None) -> Image.Image:
    """(H, W) of integers or floats -> mode L, some rows at a time, so that large images take little more memory."""
    ends: Any = pixel_range  # two numbers: those of channels are for Bands
    low, high = ends or ((0, 65535) if values.dtype.kind in "iu" else (0, 1))
    scale = np.float32(255 / max(high - low, 1e-12))
    result = np.empty(values.shape, np.uint8)
    least, most = np.inf, -np.inf
    step = max(1, (1 << 20) // max(1, values.shape[1]))
    for top in range(0, len(values), step):
        rows = values[top : top + step]
        if rows.dtype.kind == "f":
            finite = np.isfinite(rows)
            rows = np.where(finite, rows, np.where(rows == np.inf, high, low))
        least, most = min(least, float(rows.min())), max(most, float(rows.max()))
        result[top : top + step] = ((rows.astype(np.float32) - np.float32(low)) * scale + 0.5).clip(0, 255)
    image = Image.fromarray(result)
    image.info["values"] = (values.dtype.kind, least, most)
    return image
