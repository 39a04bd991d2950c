"""From what the user named to the splits of a data set."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...errors import UserError, require
from ..paths import check_data_exists, is_url
from .folder import open_folder
from .named import open_hfds, open_torch
from .packed import is_packed, open_packed
from .parquet import open_parquet
from .remote_parquet import open_remote_parquet
from .source import Source, SourceSplits, split_stratified
from .webdataset import open_shards

__all__ = ["open_source"]


def open_source(data: str | None) -> SourceSplits:
    """Find out what kind of data it is, and open its splits.

    Raises:
        UserError: No such path, nothing readable in it, or labels that make no sense.
    """
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
    raise UserError(f"{data!r} is neither a folder nor a Parquet file nor a tar of samples")


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
