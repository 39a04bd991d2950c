"""Images of any number of channels: what is read is what was written, and what can't be read ends in one line."""

from __future__ import annotations

import io
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from transcnn.data.bands import Bands
from transcnn.data.broken import NoPhotograph
from transcnn.data.images import BrokenImage, read_ids, read_image
from transcnn.data.inputs import read_input
from transcnn.data.listing import image_names

tifffile = pytest.importorskip("tifffile")
DTYPES = ("uint8", "uint16", "int16", "uint32", "int32", "float16", "float32", "float64")
COMPRESSIONS = (None, "lzw", "zlib", "packbits", "zstd", "lzma")


def ranges(channels: int, low: float = 0, high: float = 1) -> list[tuple[float, float]]:
    return [(low, high)] * channels


def written(pixels: np.ndarray, kind: str, **options: Any) -> bytes:
    """(H, W, C) as a file: ``npy``, or TIFF of ``bands`` (interleaved), ``planes`` or ``pages``."""
    file = io.BytesIO()
    if kind == "npy":
        np.save(file, pixels)
    elif kind == "bands":
        tifffile.imwrite(file, pixels, photometric="minisblack", planarconfig="contig", **options)
    elif kind == "planes":
        planes = np.moveaxis(pixels, -1, 0)
        tifffile.imwrite(file, planes, photometric="minisblack", planarconfig="separate", **options)
    else:
        with tifffile.TiffWriter(file) as tiff:
            for c in range(pixels.shape[2]):
                tiff.write(pixels[..., c], photometric="minisblack", **options)
    return file.getvalue()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(
    channels=st.integers(2, 9),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(["npy", "bands", "planes", "pages"]),
    compression=st.sampled_from(COMPRESSIONS),
    predictor=st.booleans(),
    tile=st.booleans(),
    order=st.sampled_from("<>"),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
def test_what_is_read_is_what_was_written(channels, dtype, kind, compression, predictor, tile, order, size):
    """Channels x dtype x kind of file x compression, whole and as the network's scale of 0 to 255."""
    if compression is not None:
        pytest.importorskip("imagecodecs")
    rng = np.random.default_rng(channels)
    values = rng.normal(size=(*size, channels)) if "float" in dtype else rng.integers(0, 120, (*size, channels))
    pixels = values.astype(np.dtype(dtype).newbyteorder(order if kind == "npy" else "="))
    options: dict[str, Any] = {}
    if kind != "npy":
        options = {"compression": compression, "byteorder": order} if compression else {}
        if compression in ("lzw", "zlib", "zstd") and predictor and dtype != "float16":
            options["predictor"] = True
        options |= {"tile": (16, 32)} if tile else {}
        options.pop("byteorder", None)
    found = read_image(written(pixels, kind, **options), ranges(channels, -1, 3))
    assert isinstance(found, Bands)
    assert (found.channels, found.height, found.width) == (channels, *size)
    np.testing.assert_array_equal(found.pixels, pixels)
    scaled = np.asarray(found)
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(scaled, (pixels.astype(np.float64) + 1) / 4 * 255, rtol=1e-5, atol=1e-3)


def test_photographs_and_arrays_as_bands():
    """In a set of bands an ordinary file is one as well, with the numbers that it holds."""
    rng = np.random.default_rng(0)
    rgb, grey = rng.integers(0, 256, (5, 6, 3), np.uint8), rng.integers(0, 65536, (5, 6), np.uint16)
    for pixels, channels in ((rgb, 3), (grey, 1)):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        for found in (read_image(file.getvalue(), ranges(channels)), read_input(pixels, ranges(channels))):
            np.testing.assert_array_equal(found.pixels, pixels.reshape(5, 6, channels))
    for kind in (np.uint8, np.float32):
        array = rng.integers(0, 9, (5, 6, 7)).astype(kind)
        np.testing.assert_array_equal(read_input(array, ranges(7)).pixels, array)
    torch = pytest.importorskip("torch")
    array = rng.normal(size=(5, 6, 2)).astype(np.float32)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    np.testing.assert_array_equal(read_input(tensor, ranges(2)).pixels, array)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_bands_are_turned_as_pillow_turns_photographs(orientation):
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    tifffile.imwrite(
        file := io.BytesIO(), pixels, photometric="rgb", extratags=[(274, "H", 1, orientation, True)], metadata=None
    )
    upright = np.asarray(read_image(file.getvalue()))
    bands = read_image(file.getvalue(), [(0, 255)] * 3)
    np.testing.assert_array_equal(bands.pixels, upright)
    assert bands.size == upright.shape[1::-1]


def test_without_a_number_of_channels_files_are_read_as_before():
    """Grey and RGB arrays of 8 bits are images like all others; what Pillow has no mode for is no photograph."""
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (9, 8, 3), np.uint8)
    for pixels, mode in ((rgb, "RGB"), (rgb[..., 0], "L"), (rgb[..., :1], "L")):
        found = read_image(written(pixels, "npy"))
        assert found.mode == mode
        np.testing.assert_array_equal(np.asarray(found).reshape(pixels.shape), pixels)
    seven = rng.integers(0, 4000, (9, 8, 7)).astype(np.uint16)
    for kind in ("npy", "bands", "planes"):
        with pytest.raises(NoPhotograph, match=r"7 channels of uint16, .*: --in_chans 7 learns from such images"):
            read_image(written(seven, kind))
    assert read_image(written(rgb, "pages")).mode == "L"  # of several pages the first, as always


def test_label_maps_may_be_arrays():
    ids = np.random.default_rng(0).integers(0, 300, (6, 7))
    for dtype in (np.uint16, np.int64):
        found, palette = read_ids(written(ids.astype(dtype), "npy"))
        np.testing.assert_array_equal(found, ids)
        assert palette is None
    with pytest.raises(BrokenImage, match="one integer a pixel, not 1 x float32"):
        read_ids(written(ids.astype(np.float32), "npy"))


def test_the_network_sees_the_range_and_people_a_picture():
    """Outside of the range numbers go on; what is no number is black, infinity an end."""
    pixels = np.array([[[0.0, 10], [2, 20]], [[np.nan, np.inf], [4, -np.inf]]], np.float32)
    found = read_image(written(pixels, "npy"), [(0, 2), (10, 30)])
    wanted = [[[0, 0], [255, 127.5]], [[0, 255], [510, 0]]]
    np.testing.assert_allclose(np.asarray(found), wanted, rtol=1e-6)
    shown = found.convert("RGB")
    assert (shown.mode, shown.size) == ("RGB", (2, 2))
    part = found.crop((1, 0, 2, 2))
    np.testing.assert_allclose(np.asarray(part), np.array(wanted)[:, 1:], rtol=1e-6)
    large = np.random.default_rng(0).normal(size=(40, 50, 5))
    small = read_image(written(large, "npy"), ranges(5)).resize((20, 10))
    assert small.size == (20, 10)
    one = Image.fromarray((large[..., 3] * 255).astype(np.float32)).resize((20, 10), Image.Resampling.BICUBIC)
    np.testing.assert_allclose(np.asarray(small)[..., 3], np.asarray(one), rtol=1e-4, atol=1e-3)


def npy(header: str, body: bytes = b"") -> bytes:
    text = header.encode().ljust(118) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + body


HOSTILE = {
    "pickle": (
        npy("{'descr': '|O', 'fortran_order': False, 'shape': (2, 2), }", b"\x80\x04K\x01."),
        "must hold numbers",
    ),
    "huge": (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (9000, 9000, 1000), }"), "at most 1024 are read"),
    "wide": (npy("{'descr': '|u1', 'fortran_order': False, 'shape': (1000000, 1000000), }"), "pixels are more than"),
    "short": (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (50, 50, 7), }", b"x" * 99), "truncated"),
    "negative": (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 4), }"), "must hold numbers"),
    "code": (npy("__import__('os').system('true')"), "no header of a .npy file"),
    "names": (npy("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (2, 2), }", b"x" * 16), "hold numbers"),
    "vector": (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (4,), }", b"x" * 16), r"no image: \(H, W\)"),
    "empty": (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (0, 4), }"), r"no image: \(H, W\)"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_strangers_arrays(name):
    content, reason = HOSTILE[name]
    with pytest.raises(BrokenImage, match=reason):
        read_image(content)


def test_channels_first_is_told_how_to_turn():
    content = written(np.zeros((7, 40, 50), np.float32), "npy")
    with pytest.raises(BrokenImage, match=r"numpy.moveaxis\(array, 0, -1\)"):
        read_image(content)
    with pytest.raises(BrokenImage, match=r"it has 50 channels, 7 are wanted; arrays are \(H, W, C\)"):
        read_image(content, ranges(7))
    assert read_image(content, ranges(50)).size == (40, 7)


def changed_tags(content: bytes, **tags: int) -> bytes:
    """A little TIFF with other values in its first page's tags."""
    out = bytearray(content)
    with tifffile.TiffFile(io.BytesIO(content)) as tiff:
        for name, value in tags.items():
            tag = tiff.pages[0].tags[name]
            size = {3: 2, 4: 4, 16: 8}[int(tag.dtype)]
            out[tag.valueoffset : tag.valueoffset + size] = value.to_bytes(size, "little")
    return bytes(out)


def test_strangers_tiff():
    """Sizes, tiles and pieces that can't be are refused by what they say; a bomb inflates no further than its tile."""
    pytest.importorskip("imagecodecs")
    pixels = np.zeros((64, 64, 5), np.uint16)
    plain, packed = written(pixels, "bands"), written(pixels, "bands", compression="zlib", rowsperstrip=64)
    tiled = written(pixels, "bands", compression="zlib", tile=(64, 64))
    bomb = zlib.compress(bytes(1 << 26), 9)
    with tifffile.TiffFile(io.BytesIO(packed)) as tiff:
        offset = tiff.pages[0].tags["StripOffsets"].valueoffset
    inflated = changed_tags(packed + bomb, StripByteCounts=len(bomb))
    inflated = inflated[:offset] + len(packed).to_bytes(4, "little") + inflated[offset + 4 :]
    cases = [
        (changed_tags(plain, ImageWidth=60000, ImageLength=60000), "pixels are more than the limit"),
        (changed_tags(plain, ImageWidth=9000, ImageLength=9000), "a decompression bomb|truncated|damaged"),
        (changed_tags(tiled, TileWidth=60000, TileLength=60000), "larger than the image"),
        (changed_tags(plain, StripByteCounts=1 << 31), "longer than the file"),
        (written(pixels, "bands", compression="lzw")[:-400], "damaged|truncated"),
        (plain[:40], "damaged"),
        (changed_tags(plain, Compression=7), "isn't read as numbers here"),
    ]
    for content, reason in cases:
        with pytest.raises(BrokenImage, match=reason):
            read_image(content, ranges(5))
    tracemalloc.start()
    try:
        with pytest.raises(BrokenImage, match="damaged"):
            read_image(inflated, ranges(5))
        assert tracemalloc.get_traced_memory()[1] < 1 << 24  # not the bomb's 64 MiB
    finally:
        tracemalloc.stop()


def test_pages_that_differ(tmp_path):
    """A thumbnail is no channel; pages of several sizes are refused."""
    file, pixels = io.BytesIO(), np.random.default_rng(0).integers(0, 9, (16, 16, 4)).astype(np.uint16)
    with tifffile.TiffWriter(file) as tiff:
        for c in range(4):
            tiff.write(pixels[..., c], photometric="minisblack")
        tiff.write(pixels[::2, ::2, 0], photometric="minisblack", subfiletype=1)
    np.testing.assert_array_equal(read_image(file.getvalue(), ranges(4)).pixels, pixels)
    with tifffile.TiffWriter(file := io.BytesIO()) as tiff:
        tiff.write(pixels[..., 0], photometric="minisblack")
        tiff.write(pixels[::2, ::2, 0], photometric="minisblack")
    with pytest.raises(BrokenImage, match="its pages differ"):
        read_image(file.getvalue(), ranges(2))


def test_arrays_beside_images_are_features():
    names = ["a/x.png", "a/x.npy", "b/y.npy", "z.npy"]
    assert image_names([*names, "b/.y.npy", "b/readme.txt"]) == ["a/x.png", "b/y.npy", "z.npy"]
