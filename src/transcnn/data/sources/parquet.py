"""Parquet files with a column of encoded images and one of labels, as Hugging Face datasets write them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...errors import UserError, require
from ..images import BrokenImage, read_bytes, read_image
from ..names import normalise
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

__all__ = [
    "ImageColumn",
    "batches_of",
    "feature_names",
    "find_columns",
    "holds_images",
    "label_values",
    "open_parquet",
    "read_bounded",
    "refuse_bombs",
    "split_of_path",
]

BATCH_ROWS = 1024  # that are unpacked at a time
IN_MEMORY = 2 << 30  # bytes of a split that are read into memory; larger ones are mapped from disk
MIN_BOMB_ROWS, MIN_BOMB_BYTES, MAX_RATIO = 1 << 20, 1 << 28, 1000  # what is smaller does no harm
IMAGE_COLUMNS = ("image", "img", "jpg", "png")
LABEL_COLUMNS = ("label", "labels", "fine_label", "target", "cls")


def open_parquet(path: Path, files: list[Path]) -> SourceSplits:
    folder = path if path.is_dir() else path.parent
    warn_of_unsplit([file.relative_to(folder).as_posix() for file in files], split_of_path, str(path))
    by_split: dict[str, list[Path]] = {}
    for file in files:
        split = split_of_path(file.relative_to(folder).as_posix()) if path.is_dir() else "train"
        by_split.setdefault(split, []).append(file)
    names = read_class_names(folder)
    sources = {split: _parquet_split(by_split[split], folder, names) for split in SPLITS if split in by_split}
    return merge_splits(sources, folder.resolve().name if path.is_dir() else path.stem, str(path))


def split_of_path(name: str, otherwise: str = "train") -> str:
    """Which split a file is of: train-00000.parquet, train/0000.parquet and data/train-00000.parquet are of train."""
    folder, _, file = name.rpartition("/")
    return split_of_name(file, split_of_name(folder.rpartition("/")[2], otherwise))


def _parquet_split(files: list[Path], folder: Path, names: list[str] | None) -> Source | None:
    """The rows of some files as a source; None where nothing is labelled (-1), as test splits often are."""
    arrow: Any = require("pyarrow", "train")
    parquet: Any = require("pyarrow.parquet", "train")
    try:
        opened = [parquet.ParquetFile(file) for file in files]
    except (arrow.ArrowException, OSError) as error:
        raise UserError(
            f"can't read {abbreviate([str(file) for file in files])} as Parquet: {first_line(error)}"
        ) from error
    schema = opened[0].schema_arrow
    image, label = find_columns(schema.names, files[0])
    size = refuse_bombs(files, sum(file.stat().st_size for file in files), opened)
    try:
        if size <= IN_MEMORY:
            table = arrow.concat_tables(
                [read_bounded(file, [image, label], path) for path, file in zip(files, opened, strict=True)]
            )
        else:  # Hugging Face datasets keeps a decompressed copy in its cache and maps it
            datasets: Any = require("datasets", "data")
            table = datasets.Dataset.from_parquet([str(file) for file in files]).data.table
    except (arrow.ArrowException, OSError) as error:
        raise UserError(f"can't read {abbreviate([str(file) for file in files])}: {first_line(error)}") from error
    labels, class_names = label_values(table[label], feature_names(schema, label) or names, files[0])
    if not len(labels):
        raise UserError(f"no rows in {abbreviate([str(file) for file in files])}")
    if (labels < 0).all():
        return None
    rows = ImageColumn(table[image], folder, "+".join(file.stem for file in files[:1]))
    return Source(labels, class_names, rows.load, rows.name, raw=rows.raw)


def refuse_bombs(names: Sequence[Path | str], stored: int, opened: Sequence[Any]) -> int:
    """Refuse files that say they hold far more than their bytes can: repetitions, which would take all memory.

    Args:
        names: Of the files, for messages.
        stored: Their bytes.
        opened: They as PyArrow's ``ParquetFile``.

    Returns:
        The bytes that they say they have unpacked; values that are repeated count once.
    """
    rows = sum(file.metadata.num_rows for file in opened)
    size = sum(group.total_byte_size for file in opened for group in _groups(file))
    if rows > max(MIN_BOMB_ROWS, stored) or size > max(MIN_BOMB_BYTES, MAX_RATIO * stored):
        raise UserError(
            f"{abbreviate([str(name) for name in names])}: {rows:,} rows and {size:,} bytes unpacked from {stored:,} "
            "bytes of file are no images"
        )
    return size


def _groups(file: Any) -> list[Any]:
    return [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]


def batches_of(file: Any, columns: list[str] | None, name: Path | str, *, use_threads: bool = True) -> Iterator[Any]:
    """The rows of a ``ParquetFile`` in record batches, as long as they don't take far more than it says.

    A dictionary may hold one image for a million rows: it takes its bytes a million times when it is read.

    Args:
        file: The file, open.
        columns: Those to read; None reads all.
        name: Of the file, for messages.
        use_threads: Those of PyArrow, which forked processes must not use.

    Raises:
        UserError: They do.
    """
    cells = [group.column(i).total_uncompressed_size for group in _groups(file) for i in range(group.num_columns)]
    most, unpacked = max(IN_MEMORY, 2 * sum(cells)), 0
    rows = max(1, min(BATCH_ROWS, IN_MEMORY // max(1, 1, *cells)))  # a cell may be as large as its column
    for batch in file.iter_batches(rows, columns=columns, use_threads=use_threads):
        unpacked += batch.nbytes
        if unpacked > most:
            raise UserError(f"{str(name)!r} repeats its values: they take more than {most:,} bytes of memory")
        yield batch


def read_bounded(file: Any, columns: list[str] | None, name: Path | str) -> Any:
    """A ``ParquetFile``'s rows as a table; raises UserError as :func:`batches_of` does."""
    arrow: Any = require("pyarrow", "train")
    batches = list(batches_of(file, columns, name))
    return arrow.Table.from_batches(batches) if batches else file.read(columns=columns)


class ImageColumn:
    """An image column: struct{bytes, path} as Hugging Face datasets write it, or plain bytes."""

    def __init__(self, column: Any, folder: Path, title: str) -> None:
        self.column, self.folder, self.title = column, folder.resolve(), title

    def name(self, i: int) -> str:
        value = self.column[i]
        path = value["path"].as_py() if hasattr(value, "keys") and "path" in value.keys() and value.is_valid else None  # noqa: SIM118
        return path or f"{self.title}/{i}"

    def load(self, i: int) -> Image.Image:
        return read_image(self.raw(i))

    def raw(self, i: int) -> bytes:
        value = self.column[i].as_py()
        if isinstance(value, dict):
            if value.get("bytes") is None and value.get("path"):
                path = (self.folder / value["path"]).resolve()
                if not path.is_relative_to(self.folder):
                    raise BrokenImage(f"its path leads out of the data's folder: {value['path']}")
                return read_bytes(path)
            value = value.get("bytes")
        if not isinstance(value, bytes):
            raise BrokenImage("no image in this row")
        return value


def holds_images(file: Path) -> bool:
    """Whether a Parquet file has a column of encoded images; what can't be read is said where it is opened."""
    arrow: Any = require("pyarrow", "train")
    parquet: Any = require("pyarrow.parquet", "train")
    try:
        schema = parquet.read_schema(file)
    except (arrow.ArrowException, OSError):
        return True
    kinds = [schema.field(name).type for name in IMAGE_COLUMNS if name in schema.names]
    texts = (arrow.types.is_string, arrow.types.is_large_string)
    return not any(is_text(kind) for kind in kinds for is_text in texts) and (
        bool(kinds) or not {"file", "file_name", "filename", "path"} & {*schema.names}
    )


def find_columns(columns: Sequence[str], file: Path | str) -> tuple[str, str]:
    """The names of the columns of images and of labels; raises UserError where there is none."""
    found = []
    for known in (IMAGE_COLUMNS, LABEL_COLUMNS):
        name = next((name for name in known if name in columns), None)
        if name is None:
            raise UserError(f"{str(file)!r} has columns {abbreviate(columns)}; expected one named {' or '.join(known)}")
        found.append(name)
    return found[0], found[1]


def feature_names(schema: Any, label: str) -> list[str] | None:
    """Class names from the features that Hugging Face datasets keep in the schema's metadata."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[label]["names"]
    except (KeyError, ValueError, TypeError, RecursionError):
        return None
    return names if isinstance(names, list) and names and all(isinstance(name, str) for name in names) else None


def label_values(column: Any, names: list[str] | None, file: Path | str) -> tuple[np.ndarray, list[str]]:
    """Labels as int64, and the names of the classes; raises UserError for what can't be labels."""
    if column.null_count:
        raise UserError(f"{str(file)!r} has {column.null_count} rows without a label")
    values = column.to_numpy() if column.num_chunks else np.zeros(0, np.int64)
    if values.dtype.kind in "OUS":  # names
        texts: list[Any] = [
            value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else value for value in values
        ]
        if odd := [type(value).__name__ for value in texts if not isinstance(value, str)]:
            raise UserError(f"{str(file)!r} has labels of type {odd[0]}; allowed: whole numbers or names")
        text = np.array([normalise(value) for value in texts], dtype=object)
        class_names = [normalise(name) for name in names] if names else sorted(set(text.tolist()))
        missing = sorted(set(text.tolist()) - set(class_names))
        if missing:
            raise UserError(
                f"{str(file)!r} has labels {abbreviate(missing)} that are not among {abbreviate(class_names)}"
            )
        index = {name: i for i, name in enumerate(class_names)}
        return np.array([index[name] for name in text.tolist()], dtype=np.int64), class_names
    if values.dtype.kind not in "iub":
        raise UserError(f"{str(file)!r} has labels of type {values.dtype}; allowed: whole numbers or names")
    if len(values) and values.min() < 0 and (values < 0).all():
        return values.astype(np.int64), names or []
    if names is None and len(values) and values.min() >= 0:
        return number_classes(values, repr(str(file)))
    if len(values) and (values.max() >= len(names or ()) or values.min() < 0):
        allowed = f"0 to {len(names) - 1}" if names else "0 and above"
        raise UserError(f"{str(file)!r} has labels from {values.min()} to {values.max()}; allowed: {allowed}")
    return values.astype(np.int64), names or []
