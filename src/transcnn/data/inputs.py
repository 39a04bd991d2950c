"""Whatever a program holds an image in, as an image: a path, bytes, an open file, an array, a tensor, a URL."""

from __future__ import annotations

import io
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import numpy as np
from PIL import Image

from ..errors import UserError, first_line, require
from .bands import PixelRange, bands_of_image, is_per_channel, to_bands
from .images import BrokenImage, grey_to_eight_bits, read_image, to_eight_bits, upright
from .paths import is_url

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ImageInput", "input_name", "is_one_image", "one_by_one", "read_input"]

ImageInput: TypeAlias = "str | os.PathLike[str] | bytes | BinaryIO | Image.Image | np.ndarray | Tensor"

MAX_BYTES = 1 << 28  # of what is fetched or comes from a stream
FETCH_SECONDS = 60.0  # a file's whole way from a URL
PAUSE_SECONDS = 20.0  # without a byte from there
CHUNK = 1 << 16  # bytes


def is_one_image(images: Any) -> bool:
    """Whether this is one image; else it is many of them.

    Raises:
        UserError: Neither: a dict, a number.
    """
    if isinstance(images, str | os.PathLike | bytes | bytearray | memoryview | Image.Image) or hasattr(images, "read"):
        return True
    if isinstance(images, np.ndarray) or _is_tensor(images):
        return images.ndim < 4
    if isinstance(images, Mapping) or not isinstance(images, Iterable):
        raise UserError(f"expected an image or several, got {type(images).__name__}")
    return False


def one_by_one(images: Any) -> Iterable[Any]:
    """The images of ``images``, be it one or many."""
    return [images] if is_one_image(images) else images


def input_name(image: Any, number: int) -> str:
    """What to call an image: its path or URL, else ``image 3`` for the number 3."""
    if isinstance(image, str | os.PathLike):
        return os.fsdecode(image)
    name = getattr(image, "filename" if isinstance(image, Image.Image) else "name", None)
    return name if isinstance(name, str) and name else f"image {number}"


def read_input(image: ImageInput, pixel_range: PixelRange | None = None) -> Any:
    """Any of ``ImageInput`` as :func:`~.images.read_image` gives a file: upright, 8 bits, mode L, LA, RGB or RGBA.

    Args:
        image: A path or URL, the bytes of a file, a binary file object (which stays open), an image of Pillow's, an
            array (H, W) or (H, W, C), or a tensor (H, W) or (C, H, W); C from 1 to 4. Arrays and tensors are of uint8,
            of uint16, or of floats from 0 to 1.
            Where ``pixel_range`` has a pair for each channel: any number of channels, and numbers as in files.
        pixel_range: As for ``read_image``; also of grey arrays that are not of uint8.

    Raises:
        BrokenImage: It is no image, or can't be read or fetched.
    """
    if isinstance(image, str) and is_url(image):
        return read_image(_fetch(image), pixel_range)
    if isinstance(image, str | os.PathLike):
        return read_image(image, pixel_range)
    if isinstance(image, bytes | bytearray | memoryview):
        return read_image(bytes(image), pixel_range)
    if isinstance(image, Image.Image):
        try:
            if is_per_channel(pixel_range):
                return bands_of_image(upright(image), pixel_range)
            return to_eight_bits(upright(image), pixel_range)
        except BrokenImage:
            raise
        except Exception as error:  # decoders raise nearly anything on damaged data
            raise BrokenImage(f"damaged: {first_line(error)}") from error
    if isinstance(image, np.ndarray):
        return _from_array(image, pixel_range)
    if _is_tensor(image):
        return _from_tensor(image, pixel_range)
    if hasattr(image, "read"):
        return _from_stream(image, pixel_range)
    raise BrokenImage(f"not an image: {type(image).__name__}")


def _is_tensor(value: Any) -> bool:
    """Whether it is one of PyTorch's, which needn't be there."""
    return type(value).__module__.partition(".")[0] == "torch" and hasattr(value, "detach")


def _from_tensor(tensor: Any, pixel_range: PixelRange | None) -> Any:
    """(H, W) or (C, H, W) on any device -> an image."""
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point():
        tensor = tensor.float()  # NumPy knows no bfloat16
    values = tensor.numpy()
    if values.ndim == 3:
        if values.shape[0] > 4 >= values.shape[2] and not is_per_channel(pixel_range):
            raise BrokenImage(f"a tensor is (C, H, W), got {values.shape}; give arrays for (H, W, C)")
        values = np.ascontiguousarray(values.transpose(1, 2, 0))
    return _from_array(values, pixel_range)


def _from_array(values: np.ndarray, pixel_range: PixelRange | None) -> Any:
    """(H, W) or (H, W, C) -> an image."""
    if is_per_channel(pixel_range):
        return to_bands(values, pixel_range, None)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    if not values.size or not (values.ndim == 2 or (values.ndim == 3 and values.shape[2] in (2, 3, 4))):
        raise BrokenImage(f"no image: (H, W) or (H, W, C) with 1 to 4 channels is one, got {values.shape}")
    if values.dtype == np.uint8:
        return Image.fromarray(values)
    if values.dtype != np.uint16 and values.dtype.kind != "f":
        raise BrokenImage(f"pixels are uint8, uint16, or floats from 0 to 1, got {values.dtype}")
    if not np.isfinite(values).all():
        raise BrokenImage("a pixel is not a number (NaN) or infinite")
    if values.dtype.kind == "f" and pixel_range is None and not -1e-3 <= values.min() <= values.max() <= 1.001:
        found = f"from {values.min():g} to {values.max():g}"
        raise BrokenImage(f"pixels that are floats must lie from 0 to 1 and not be normalised, got {found}")
    if values.ndim == 2:
        return grey_to_eight_bits(values, pixel_range)
    channels = [grey_to_eight_bits(values[..., c], None) for c in range(values.shape[2])]
    return Image.merge({2: "LA", 3: "RGB", 4: "RGBA"}[len(channels)], channels)


def _from_stream(stream: Any, pixel_range: PixelRange | None) -> Any:
    """An open file; what can't go back to its beginning is read whole."""
    try:
        if stream.seekable():
            stream.seek(0)
            if isinstance(stream.read(0), bytes):
                return read_image(stream, pixel_range)
        content = stream.read(MAX_BYTES + 1)
    except BrokenImage:
        raise
    except Exception as error:  # of any kind of file: closed ones raise ValueError, others what they like
        raise BrokenImage(f"can't be read: {first_line(error)}") from error
    if not isinstance(content, bytes):
        raise BrokenImage("a file must be open for bytes (mode 'rb'), not for text")
    if len(content) > MAX_BYTES:
        raise BrokenImage(f"more than {MAX_BYTES >> 20} MiB")
    return read_image(content, pixel_range)


def _fetch(url: str) -> bytes:
    """The bytes at a URL, bounded in size and time.

    A server that sends a byte now and then holds whoever reads a line or a block of it, so a thread reads.
    """
    found: list[bytes | Exception] = []
    reader = threading.Thread(target=lambda: found.append(_answer_of(url)), daemon=True)
    reader.start()
    reader.join(FETCH_SECONDS)
    if not found:
        raise BrokenImage(f"can't be fetched: it takes more than {FETCH_SECONDS:g} seconds")
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def _answer_of(url: str) -> bytes | Exception:
    """The bytes at a URL, or why there are none: BrokenImage or UserError."""
    try:
        return _read_url(url)
    except (BrokenImage, UserError) as error:
        return error


def _read_url(url: str) -> bytes:
    try:
        if url.lower().startswith(("http://", "https://")):
            with _opener().open(url, timeout=PAUSE_SECONDS) as response:
                return _read_bounded(response)
        with require("fsspec", "data").open(url, "rb") as file:
            return _read_bounded(file)
    except (BrokenImage, UserError):
        raise
    except urllib.error.HTTPError as error:
        error.close()
        raise BrokenImage(f"can't be fetched: {error.code} {error.reason}") from error
    except Exception as error:  # of sockets, of HTTP, and of whatever file system fsspec has for it
        raise BrokenImage(f"can't be fetched: {first_line(error)}") from error


def _read_bounded(stream: Any) -> bytes:
    end, content = time.monotonic() + FETCH_SECONDS, io.BytesIO()
    read = getattr(stream, "read1", stream.read)  # what has come, where a stream can tell
    while chunk := read(CHUNK):
        content.write(chunk)
        if content.tell() > MAX_BYTES:
            raise BrokenImage(f"can't be fetched: more than {MAX_BYTES >> 20} MiB")
        if time.monotonic() > end:
            raise BrokenImage(f"can't be fetched: it takes more than {FETCH_SECONDS:g} seconds")
    return content.getvalue()


def _opener() -> urllib.request.OpenerDirector:
    """For http and https alone: nothing is read from this machine or by FTP, wherever a server points to."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    return opener
