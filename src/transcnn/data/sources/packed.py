"""Packed data: WebDataset shards with a manifest, as ``transcnn pack`` writes them, on a local disk or at a URL.

A folder of packed data holds

- ``manifest.json``: class names, and for each split its shards and its index, with sizes and SHA-256 sums,
- ``train-000000.tar``, ...: shards that any WebDataset reader reads; images as they were, each with its ``.cls``,
- ``train.index``: for each image its shard, offset, size, label and CRC-32, then the names it had.

The index is why images are read one by one by their offset in a shard instead of in a stream: any order costs the same
on a local disk, so shuffling is complete, an epoch is shared over processes and loader workers without loss or
repetition, and a run goes on in the middle of an epoch, all by the same sampler as for a folder. (A stream can do each
of these only nearly: shards don't divide by processes, and buffers of shuffled images aren't in a checkpoint.) Images
come in the order that they had before packing, so what is trained on shards equals what is trained on the folder.
Shards at a URL are fetched whole, when they are first needed, and kept (:mod:`.remote`).

Nothing that a manifest says is trusted: files lie beside it or it is refused, and numbers are checked against the
files' real sizes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...errors import UserError
from ...text import without_passwords
from ..images import BrokenImage, read_image, read_slice
from ..paths import is_url
from .remote import MAX_MANIFEST_BYTES, Expected, RemoteFolder
from .source import SPLITS, Source, SourceSplits, abbreviate

__all__ = [
    "INDEX",
    "MANIFEST",
    "FileSum",
    "Shards",
    "SplitFiles",
    "is_packed",
    "open_packed",
    "read_manifest",
    "sha256",
]

MANIFEST = "manifest.json"
FORMAT, VERSION = "transcnn shards", 1
INDEX = np.dtype([("shard", "<u4"), ("offset", "<u8"), ("size", "<u4"), ("label", "<u4"), ("crc32", "<u4")])


@dataclass
class FileSum:
    """A file beside the manifest: its plain name, size and SHA-256."""

    file: str
    bytes: int
    sha256: str


@dataclass
class SplitFiles:
    """What the manifest says of one split."""

    images: int
    index: FileSum
    shards: list[FileSum]


class Shards:
    """The images of one split, read by their offset in its shards: any order, any process, nothing unpacked.

    Args:
        files: What the manifest says.
        path_of: File name -> path of that file on this machine, fetched if need be.
        index: (N,) of ``INDEX``.
        names: The images' names before packing, each followed by a null byte.
    """

    def __init__(self, files: SplitFiles, path_of: Callable[[str], str], index: np.ndarray, names: bytes) -> None:
        self.files = [shard.file for shard in files.shards]
        self.path_of = path_of
        self.index = index
        self.block = names
        self.ends = np.flatnonzero(np.frombuffer(names, np.uint8) == 0)

    def name(self, i: int) -> str:
        """What the image was called before it was packed."""
        start = self.ends[i - 1] + 1 if i else 0
        return os.fsdecode(self.block[start : self.ends[i]])

    def size(self, i: int) -> int:
        """The image's size in bytes."""
        return int(self.index["size"][i])

    def raw(self, i: int) -> bytes:
        """The image's bytes as they were before packing; raises BrokenImage with the shard's name."""
        shard, offset, size, _, crc = self.index[i].tolist()
        name = self.files[shard]
        try:
            content = read_slice(self.path_of(name), offset, size)
        except BrokenImage as error:
            raise BrokenImage(f"shard {name}: {error}") from error
        if zlib.crc32(content) != crc:
            raise BrokenImage(f"shard {name} is damaged at byte {offset}: the checksum is another")
        return content

    def load(self, i: int) -> Image.Image:
        """The decoded image."""
        return read_image(self.raw(i))


def is_packed(data: str | os.PathLike[str]) -> bool:
    """Whether this is a folder that ``transcnn pack`` may have written."""
    return os.path.isfile(os.path.join(data, MANIFEST))


def open_packed(data: str) -> SourceSplits:
    """The splits of packed data in a local folder or at the URL of one (http, https, s3, ... as fsspec knows them).

    Raises:
        UserError: No manifest, one that is wrong, or files that aren't as it says.
    """
    remote = RemoteFolder(data) if is_url(data) else None
    path_of: Callable[[str], str] = remote.path if remote else partial(os.path.join, data)
    name, class_names, splits = read_manifest(Path(path_of(MANIFEST)), without_passwords(data))
    if remote is not None:
        files = [file for split in splits.values() for file in (split.index, *split.shards)]
        remote.expect({file.file: Expected(file.bytes, file.sha256, file.sha256) for file in files})
    sources = {split: _open_split(files, path_of, class_names, remote is not None) for split, files in splits.items()}
    return SourceSplits.of(name, sources)


def _open_split(files: SplitFiles, path_of: Callable[[str], str], class_names: list[str], remote: bool) -> Source:
    if not remote:
        for shard in files.shards:
            _check_size(path_of(shard.file), shard)
    path = path_of(files.index.file)
    _check_size(path, files.index)
    content = Path(path).read_bytes()
    if hashlib.sha256(content).hexdigest() != files.index.sha256:
        raise UserError(f"{path} is damaged: its SHA-256 is not the manifest's")
    if len(content) < files.images * INDEX.itemsize:
        raise UserError(f"{path} is damaged: it is too short for {files.images} images")
    index = np.frombuffer(content, INDEX, files.images)
    shards = Shards(files, path_of, index, content[files.images * INDEX.itemsize :])
    _check_index(path, shards, files, len(class_names))
    source = Source(index["label"].astype(np.int64), class_names, shards.load, shards.name, raw=shards.raw)
    source.size_of = shards.size
    source.groups = index["shard"].astype(np.int64) if remote else None
    return source


def _check_size(path: str, expected: FileSum) -> None:
    try:
        size = os.stat(path).st_size
    except OSError as error:
        raise UserError(f"{path} is in the manifest but can't be read: {error.strerror}") from error
    if not os.path.isfile(path):  # a pipe would be waited for
        raise UserError(f"{path} is in the manifest but is no file")
    if size != expected.bytes:
        raise UserError(f"{path} is damaged or not copied whole: it has {size} bytes, {expected.bytes} in the manifest")


def _check_index(path: str, shards: Shards, files: SplitFiles, classes: int) -> None:
    """Each image lies inside a shard that there is, and has a class and a name."""
    index = shards.index
    if len(shards.ends) != files.images:
        raise UserError(f"{path} is damaged: it names {len(shards.ends)} images instead of {files.images}")
    sizes = np.array([shard.bytes for shard in files.shards], np.uint64)
    known = index["shard"] < len(sizes)
    room = sizes[np.where(known, index["shard"], 0)] if len(sizes) else np.zeros(len(index), np.uint64)
    inside = known & (index["offset"] <= room) & (index["size"] <= room - np.minimum(index["offset"], room))
    if not inside.all() or (index["label"] >= classes).any():
        raise UserError(f"{path} is wrong: it names offsets or classes that there are not")


# --- the manifest ---------------------------------------------------------------------------------------------------


def read_manifest(path: Path, what: str) -> tuple[str, list[str], dict[str, SplitFiles]]:
    """Name, class names and splits, checked: files with plain names, sizes and sums that can be, classes that differ.

    Raises:
        UserError: It is missing or wrong; ``what`` is what it is the manifest of.
    """
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{what!r} holds no {MANIFEST} that can be read: it is no file")
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise UserError(f"{what!r}: {MANIFEST} is larger than {MAX_MANIFEST_BYTES} bytes, so it isn't one")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{what!r} holds no {MANIFEST} that can be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what!r}: {MANIFEST} is damaged: {str(error).splitlines()[0]}") from error
    try:
        return _parse(content)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise UserError(f"{what!r}: {MANIFEST} is wrong: {reason}") from error


def _parse(content: Any) -> tuple[str, list[str], dict[str, SplitFiles]]:
    if content["format"] != FORMAT:
        raise ValueError(f"its format is {content['format']!r}, not {FORMAT!r}")
    if content["version"] != VERSION:
        raise ValueError(f"its version is {content['version']!r}; this program reads version {VERSION}")
    names = content["class_names"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise ValueError("class_names must be a list of different names")
    unknown = [split for split in content["parts"] if split not in SPLITS]
    if unknown or not content["parts"]:
        raise ValueError(f"parts must be among {', '.join(SPLITS)}, got {abbreviate(unknown) or 'none'}")
    splits = {split: _parse_split(values) for split, values in content["parts"].items()}
    return str(content["name"])[:200], names, splits


def _parse_split(values: dict[str, Any]) -> SplitFiles:
    files = SplitFiles(_number(values["images"]), _file(values["index"]), [_file(shard) for shard in values["shards"]])
    names = [file.file for file in (files.index, *files.shards)]
    if len(set(names)) < len(names):
        raise ValueError("a file is named twice")
    return files


def _file(values: dict[str, Any]) -> FileSum:
    name, digest = values["file"], values["sha256"]
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]{0,200}", name, re.ASCII):
        raise ValueError(f"a file must lie beside the manifest and have a plain name, got {str(name)[:80]!r}")
    if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise ValueError(f"sha256 of {name} must be 64 hexadecimal digits")
    return FileSum(name, _number(values["bytes"]), digest)


def _number(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 48:
        raise ValueError(f"expected a whole number from 0, got {str(value)[:40]!r}")
    return value


def sha256(path: str | os.PathLike[str]) -> str:
    """A file's SHA-256 in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
