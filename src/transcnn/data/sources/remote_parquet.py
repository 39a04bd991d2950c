"""Parquet files at a URL, as Hugging Face's hub holds data sets: labels are read first, images when they are needed.

A file's labels are a small part of it, and of all files only they are asked for at the beginning. A file is fetched
whole when the first of its images is needed, and kept unpacked (Arrow's format, mapped from disk), so that each image
is read by its row: the order, its sharing over processes and loader workers, and going on in the middle of an epoch
are those of shards at a URL (:mod:`.packed`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...errors import UserError, require
from ...text import without_passwords
from ..images import read_image
from .parquet import (
    ImageColumn,
    batches_of,
    feature_names,
    find_columns,
    label_values,
    read_bounded,
    refuse_bombs,
    split_of_path,
)
from .remote import Expected, RemoteFolder, translate_errors
from .source import (
    SPLITS,
    Source,
    SourceSplits,
    abbreviate,
    first_line,
    merge_splits,
    split_of_name,
    warn_of_unsplit,
    with_progress,
)

__all__ = ["open_remote_parquet"]

MAX_CONCURRENT = 8  # files whose labels are asked for at the same time
BLOCK = 1 << 16  # bytes that are asked for at a time while labels are looked for


def open_remote_parquet(url: str) -> SourceSplits:
    """The splits of a data set in Parquet files at a URL: one file, or a folder with files in it or in its subfolders.

    Raises:
        UserError: Nothing there, or not what is expected.
    """
    url = url.rstrip("/")
    folder, _, last = url.rpartition("/")
    single = last.endswith(".parquet")
    remote = RemoteFolder(folder if single else url)
    found = _find(remote, last if single else None)
    remote.expect(found)
    warn_of_unsplit(found, split_of_path, without_passwords(url))
    with ThreadPoolExecutor(MAX_CONCURRENT) as pool:
        asked = pool.map(lambda name: _label_column(remote, name), found)
        tables = with_progress(asked, "asking for labels", len(found) > MAX_CONCURRENT, len(found))
        columns = dict(zip(found, tables, strict=True))
    by_split: dict[str, list[str]] = {}
    for name in found:
        by_split.setdefault("train" if single else split_of_path(name), []).append(name)
    sources = {split: _source(remote, by_split[split], columns) for split in SPLITS if split in by_split}
    return merge_splits(sources, last.removesuffix(".parquet"), without_passwords(url))


def _find(remote: RemoteFolder, single: str | None) -> dict[str, Expected]:
    """The Parquet files, by name within the folder, in order."""
    core: Any = require("fsspec.core", "data")
    listed: dict[str, dict[str, Any]] = {}

    def look() -> None:
        with translate_errors(remote.url):
            fs, root = core.url_to_fs(remote.url)
            names = [f"{root.rstrip('/')}/{single}"] if single else fs.find(root, maxdepth=2)
            for name in names:
                if name.endswith(".parquet"):
                    listed[name.removeprefix(root).lstrip("/")] = fs.info(name)

    remote.retry(single or "", look)
    if not listed:
        raise UserError(f"{remote.title} holds neither a manifest.json of transcnn pack nor Parquet files")
    others = sorted(
        {folder for name in listed if (folder := name.rpartition("/")[0]) and not split_of_name(folder, "")}
    )
    if len(others) > 1:  # a data set's configurations, as a rule
        raise UserError(
            f"{remote.title} has Parquet files in {abbreviate(others)}; name one of them: {remote.title}/{others[0]}"
        )
    unsized = [name for name, info in listed.items() if not isinstance(info.get("size"), int)]
    if unsized:
        raise UserError(
            f"{remote.title} doesn't say how large {abbreviate(unsized)} are, so what comes couldn't be checked"
        )
    return {
        name: Expected(info["size"], hashlib.sha256(repr(sorted(info.items())).encode()).hexdigest())
        for name, info in sorted(listed.items())
    }


def _label_column(remote: RemoteFolder, name: str) -> Any:
    """The table of a file's labels, with the schema's metadata."""
    core: Any = require("fsspec.core", "data")
    parquet: Any = require("pyarrow.parquet", "train")

    def ask(target: Path) -> None:
        with translate_errors(f"{remote.url}/{name}"):
            fs, path = core.url_to_fs(f"{remote.url}/{name}")
            with fs.open(path, "rb", block_size=BLOCK, cache_type="bytes") as file:
                opened = parquet.ParquetFile(file)
                _, label = find_columns(opened.schema_arrow.names, name)
                refuse_bombs([f"{remote.title}/{name}"], remote.known[name].size or 0, [opened])
                parquet.write_table(read_bounded(opened, [label], f"{remote.title}/{name}"), target)

    def make(target: Path) -> None:
        remote.retry(name, lambda: ask(target))

    path = remote.cached(name, ".labels", make)
    with _kept(path):
        return parquet.read_table(path)


def _source(remote: RemoteFolder, names: list[str], columns: dict[str, Any]) -> Source | None:
    """The rows of some files as a source; None where nothing is labelled (-1)."""
    arrow: Any = require("pyarrow", "train")
    tables = [columns[name] for name in names]
    label = tables[0].column_names[0]
    if len({(table.column_names[0], table.schema.types[0]) for table in tables}) > 1:
        raise UserError(f"{abbreviate(names)} of {remote.title} have labels of different kinds")
    chunks = [chunk for table in tables for chunk in table.column(0).chunks]
    column = arrow.chunked_array(chunks, type=tables[0].schema.types[0])
    labels, class_names = label_values(column, feature_names(tables[0].schema, label), f"{remote.title}/{names[0]}")
    if not len(labels):
        raise UserError(f"no rows in {abbreviate(names)} of {remote.title}")
    if (labels < 0).all():
        return None
    files = RemoteFiles(remote, names, [len(table) for table in tables])
    return Source(labels, class_names, files.load, files.name, raw=files.raw, groups=files.groups)


class RemoteFiles:
    """The images of one split, by their row in its files."""

    def __init__(self, remote: RemoteFolder, names: list[str], counts: list[int]) -> None:
        self.remote, self.names = remote, names
        self.starts = np.concatenate([[0], np.cumsum(counts)])
        self.groups = np.repeat(np.arange(len(names)), counts)
        self.opened: dict[int, ImageColumn] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "opened": {}}  # another process maps the files itself

    def name(self, i: int) -> str:
        """The file's name and the image's row in it."""
        number = int(self.groups[i])
        return f"{self.names[number].removesuffix('.parquet')}/{i - self.starts[number]}"

    def raw(self, i: int) -> bytes:
        """The image's bytes; raises BrokenImage."""
        number = int(self.groups[i])
        rows = self.opened.get(number)
        if rows is None:
            rows = self.opened[number] = self._open(self.names[number])
        return rows.raw(i - int(self.starts[number]))

    def load(self, i: int) -> Image.Image:
        """The decoded image."""
        return read_image(self.raw(i))

    def _open(self, name: str) -> ImageColumn:
        arrow: Any = require("pyarrow", "train")
        ipc: Any = require("pyarrow.ipc", "train")
        path = self.remote.cached(name, ".arrow", lambda target: _unpack(self.remote, name, target))
        with _kept(path):
            table = ipc.open_file(arrow.memory_map(path), options=ipc.IpcReadOptions(use_threads=False)).read_all()
        return ImageColumn(table.column(0), self.remote.folder, name)


@contextmanager
def _kept(path: str) -> Iterator[None]:
    """Say of a damaged file, kept from an earlier time, that removing it is enough."""
    arrow: Any = require("pyarrow", "train")
    try:
        yield
    except (arrow.ArrowException, OSError) as error:
        raise UserError(
            f"can't read {path}: {first_line(error)}; it was kept from an earlier time, and is fetched anew once it is "
            "removed"
        ) from error


def _unpack(remote: RemoteFolder, name: str, target: Path) -> None:
    """Fetch a file and write its column of images as Arrow has it in memory."""
    arrow: Any = require("pyarrow", "train")
    ipc: Any = require("pyarrow.ipc", "train")
    parquet: Any = require("pyarrow.parquet", "train")
    packed = target.with_suffix(".parquet")
    try:
        remote.fetch(name, packed)
        with parquet.ParquetFile(packed) as opened:
            image, _ = find_columns(opened.schema_arrow.names, name)
            schema = arrow.schema([opened.schema_arrow.field(image)])
            with ipc.new_file(str(target), schema) as writer:
                for batch in batches_of(opened, [image], f"{remote.title}/{name}", use_threads=False):
                    writer.write_batch(batch)
    except arrow.ArrowException as error:
        raise UserError(f"can't read {remote.title}/{name} as Parquet: {first_line(error)}") from error
    finally:
        with suppress(OSError):
            packed.unlink(missing_ok=True)
