"""The image files that paths, folders and patterns stand for."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias, overload

from ..errors import UserError
from ..text import without_passwords
from .listing import list_images

__all__ = ["StrPath", "as_text", "check_data_exists", "find_images", "is_fetched", "is_url", "same_path"]

StrPath: TypeAlias = str | os.PathLike[str]

# Schemes of fsspec that only read files elsewhere; those that run programs or unpack archives are not asked.
SCHEMES = ["http", "https", "s3", "s3a", "gs", "gcs", "az", "abfs", "hf", "memory"]


@overload
def as_text(path: StrPath) -> str: ...
@overload
def as_text(path: StrPath | None) -> str | None: ...
def as_text(path: StrPath | None) -> str | None:
    """A path as text; None stays."""
    return None if path is None else os.fspath(path)


def is_url(data: str) -> bool:
    """Whether this is a URL that is read here."""
    scheme = re.match(r"(\w+)://", data)
    return bool(scheme) and scheme.group(1).lower() in SCHEMES


def is_fetched(name: str) -> bool:
    """Whether data or a network of this name comes from elsewhere: a URL, ``hfds/``, ``torch/``, a repository."""
    if is_url(name):
        return True
    elsewhere = name.partition("/")[0].lower() in ("torch", "hfds") or re.match(r"hf[-_]hub:", name.lower())
    return bool(elsewhere) and not os.path.exists(name)


def find_images(names: Sequence[str]) -> list[str]:
    """The files that ``names`` stand for, each once, in order; a folder stands for all images below it.

    Raises:
        UserError: A folder without images, or a pattern or path that names nothing.
    """
    if isinstance(names, str):
        names = [names]
    found: dict[str, None] = {}
    for name in names:
        path = Path(name)
        if path.is_dir():
            inside = list(list_images(path))
            if not inside:
                raise UserError(f"there are no images in the folder {name}")
        elif glob.has_magic(name) and not is_url(name) and not path.exists():
            inside = [file for file in sorted(glob.glob(name, recursive=True)) if not Path(file).is_dir()]
            if not inside:
                raise UserError(f"no file matches {name}")
        else:
            inside = [name]  # whether it can be read shows when it is read
        found |= dict.fromkeys(inside)
    if not found:
        raise UserError("no images given")
    return list(found)


def same_path(data: str | None, other: str | None) -> bool:
    """Whether two names of data are the same, or mean the same folder or file; passwords in URLs don't count."""
    data, other = (None if name is None else without_passwords(name) for name in (data, other))
    if data is None or other is None or data == other:
        return data == other
    return os.path.exists(data) and os.path.exists(other) and os.path.samefile(data, other)


def check_data_exists(data: str | None) -> None:
    """See that a path of data is there; URLs and names of data sets (torch/..., hfds/..., wds/...) pass.

    Raises:
        UserError: It isn't.
    """
    name, _, rest = os.fspath(data or "").partition("/")
    known = data is None or is_url(os.fspath(data)) or (name.lower() in ("torch", "hfds", "wds") and rest)
    if not known and not os.path.exists(os.fspath(data)):  # pyright: ignore
        raise UserError(
            f"no such data: {data!r}; allowed: a folder of class folders, packed data, a table (.csv, .tsv, .jsonl, "
            ".parquet), a Parquet file or folder, the URL of either, torch/NAME, hfds/NAME, wds/SHARDS, or nothing for "
            "the embedded digits; to segment or detect, a folder or a tar"
        )
