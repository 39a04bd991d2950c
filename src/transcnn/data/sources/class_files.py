"""Names of the classes of label maps, and their colours where the maps hold colours instead of ids."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np

from ...errors import UserError
from ..images import BrokenImage
from .files import Files
from .source import names_of_lines

__all__ = ["ColourTable", "read_class_file"]

MAX_ID = 65535
MAX_BYTES = 1 << 24
TABLES = ("classes.txt", "label_colors.txt", "label_colours.txt", "labelmap.txt", "class_dict.csv")


class ColourTable:
    """From colours to ids: the i-th colour is class i.

    Args:
        colours: (r, g, b) of each class, from 0 to 255.
    """

    def __init__(self, colours: list[tuple[int, int, int]]) -> None:
        self.colours = [list(colour) for colour in colours]
        keys = _keys(np.array(colours, np.uint32))
        self._order = np.argsort(keys, kind="stable")
        self._sorted = keys[self._order]

    def ids(self, pixels: np.ndarray) -> np.ndarray:
        """(H, W, 3) of uint8 -> ids (H, W) of int32; raises BrokenImage for colours of no class."""
        keys = _keys(pixels.astype(np.uint32))
        places = np.searchsorted(self._sorted, keys).clip(max=len(self._sorted) - 1)
        wrong = self._sorted[places] != keys
        if wrong.any():
            r, g, b = pixels[np.unravel_index(np.argmax(wrong), wrong.shape)].tolist()
            raise BrokenImage(f"{int(wrong.sum()):,} pixels are of no class, such as the colour {r} {g} {b}")
        return self._order[places].astype(np.int32)


def _keys(colours: np.ndarray) -> np.ndarray:
    return (colours[..., 0] << 16) | (colours[..., 1] << 8) | colours[..., 2]


def read_class_file(files: Files, path: Path) -> tuple[dict[int, str] | None, ColourTable | None]:
    """Names by id, and the classes' colours if they have them; None without such a file.

    ``classes.txt`` in the data or beside it has a name a line from id 0 on, the id before the name, or ``r g b name``.
    Understood as well are CamVid's ``label_colors.txt``, CVAT's ``labelmap.txt`` (``name:r,g,b::``), ``class_dict.csv``
    (``name,r,g,b``), and Roboflow's ``_classes.csv`` (``Pixel Value, Class``).

    Raises:
        UserError: It can't be read, or two classes have one colour.
    """
    there = {name.lower(): name for name in files.names() if name.count("/") <= 1}
    csvs = sorted(name for name in there if name.rpartition("/")[2] == "_classes.csv")
    for name in [*(table for table in TABLES if table in there), *csvs[:1]]:
        if files.size(there[name]) > MAX_BYTES:
            raise UserError(f"{there[name]} of {path.name} is too large for a table of classes")
        try:
            return _parse(files.read(there[name]).decode("utf-8-sig"), name, path)
        except UnicodeDecodeError as error:
            raise UserError(f"{there[name]} of {path.name} is not in UTF-8") from error
        except (BrokenImage, csv.Error) as error:
            raise UserError(f"{there[name]} of {path.name} can't be read: {error}") from error
    beside = path.parent / "classes.txt"
    if path.is_dir() or not beside.is_file():
        return None, None
    try:
        return _parse(beside.read_text(encoding="utf-8-sig"), "classes.txt", path)
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{beside} is not in UTF-8") from error


def _parse(text: str, name: str, path: Path) -> tuple[dict[int, str], ColourTable | None]:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if name.endswith(".csv"):
        rows = [[cell.strip() for cell in row] for row in csv.reader(lines)][1:]
        if name.endswith("_classes.csv"):
            return _numbered(
                {int(row[0]): row[1] for row in rows if len(row) > 1 and row[0].isdecimal()}, name, path
            ), None
        lines = [" ".join([*row[1:4], row[0]]) for row in rows if len(row) > 3]
    lines = [line for line in lines if not line.startswith("#")]
    lines = [re.sub(r"^([^:]+):(\d+),(\d+),(\d+):.*$", r"\2 \3 \4 \1", line) for line in lines]
    coloured = [re.fullmatch(r"(\d{1,3})[\s,]+(\d{1,3})[\s,]+(\d{1,3})[\s,]+(\S.*)", line) for line in lines]
    if lines and all(coloured):
        colours = [(int(match[1]), int(match[2]), int(match[3])) for match in coloured if match]
        if max(max(colour) for colour in colours) < 256:
            return _coloured(colours, [match[4] for match in coloured if match], name, path)
    numbered = [re.fullmatch(r"(\d{1,9})\s*[\s:,]\s*(.*)", line) for line in lines]
    ids = [int(match[1]) for match in numbered if match]
    names = {int(match[1]): match[2] for match in numbered if match}
    if not (len(names) == len(ids) == len(lines) and all(names.values())):
        kept = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
        names = dict(enumerate(lines if name.endswith(".csv") else names_of_lines(kept, f"{name} of {path.name}")))
    return _numbered(names, name, path), None


def _coloured(
    colours: list[tuple[int, int, int]], names: list[str], name: str, path: Path
) -> tuple[dict[int, str], ColourTable]:
    seen: dict[tuple[int, int, int], str] = {}
    for colour, title in zip(colours, names, strict=True):
        if seen.setdefault(colour, title) != title:
            shown = " ".join(map(str, colour))
            raise UserError(f"{name} of {path.name} has the colour {shown} twice: {seen[colour]!r} and {title!r}")
    return _numbered(dict(enumerate(names)), name, path), ColourTable(colours)


def _numbered(names: dict[int, str], name: str, path: Path) -> dict[int, str]:
    if max(names, default=0) > MAX_ID:
        raise UserError(f"{name} of {path.name} has the id {max(names)}; class ids are from 0 to {MAX_ID}")
    return names
