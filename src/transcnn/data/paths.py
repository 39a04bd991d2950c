"""The image files that paths, folders and patterns stand for."""

from __future__ import annotations

import functools
import glob
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeAlias, TypeVar

from ..errors import UserError
from .images import list_images

__all__ = ["StrPath", "check_data_exists", "find_images", "is_url", "takes_paths"]

P = ParamSpec("P")
R = TypeVar("R")
StrPath: TypeAlias = str | os.PathLike[str]

# Schemes of fsspec that only read files elsewhere; those that run programs or unpack archives are not asked.
SCHEMES = ["http", "https", "s3", "s3a", "gs", "gcs", "az", "abfs", "hf", "memory"]


def takes_paths(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function whose body knows text alone be given paths, and lists of them, wherever it takes ``StrPath``."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return function(*map(_as_text, args), **{name: _as_text(value) for name, value in kwargs.items()})  # pyright: ignore

    return call


def _as_text(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_as_text(item) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def is_url(data: str) -> bool:
    """Whether this is a URL that is read here."""
    scheme = re.match(r"(\w+)://", data)
    return bool(scheme) and scheme.group(1).lower() in SCHEMES


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
