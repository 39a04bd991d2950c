"""WebDataset shards on a local disk: tar files of images, each with its class in a ``.cls`` beside it.

These are shards that others wrote; those of ``transcnn pack`` have an index as well (:mod:`.packed`).
"""

from __future__ import annotations

import os
import re
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...errors import UserError, require
from ..images import read_image, read_slice
from ..listing import is_image_name
from .source import (
    SPLITS,
    Source,
    SourceSplits,
    abbreviate,
    first_line,
    merge_splits,
    number_classes,
    read_class_names,
    split_of_name,
    warn_of_unsplit,
)

__all__ = ["ShardContents", "open_shards", "read_shard"]

MAX_SHARDS = 100_000  # files that a pattern may stand for


class TarSamples:
    """Images inside tar files, read by their offset in the file: any order, any process, nothing unpacked."""

    def __init__(self) -> None:
        self.files: list[str] = []
        self.offsets: list[tuple[int, int, int]] = []  # file, offset, size
        self.names: list[str] = []

    def name(self, i: int) -> str:
        return self.names[i]

    def size(self, i: int) -> int:
        return self.offsets[i][2]

    def raw(self, i: int) -> bytes:
        number, offset, size = self.offsets[i]
        return read_slice(self.files[number], offset, size)

    def load(self, i: int) -> Image.Image:
        return read_image(self.raw(i))


@dataclass
class ShardContents:
    """A shard's table of contents, as far as it could be read.

    Attributes:
        images: Stem -> (offset, size) of the image.
        classes: Stem -> number of its class.
        problem: Why there is no more; "" where this is all.
    """

    images: dict[str, tuple[int, int]] = field(default_factory=dict)
    classes: dict[str, int] = field(default_factory=dict)
    problem: str = ""


def read_shard(path: str) -> ShardContents:
    """Read the headers of a tar of samples, and the classes; nothing is unpacked, and images are not read."""
    found = ShardContents()
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            end = os.fstat(file.fileno()).st_size
            for member in tar:
                stem, dot, kind = member.name.rpartition(".")
                if not member.isreg() or not dot:
                    continue
                if not 0 <= member.size <= end - member.offset_data:
                    raise ValueError(f"{member.name!r} would end behind the end of the file")
                if kind == "cls":
                    file.seek(member.offset_data)
                    found.classes[stem] = int(file.read(min(member.size, 20)))
                elif kind.lower() == "npy":  # beside an image it is something else
                    found.images.setdefault(stem, (member.offset_data, member.size))
                elif is_image_name(os.path.basename(member.name)):
                    found.images[stem] = (member.offset_data, member.size)
    except (tarfile.TarError, OSError, ValueError, OverflowError, MemoryError) as error:
        found.problem = f"damaged shard: {first_line(error)}"
    return found


def open_shards(pattern: str) -> SourceSplits:
    """wds/PATH with {000..015} in it, a folder of train-*.tar, val-*.tar, ..., or one tar: local WebDataset shards.

    A sample is an image and a ``.cls`` of equal stem. The tars' tables of contents are read once and samples are then
    read by their offset, so that shuffling is complete and each sample comes exactly once an epoch.
    """
    files = _expand(pattern)
    if os.path.isdir(pattern):
        warn_of_unsplit([os.path.basename(file) for file in files], split_of_name, pattern)
    by_split: dict[str, list[str]] = {}
    for file in files:
        by_split.setdefault(split_of_name(os.path.basename(file)) if os.path.isdir(pattern) else "train", []).append(
            file
        )
    names = read_class_names(Path(files[0]).parent)
    sources = {split: _shards_split(by_split[split], names) for split in SPLITS if split in by_split}
    most = max((source.class_names for source in sources.values()), key=len)
    if most == [str(i) for i in range(len(most))]:  # numbers: as many classes as the split with the most
        for source in sources.values():
            source.class_names = most if source.class_names == most[: len(source.class_names)] else source.class_names
    name = os.path.basename(os.path.dirname(os.path.abspath(files[0]))) or "shards"
    return merge_splits(sources, name, pattern)


def _expand(pattern: str) -> list[str]:
    if "://" in pattern:
        raise UserError(f"shards must lie on a local disk, got {pattern!r}")
    if os.path.isdir(pattern):
        files = sorted(str(path) for path in Path(pattern).glob("*.tar"))
    else:
        _check_count(pattern)
        braces: Any = require("webdataset", "data")
        files = list(braces.shardlists.expand_urls(pattern))
    missing = [file for file in files if not os.path.isfile(file)]
    if missing or not files:
        raise UserError(f"no such shards: {abbreviate(missing) or pattern}")
    return files


def _check_count(pattern: str) -> None:
    """Refuse a pattern that stands for too many files, before it is expanded."""
    count = 1
    for low, high in re.findall(r"(\d+)\.\.(\d+)", pattern):
        too_long = max(len(low), len(high)) > 12
        count *= MAX_SHARDS + 1 if too_long else abs(int(high) - int(low)) + 1
    for choices in re.findall(r"\{([^{}]*,[^{}]*)\}", pattern):
        count *= choices.count(",") + 1
    if count > MAX_SHARDS or pattern.count("{") > 100:
        raise UserError(f"{pattern[:200]!r} stands for more than {MAX_SHARDS:,} files")


def _shards_split(files: list[str], names: list[str] | None) -> Source:
    members, labels, broken = TarSamples(), [], []
    for number, path in enumerate(files):
        members.files.append(path)
        contents = read_shard(path)
        if contents.problem:
            broken.append((path, contents.problem))
        for stem, (offset, size) in contents.images.items():
            if contents.classes.get(stem, -1) < 0:
                broken.append((f"{path}/{stem}", "no class beside it"))
                continue
            members.offsets.append((number, offset, size))
            members.names.append(f"{os.path.basename(path)}/{stem}")
            labels.append(contents.classes[stem])
    if not labels:
        raise UserError(
            f"no samples in {abbreviate(files)}; expected images with a .cls file each (class folders in a tar must be "
            "unpacked)"
        )
    if names is None:
        indices, names = number_classes(np.array(labels), abbreviate(files))
    elif max(labels) >= len(names):
        raise UserError(f"{abbreviate(files)} has labels up to {max(labels)}; allowed: 0 to {len(names) - 1}")
    else:
        indices = np.array(labels, dtype=np.int64)
    return Source(indices, names, members.load, members.name, broken, raw=members.raw, size_of=members.size)
