"""Reading arrays of any number of channels from files: NumPy's .npy, and TIFF of several bands or pages.

Files may be anybody's: what they would take is known from their headers, and refused, before memory is taken for it.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from ..errors import first_line
from .bands import MAX_CHANNELS
from .broken import BrokenImage

__all__ = ["is_npy", "is_tiff", "read_npy", "read_tiff", "tiff_layout"]

MAX_BYTES = 1 << 30  # of an image's numbers
BOMB_BYTES, BOMB_RATIO = 1 << 26, 1000  # numbers of more bytes, and more a byte of file, are not decoded
MAX_HEADER = 10_000  # characters of a .npy file's header, NumPy's own limit
# TIFF's codes: what is decoded here, each within bounds. Those of photographs (JPEG and others) are Pillow's business.
PLAIN, PACKED = {1, 32773}, {5, 8, 32946, 34925, 50000}  # none, PackBits; LZW, Deflate (two codes), LZMA, Zstandard
PALETTE = 3  # of photometric interpretations
ORIENTATION = 274  # a tag; its values but for 1, upright:
TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).swapaxes(0, 1),
    8: np.rot90,
}
REDUCED_OR_MASK = 1 | 4  # bits of a page's kind: a thumbnail, a mask

for _library in ("tifffile", "PIL"):  # what they log of files comes with the errors that they raise
    logging.getLogger(_library).addHandler(logging.NullHandler())


def is_npy(head: bytes) -> bool:
    """Whether a file begins as an array of NumPy's."""
    return head.startswith(b"\x93NUMPY")


def is_tiff(head: bytes) -> bool:
    """Whether a file begins as a TIFF, or a BigTIFF."""
    return head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def read_npy(file: BinaryIO) -> np.ndarray:
    """The array of a .npy file; objects in it, which would be Python's pickles, are never read.

    Raises:
        BrokenImage: It is damaged or truncated, of no numbers, or too large.
    """
    form: Any = np.lib.format
    start = file.tell()
    try:
        version = form.read_magic(file)
        read = form.read_array_header_1_0 if version == (1, 0) else form.read_array_header_2_0
        shape, _, dtype = read(file, max_header_size=MAX_HEADER)
    except (ValueError, SyntaxError, TypeError, RecursionError, OverflowError, MemoryError) as error:
        raise BrokenImage("damaged: no header of a .npy file that is read here") from error
    if dtype.kind not in "buif" or not all(isinstance(side, int) and side >= 0 for side in shape):
        raise BrokenImage(f"a .npy file must hold numbers, not {dtype}")
    needed = math.prod(shape) * dtype.itemsize
    _check_size(shape, needed)
    position = file.tell()
    if file.seek(0, os.SEEK_END) - position < needed:
        raise BrokenImage("truncated: the array is larger than the file")
    file.seek(start)
    return form.read_array(file, allow_pickle=False)


def read_tiff(file: BinaryIO, wanted: int | None = None) -> np.ndarray:
    """The bands of a TIFF, those of its pages one after another, (H, W, C), upright; thumbnails and masks are left out.

    Args:
        file: An open file.
        wanted: How many channels there should be: where the first page has so many, it is taken alone.

    Raises:
        BrokenImage: It is damaged, of no numbers, compressed as isn't read here, too large, or its pages differ.
    """
    with _pages(file) as (pages, length):
        first = pages[0]
        if len(pages) == 1 or _channels(first) == wanted:
            pages = pages[:1]
        for page in pages:
            _check_page(page, length)
            if page.shape != first.shape or page.dtype != first.dtype:
                raise BrokenImage(f"its pages differ: {first.shape} of {first.dtype}, {page.shape} of {page.dtype}")
        shape = (first.imagelength, first.imagewidth, sum(map(_channels, pages)))
        needed = math.prod(shape) * first.dtype.itemsize
        _check_size(shape, needed)
        if needed > max(BOMB_BYTES, BOMB_RATIO * length):
            raise BrokenImage(f"a decompression bomb: {'x'.join(map(str, shape))} numbers of {length} bytes")
        planes = []
        for page in pages:
            values = page.asarray(maxworkers=1)
            values = values[..., None] if values.ndim == 2 else values
            planes.append(np.moveaxis(values, 0, -1) if page.axes == "SYX" else values)
        whole = planes[0] if len(planes) == 1 else np.concatenate(planes, axis=-1)
        return _upright(whole, first)


def tiff_layout(file: BinaryIO) -> tuple[int, int]:
    """How many channels the bands of all pages of a TIFF make, and bits of each number; (0, 0) of one that isn't read.

    Nothing is decoded.
    """
    try:
        with _pages(file) as (pages, _):
            alike = [page for page in pages if page.shape == pages[0].shape]
            return sum(map(_channels, alike)), int(pages[0].bitspersample)
    except BrokenImage:
        return 0, 0


@contextmanager
def _pages(file: BinaryIO) -> Iterator[tuple[list[Any], int]]:
    """The pages of a TIFF that are no thumbnails or masks, and the file's length; errors inside are BrokenImage."""
    try:
        tifffile = importlib.import_module("tifffile")
    except ImportError as error:
        words = "TIFF of many bands is read where tifffile is installed (pip install 'transcnn[tiff]')"
        raise BrokenImage(words) from error
    position = file.tell()
    length = file.seek(0, os.SEEK_END)
    file.seek(position)
    try:
        # Other files that metadata name are nothing to us.
        with tifffile.TiffFile(file, is_ome=False, _multifile=False) as opened:
            pages = [
                page
                for page in itertools.islice(opened.pages, MAX_CHANNELS + 1)
                if not int(page.subfiletype) & REDUCED_OR_MASK
            ]
            if not pages:
                raise BrokenImage("damaged: a TIFF without an image")
            yield pages, length
    except BrokenImage:
        raise
    except MemoryError as error:
        raise BrokenImage("not enough memory to decode it") from error
    except Exception as error:  # tifffile's and the codecs' own, on damaged files
        raise BrokenImage(f"damaged: {first_line(error)}") from error


def _channels(page: Any) -> int:
    return int(page.samplesperpixel)


def _upright(pixels: np.ndarray, page: Any) -> np.ndarray:
    """(H, W, ...) turned as the page's orientation says, as Pillow turns what it reads."""
    tag = page.tags.get(ORIENTATION)
    turn = TURNS.get(tag.value) if tag is not None and isinstance(tag.value, int) else None
    return pixels if turn is None else turn(pixels)


def _check_page(page: Any, length: int) -> None:
    """Raise BrokenImage for a page that isn't read here, or whose pieces can't be what it says."""
    if page.axes not in ("YX", "YXS", "SYX") or page.dtype is None or page.dtype.kind not in "buif":
        raise BrokenImage(f"its pages are {page.axes} of {page.dtype}, not images of numbers")
    if page.photometric == PALETTE:
        raise BrokenImage("it has a palette, not numbers")
    code = int(page.compression)
    if code not in PLAIN | PACKED:
        raise BrokenImage(f"compressed by {getattr(page.compression, 'name', code)}, which isn't read as numbers here")
    if code in PACKED and importlib.util.find_spec("imagecodecs") is None:
        words = "compressed TIFF of many bands is read where imagecodecs is installed (pip install 'transcnn[tiff]')"
        raise BrokenImage(words)
    # A tile, or a strip, is decoded whole, whatever part of it lies in the image.
    if math.prod(page.chunks) * page.dtype.itemsize > max(BOMB_BYTES, page.size * page.dtype.itemsize):
        raise BrokenImage(f"its tiles of {'x'.join(map(str, page.chunks))} are larger than the image")
    if any(count > length for count in page.databytecounts):
        raise BrokenImage("truncated: a piece of it is longer than the file")


def _check_size(shape: tuple[int, ...], needed: int) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit and math.prod(shape[:2]) > limit:
        words = f"{'x'.join(map(str, shape[:2]))} pixels are more than the limit of {limit}"
        raise BrokenImage(f"{words} (PIL.Image.MAX_IMAGE_PIXELS)")
    if needed > MAX_BYTES:
        raise BrokenImage(
            f"{'x'.join(map(str, shape))} numbers are {needed >> 20} MiB; at most {MAX_BYTES >> 20} are read"
        )
