"""From what the user named to the splits of a data set."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...errors import UserError, require
from ...settings import Table
from ..paths import check_data_exists, is_url
from .folder import open_folder
from .named import open_hfds, open_torch
from .packed import is_packed, open_packed
from .parquet import holds_images, open_parquet, split_of_path
from .remote_parquet import open_remote_parquet
from .source import SPLITS, Source, SourceSplits, split_stratified
from .table import is_table, metadata_tables
from .table_source import open_table
from .targets import CLASSES, Targets
from .webdataset import open_shards

__all__ = ["columns_for", "open_source"]

ARCHIVES = (".zip", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")


def open_source(data: str | None, table: Table | None = None, targets: Targets = CLASSES) -> SourceSplits:
    """Find out what kind of data it is, and open its splits.

    Args:
        data: What the user named.
        table: Which columns of a table are what.
        targets: What labels are made into.

    Raises:
        UserError: No such path, nothing readable in it, or labels that make no sense.
    """
    table = table or Table()
    found = _tables(data, table)
    if found:
        path = Path(os.fspath(data))  # pyright: ignore
        name = path.resolve().name if path.is_dir() else path.stem
        return open_table(found, name, table, targets)
    for name in ("images", "target", "file_column", "split_column", "separator", "group"):
        if getattr(table, name) is not None and not (name == "target" and table.target == ["folder"]):
            raise UserError(f"{name} is for a table of files (.csv, .tsv, .jsonl, .parquet), got {data or 'digits'!r}")
    splits = _open(data)
    for source in (splits.train, splits.val, splits.test):
        if source is not None:
            what = repr(data or splits.name)
            source.labels, source.class_names = targets.of_classes(source.labels, source.class_names, what)
    return splits


def columns_for(data: str | None, columns: dict[str, Any]) -> dict[str, Any]:
    """What of a run's fields of :class:`Table` is about other data: nothing where that is no table of files."""
    if _tables(data, Table(**columns)):
        return columns
    return {"target": ["folder"]} if columns.get("target") == ["folder"] else {}


def _tables(data: str | None, table: Table) -> list[tuple[Path, str | None]]:
    """The tables of files that the data is, each with its split if that is known; none where it is something else."""
    if data is None or is_url(os.fspath(data)) or is_packed(data) or not os.path.exists(data):
        return []
    path = Path(data)
    columns = table.target is not None and table.target != ["folder"]
    if path.is_file():
        parquet = path.suffix.lower() in (".parquet", ".pq")
        return [(path, None)] if is_table(path) and (columns or not parquet or not holds_images(path)) else []
    if files := sorted([*path.glob("*.parquet"), *path.glob("*/*.parquet")]):
        if path / "metadata.parquet" in files:
            return [(path / "metadata.parquet", None)]
        names = [split_of_path(file.relative_to(path).as_posix()) for file in files]
        return list(zip(files, names, strict=True)) if columns else []
    found = metadata_tables(path, SPLITS)
    return found if columns or any(_has_label(file) for file, _ in found) else []


def _has_label(file: Path) -> bool:
    """Whether a folder's metadata is about labels; else its class folders count."""
    try:
        with file.open(encoding="utf-8-sig") as lines:
            return "label" in lines.readline(1 << 16).lower()
    except (OSError, ValueError):
        return False


def _open(data: str | None) -> SourceSplits:
    if data is None:
        return _digits()
    if is_url(os.fspath(data)):
        return _open_url(os.fspath(data))
    if is_packed(data):
        return open_packed(data)
    prefix, _, rest = os.fspath(data).partition("/")
    if not os.path.exists(data):
        opener = {"torch": open_torch, "hfds": open_hfds, "wds": open_shards}.get(prefix.lower())
        if opener and rest:
            return opener(rest)
        check_data_exists(data)
    path = Path(data)
    if path.is_dir():
        if any(path.glob("*.parquet")) or any(path.glob("*/*.parquet")):
            return open_parquet(path, sorted([*path.glob("*.parquet"), *path.glob("*/*.parquet")]))
        return open_folder(path)
    if path.suffix.lower() in (".parquet", ".pq"):
        return open_parquet(path, [path])
    if path.suffix.lower() == ".tar":
        return open_shards(data)
    if path.name.lower().endswith(ARCHIVES):
        raise UserError(f"{data!r} is an archive: unpack it, and give the folder")
    raise UserError(f"{data!r} is neither a folder nor a Parquet file nor a table nor a tar of samples")


def _open_url(url: str) -> SourceSplits:
    """Packed data if there is a manifest, else Parquet files."""
    if not url.endswith(".parquet"):
        try:
            return open_packed(url)
        except UserError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
    return open_remote_parquet(url)


def _digits() -> SourceSplits:
    digits: Any = require("sklearn.datasets", "train").load_digits()
    pixels = (digits.images * (255 / 16) + 0.5).astype(np.uint8)  # (1797, 8, 8), from 0..16
    source = Source(
        digits.target.astype(np.int64),
        [str(i) for i in range(10)],
        partial(_digit, pixels),
        "digits/{:04d}".format,
    )
    return SourceSplits("digits", source, test_indices=split_stratified(source.labels, 0.2, seed=0)[1])


def _digit(pixels: np.ndarray, i: int) -> Image.Image:
    return Image.fromarray(pixels[i])
