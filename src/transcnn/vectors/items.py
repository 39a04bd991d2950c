"""Images with what is known of them, label and split, one by one from any data or from files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..data.listing import images_in
from ..data.paths import find_images
from ..data.sources.opening import open_source
from ..data.sources.source import SPLITS
from ..data.sources.table import is_table, list_files, metadata_tables
from ..errors import UserError

__all__ = ["Item", "find_items"]


@dataclass(frozen=True)
class Item:
    """One image: its name, its label and split ("" where they are not known), and itself for ``Predictor.embed``."""

    name: str
    label: str
    split: str
    image: Any


class _Stored:
    """An image in a data set, read in the thread that asks for it."""

    def __init__(self, name: str, read: Any) -> None:
        self.name, self._read = name, read

    def seekable(self) -> bool:
        return False

    def read(self, _size: int = -1) -> bytes:
        return self._read()


def find_items(names: Sequence[str], labelled: bool, errors: dict[str, str]) -> list[Item]:
    """The images of a data set, named alone, with labels and splits; else those of files, folders and patterns.

    Where no labels are needed, a folder of which some images lie beside its folders is no data set: all are taken; and
    a table without labels names files. What a data set leaves out goes to ``errors``, with the reason.

    Raises:
        UserError: There are none; or, where they are to be ``labelled``, no data set of classes.
    """
    if len(names) == 1 and (labelled or not images_in(names[0]) or metadata_tables(Path(names[0]), SPLITS)):
        try:
            return list(_of_data(names[0], errors))
        except UserError:
            if labelled:
                raise
            if is_table(names[0]) and not Path(names[0]).is_dir():
                return [Item(file, "", "", file) for file in list_files(Path(names[0]), None, None).files]
    if labelled:
        raise UserError(f"labels come with one data set (a folder of class folders, a table, ...), got {len(names)}")
    return [Item(file, "", "", file) for file in find_images(names)]


def _of_data(data: str, errors: dict[str, str]) -> Iterator[Item]:
    splits = open_source(data)
    several = splits.val is not None or splits.test is not None
    for split, source in (("train", splits.train), ("val", splits.val), ("test", splits.test)):
        if source is None:
            continue
        errors.update(source.broken)
        for i in range(len(source)):
            name = source.name_of(i) if source.path_of is None else source.path_of(i)
            image = source.load(i) if source.raw is None else _Stored(name, partial(source.raw, i))
            yield Item(name, source.class_names[int(source.labels[i])], split if several else "", image)
