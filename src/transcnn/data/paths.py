"""The image files that paths, folders and patterns stand for."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError
from .images import list_images

__all__ = ["find_images"]


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
        elif glob.has_magic(name) and not path.exists():
            inside = [file for file in sorted(glob.glob(name, recursive=True)) if not Path(file).is_dir()]
            if not inside:
                raise UserError(f"no file matches {name}")
        else:
            inside = [name]  # whether it can be read shows when it is read
        found |= dict.fromkeys(inside)
    if not found:
        raise UserError("no images given")
    return list(found)
