"""Vectors of images in a file: Parquet (with names, labels and splits), or .npy with a CSV file of names beside it."""

from __future__ import annotations

import csv
import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoints.files import atomic_write
from ..data.sources.parquet import read_bounded, refuse_bombs
from ..errors import UserError, first_line, require
from ..text import csv_cell, csv_text

__all__ = ["SUFFIXES", "Vectors", "holds_vectors", "is_vector_file", "read_vectors", "write_vectors"]

SUFFIXES = (".parquet", ".npy")
ABOUT = b"transcnn"  # the key of what a Parquet file says of its vectors


@dataclass
class Vectors:
    """Vectors (N, C) of float32 with the names of their images.

    Attributes:
        values: The vectors.
        files: The images' names.
        labels: Their classes; "" where they are not known.
        splits: ``train``, ``val``, ``test``, or "".
        about: What made them: ``network``, ``layer``, ``normalized``.
    """

    values: np.ndarray
    files: list[str]
    labels: list[str]
    splits: list[str]
    about: dict[str, Any] = field(default_factory=dict)

    def normalized(self) -> Vectors:
        """The same of length 1."""
        lengths = np.linalg.norm(self.values, axis=1, keepdims=True)
        return replace(self, values=self.values / np.maximum(lengths, 1e-12), about={**self.about, "normalized": True})


def is_vector_file(name: str | os.PathLike[str]) -> bool:
    """Whether a file's name says that it holds vectors."""
    return os.fspath(name).lower().endswith(SUFFIXES)


def holds_vectors(path: Path) -> bool:
    """Whether a Parquet file has a column of vectors; else it is a table, or a data set. True of a damaged file."""
    try:
        return "vector" in require("pyarrow.parquet", "train").read_schema(path).names
    except (ValueError, OSError, NotImplementedError):  # as PyArrow's errors are
        return True


def write_vectors(path: Path, vectors: Vectors) -> None:
    """Write a Parquet file, or a .npy file and its names as CSV; whole or not at all."""
    if path.suffix.lower() == ".npy":
        atomic_write(path.with_suffix(".csv"), lambda temporary: _write_names(temporary, vectors))
        atomic_write(path, lambda temporary: _write_npy(temporary, vectors.values))
        return
    pa, parquet = require("pyarrow", "train"), require("pyarrow.parquet", "train")
    flat = pa.array(np.ascontiguousarray(vectors.values, np.float32).ravel())
    columns = {
        "file": pa.array([name.encode("utf-8", "backslashreplace").decode() for name in vectors.files]),
        "label": pa.array(vectors.labels),
        "split": pa.array(vectors.splits),
        "vector": pa.FixedSizeListArray.from_arrays(flat, vectors.values.shape[1]),
    }
    table = pa.table(columns).replace_schema_metadata({ABOUT: json.dumps(vectors.about)})
    atomic_write(path, lambda temporary: parquet.write_table(table, temporary))


def read_vectors(path: Path) -> Vectors:
    """What :func:`write_vectors` wrote.

    Raises:
        UserError: No such file, or one that holds something else.
    """
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    try:
        found = _read_npy(path) if path.suffix.lower() == ".npy" else _read_parquet(path)
    except UserError:
        raise
    except Exception as error:  # PyArrow's and NumPy's own, of damaged files
        raise UserError(f"{path} holds no vectors of transcnn embed: {first_line(error)}") from error
    if found.values.ndim != 2 or not found.values.size or not np.isfinite(found.values).all():
        raise UserError(f"{path} holds no vectors of transcnn embed: {found.values.shape}, or what is not a number")
    if len({len(found.values), len(found.files), len(found.labels), len(found.splits)}) > 1:
        raise UserError(f"{path} has {len(found.values)} vectors and {len(found.files)} names")
    return found


def _read_parquet(path: Path) -> Vectors:
    parquet: Any = require("pyarrow.parquet", "train")
    with parquet.ParquetFile(path) as file:
        refuse_bombs([path], path.stat().st_size, [file])
        table = read_bounded(file, None, path)
    column = table.column("vector").combine_chunks()
    size = getattr(column.type, "list_size", 0)
    if size < 1 or str(column.type.value_type) != "float" or column.null_count:
        raise UserError(f"{path} has a column vector of {column.type}, not of float32 of one size")
    values = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, size)
    files, labels, splits = (
        [str(value or "") for value in table.column(key).to_pylist()] for key in ("file", "label", "split")
    )
    about = json.loads((table.schema.metadata or {}).get(ABOUT, b"{}"))
    return Vectors(values, files, labels, splits, about if isinstance(about, dict) else {})


def _read_npy(path: Path) -> Vectors:
    values = np.load(path, mmap_mode="r", allow_pickle=False)  # mapped: a header that promises too much is an error
    if values.ndim != 2 or values.dtype.kind != "f":
        raise UserError(f"{path} holds {values.shape} of {values.dtype}, not vectors")
    names = path.with_suffix(".csv")
    if not names.is_file():
        raise UserError(f"{names} with the images' names must lie beside {path}")
    with names.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))[1:]
    files, labels, splits = ([csv_text(row[i]) if i < len(row) else "" for row in rows] for i in range(3))
    return Vectors(np.array(values, np.float32), files, labels, splits)


def _write_names(path: Path, vectors: Vectors) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "label", "split"])
        for row in zip(vectors.files, vectors.labels, vectors.splits, strict=True):
            writer.writerow(map(csv_cell, row))


def _write_npy(path: Path, values: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, values, allow_pickle=False)
