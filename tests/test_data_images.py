"""Single image files: every kind that a folder holds sooner or later is read right, or refused with its reason."""

from __future__ import annotations

import io
import os
import struct
import sys
import tracemalloc
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from transcnn.data.images import BrokenImage, read_image, to_channels
from transcnn.data.listing import is_image_name, list_images
from transcnn.errors import UserError


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(mode: str = "RGB", size: tuple[int, int] = (24, 16)) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    return Image.fromarray(np.stack([x, y, 255 - x], 2).astype(np.uint8)).convert(mode)


def png(width: int, height: int, *, colour_type: int = 0, body: bytes = b"\0") -> bytes:
    """A PNG whose header says whatever it is told to."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP", "PPM", "GIF", "QOI", "JPEG2000"])
def test_lossless_formats_give_their_pixels(kind: str) -> None:
    image = gradient().quantize(64).convert("RGB")  # GIF holds 256 colours
    options = {"lossless": True} if kind == "WEBP" else {}
    read = read_image(encoded(image, kind, **options))
    np.testing.assert_array_equal(np.asarray(read.convert("RGB")), np.asarray(image))


def test_source_may_be_path_bytes_or_file(tmp_path: Path) -> None:
    data = encoded(gradient(), "PNG")
    path = tmp_path / "a b\n😀.png"
    path.write_bytes(data)
    file = io.BytesIO(data)
    for source in (path, str(path), data, file):
        np.testing.assert_array_equal(np.asarray(read_image(source)), np.asarray(gradient()))
    assert not file.closed


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to see it upright
    image = gradient()
    read = read_image(encoded(image, "PNG", exif=exif))
    np.testing.assert_array_equal(np.asarray(read), np.asarray(image.rotate(-90, expand=True)))


def test_damaged_exif_does_not_cost_the_image() -> None:
    data = encoded(gradient(), "JPEG", exif=b"Exif\0\0II*\0" + b"\xff" * 40)
    assert read_image(data).size == (24, 16)


def test_sixteen_bit_grey_is_scaled() -> None:
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    for kind in ("PNG", "TIFF"):
        read = read_image(encoded(Image.fromarray(values), kind))
        assert read.mode == "L"
        np.testing.assert_array_equal(np.asarray(read), [[0, 1, 128, 255]])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[0.0, 0.5, 1.02]], np.float32), [0, 128, 255]),  # one value beyond changes no other
        (np.array([[-2.0, 0.25, 2.0]], np.float32), [0, 64, 255]),
        (np.array([[np.nan, np.inf, -np.inf]], np.float32), [0, 255, 0]),
        (np.array([[0, 257, 65535]], np.int32), [0, 1, 255]),
        (np.array([[0, 257, 256]], np.int32), [0, 1, 1]),
        (np.array([[-5, 1 << 30, 32896]], np.int32), [0, 255, 128]),
    ],
)
def test_float_and_32_bit_grey_go_by_the_dtype(values: np.ndarray, expected: list[int]) -> None:
    read = read_image(encoded(Image.fromarray(values), "TIFF"))
    assert read.mode == "L"
    np.testing.assert_array_equal(np.asarray(read)[0], expected)


@pytest.mark.parametrize(
    ("values", "pixel_range", "expected"),
    [
        (np.array([[0.0, 7.0, 200.0]], np.float32), (0, 255), [0, 7, 200]),
        (np.array([[-2.0, 0.0, 2.0]], np.float32), (-2, 2), [0, 128, 255]),
        (np.array([[0, 2048, 4095]], np.uint16), (0, 4095), [0, 128, 255]),
        (np.array([[0, 1, 300]], np.int32), (0, 255), [0, 1, 255]),
        (np.array([[0, 1, 200]], np.uint8), (0, 4095), [0, 1, 200]),  # of 8 bits: as it is
    ],
)
def test_a_pixel_range_that_is_given(values: np.ndarray, pixel_range: tuple[float, float], expected: list[int]) -> None:
    read = read_image(encoded(Image.fromarray(values), "TIFF"), pixel_range)
    np.testing.assert_array_equal(np.asarray(read)[0], expected)


def test_large_images_of_many_bits_take_little_memory() -> None:
    file = encoded(Image.fromarray(np.zeros((2000, 2000), np.float32)), "TIFF")
    tracemalloc.start()
    read_image(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2000 * 2000 * 4 * 3


@pytest.mark.parametrize(("kind", "mode"), [("WEBP", "RGB"), ("QOI", "RGBA"), ("AVIF", "RGB"), ("GIF", "P")])
def test_a_few_bytes_do_not_become_gigabytes(kind: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transcnn.data.images.BOMB_PIXELS", 1 << 16)
    monkeypatch.setattr("transcnn.data.images.BOMB_RATIO", 50)
    options = {"lossless": True} if kind == "WEBP" else {}
    with pytest.raises(BrokenImage, match=r"a decompression bomb: 900x900 pixels of \d+ bytes"):
        read_image(encoded(Image.new(mode, (900, 900)), kind, **options))
    read_image(encoded(Image.new(mode, (200, 200)), kind, **options))  # small enough, however well packed


def test_palette_with_and_without_transparency() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putdata([0, 1])
    opaque = read_image(encoded(image, "PNG"))
    assert opaque.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(opaque)[0], [[255, 0, 0], [0, 255, 0]])
    clear = read_image(encoded(image, "PNG", transparency=0))
    assert clear.mode == "RGBA"
    np.testing.assert_array_equal(np.asarray(clear)[0], [[255, 0, 0, 0], [0, 255, 0, 255]])
    # Where alpha goes, the transparent pixel is white, not the colour that happens to lie under it.
    np.testing.assert_array_equal(np.asarray(to_channels(clear, 3))[0], [[255, 255, 255], [0, 255, 0]])
    assert np.asarray(to_channels(clear, 1))[0, 0] == 255


def test_one_transparent_colour_becomes_alpha() -> None:
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (9, 9, 9))
    read = read_image(encoded(image, "PNG", transparency=(9, 9, 9)))
    assert read.mode == "RGBA"
    assert np.asarray(read)[0, :, 3].tolist() == [255, 0]
    grey = Image.new("L", (1, 1), 7)
    assert read_image(encoded(grey, "PNG", transparency=7)).mode == "LA"


def test_cmyk_and_one_bit() -> None:
    read = read_image(encoded(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "JPEG", quality=100))
    assert read.mode == "RGB"
    assert np.abs(np.asarray(read)[0, 0].astype(int) - [255, 0, 0]).max() <= 2
    assert np.asarray(read_image(encoded(Image.new("1", (3, 3), 1), "PNG"))).max() == 255


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_frame_counts(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    read = read_image(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    assert np.asarray(read.convert("RGB"))[4, 4].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"this is text\n", "not an image"),
        (b"\xff\xd8\xff", "not an image"),
        (encoded(gradient(size=(90, 90)), "JPEG")[:-400], "truncated"),
        (encoded(gradient(size=(90, 90)), "PNG")[:-150], "damaged"),
        (encoded(gradient(size=(90, 90)), "GIF")[:-2000], "damaged"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image"),  # would start another program
    ],
)
def test_damage_is_named(data: bytes, reason: str) -> None:
    with pytest.raises(BrokenImage, match=reason) as caught:
        read_image(data)
    assert "\n" not in str(caught.value)


def test_bad_checksum() -> None:
    data = bytearray(encoded(gradient(), "PNG"))
    place = data.index(b"IDAT")
    length = struct.unpack(">I", data[place - 4 : place])[0]
    data[place + 4 + length] ^= 0xFF
    with pytest.raises(BrokenImage, match="damaged"):
        read_image(bytes(data))


@pytest.mark.parametrize(("width", "height"), [(60000, 60000), (2**31 - 1, 2**31 - 1), (10000, 9500)])
def test_bombs_are_refused_before_memory_is_taken(width: int, height: int, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[object] = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", decoded.append)
    with pytest.raises(BrokenImage, match="pixels"):
        read_image(png(width, height))
    assert not decoded


def test_the_limit_is_pillows(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(gradient(size=(24, 16)), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 24 * 16)
    assert read_image(data).size == (24, 16)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 24 * 16 - 1)
    with pytest.raises(BrokenImage, match="24x16 pixels are more than the limit of 383"):
        read_image(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert read_image(data).size == (24, 16)


def test_long_and_tiny_images_are_read() -> None:
    for size in ((1, 1), (30000, 1)):
        assert read_image(encoded(Image.new("L", size), "PNG")).size == size


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "dangling.jpg").symlink_to("nowhere")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    for name, reason in (
        ("folder.jpg", "is a folder"),
        ("dangling.jpg", "a link to nothing"),
        ("loop.jpg", "symbolic links"),
        ("pipe.jpg", "not a regular file"),
        ("missing.jpg", "no such file"),
        ("x" * 300 + ".jpg", "name too long"),
        ("null\0.jpg", "null"),
    ):
        with pytest.raises(BrokenImage, match=f"(?i){reason}"):
            read_image(tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_no_permission(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    gradient().save(path)
    path.chmod(0)
    with pytest.raises(BrokenImage, match="no permission"):
        read_image(path)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
@pytest.mark.parametrize("in_chans", [1, 2, 3, 4])
def test_channels(mode: str, in_chans: int) -> None:
    image = gradient(mode)
    result = to_channels(image, in_chans)
    assert len(result.getbands()) == in_chans
    assert result.size == image.size
    if in_chans in (2, 4):
        assert result.getchannel("A").getextrema() == (255, 255)
    grey = np.asarray(image.convert("L")).astype(int)
    assert np.abs(np.asarray(result.convert("L")).astype(int) - grey).max() <= 1


@pytest.mark.parametrize("in_chans", [0, 5, -1])
def test_other_numbers_of_channels_are_refused(in_chans: int) -> None:
    with pytest.raises(UserError, match=rf"1, 2, 3 or 4 channels .* got in_chans={in_chans}"):
        to_channels(gradient(), in_chans)


def test_names() -> None:
    assert all(map(is_image_name, ["a.jpg", "b.JPEG", "c.d.Png", "e.tif"]))
    assert not any(map(is_image_name, [".hidden.jpg", "._a.jpg", "a.txt", "jpg", "Thumbs.db", "a.jpg.part", "a.eps"]))


def test_listing_follows_links_but_no_loops(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "inner" / "deep").mkdir(parents=True)
    (root / ".hidden").mkdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for path in (
        root / "b.png",
        root / "a.png",
        root / ".c.png",
        root / "notes.txt",
        root / "inner" / "deep" / "d.png",
        root / ".hidden" / "e.png",
        elsewhere / "f.png",
    ):
        path.touch()
    (root / "inner" / "up").symlink_to(root, target_is_directory=True)
    (root / "itself").symlink_to("itself")
    (root / "linked").symlink_to(elsewhere, target_is_directory=True)
    found = [os.path.relpath(path, root) for path in list_images(root)]
    assert found == ["a.png", "b.png", "inner/deep/d.png", "linked/f.png"]


def test_listing_looks_at_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(300):
        (tmp_path / f"{i:05}.jpg").touch()
    looked: list[object] = []
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda *args, **kwargs: (looked.append(args), stat(*args, **kwargs))[1])
    assert len(list(list_images(tmp_path))) == 300
    folders = [tmp_path, *tmp_path.parents]
    assert {os.fspath(args[0]) for args in looked} <= set(map(os.fspath, folders))  # a million files: a pass over names
    assert len(looked) <= 2 * len(folders)


SEEDS = [encoded(gradient(), kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO")]


@settings(max_examples=300)
@given(
    data=st.sampled_from(SEEDS),
    changes=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=8),
    end=st.integers(0, 3000),
)
def test_damage_anywhere_gives_an_image_or_broken_image(data: bytes, changes: list[tuple[int, int]], end: int) -> None:
    damaged = bytearray(data[:end])
    for place, value in changes:
        if damaged:
            damaged[place % len(damaged)] = value
    try:
        image = read_image(bytes(damaged))
    except BrokenImage:
        return
    assert image.mode in ("L", "LA", "RGB", "RGBA")


def test_heic_is_read_where_pillow_heif_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in for the library, which registers itself with Pillow as that does."""
    content = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"

    def register() -> None:
        Image.register_open("HEIF", lambda file, name: gradient(), lambda prefix: prefix[4:12] == b"ftypheic")

    monkeypatch.setitem(sys.modules, "pillow_heif", types.SimpleNamespace(register_heif_opener=register))
    try:
        assert read_image(content).size == (24, 16)
    finally:
        Image.OPEN.pop("HEIF", None)
        Image.ID.remove("HEIF")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(BrokenImage, match="pip install pillow-heif"):
        read_image(content)
    assert is_image_name("IMG_0001.HEIC")
