"""A folder with a folder of images for each class, as it is or in ``train/``, ``val/`` and ``test/``."""

from __future__ import annotations

import logging
import os
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...errors import UserError
from ...text import printable
from ..images import read_bytes, read_image
from ..listing import folders_in, images_in, is_image_name, list_images
from ..names import alike_but_for_case, case_hint, normalise
from .source import SPLITS, Source, SourceSplits, abbreviate

__all__ = ["open_folder", "split_folder"]

logger = logging.getLogger(__name__)


class PathList:
    """Many file names in little memory: one block of bytes and an offset each, and cheap to send to workers."""

    def __init__(self, root: Path) -> None:
        self.root = os.fspath(root)
        self.block = bytearray()
        self.ends = array("q", [0])

    def __len__(self) -> int:
        return len(self.ends) - 1

    def add(self, paths: Iterable[str]) -> int:
        """Take in paths below the root, and return how many there were."""
        before = len(self)
        for path in paths:
            self.block += os.fsencode(path[len(self.root) + 1 :])
            self.ends.append(len(self.block))
        return len(self) - before

    def path(self, i: int) -> str:
        return os.path.join(self.root, os.fsdecode(bytes(self.block[self.ends[i] : self.ends[i + 1]])))

    def name(self, i: int) -> str:
        return printable(self.path(i)[len(self.root) + 1 :])

    def load(self, i: int) -> Image.Image:
        return read_image(self.path(i))

    def size(self, i: int) -> int:
        try:
            return os.stat(self.path(i)).st_size
        except OSError:
            return -1

    def raw(self, i: int) -> bytes:
        return read_bytes(self.path(i))


def open_folder(root: Path) -> SourceSplits:
    root = Path.cwd() / root  # of "." paths below it would not begin with it
    name = root.resolve().name or "data"
    inside = _listed(root)
    folders = {split: split_folder(root, names) for split, names in SPLITS.items()}
    alone = folders["val"] is None and folders["test"] is None and len(inside) > 1
    if alone and folders["train"] is not None and folders["train"].name not in SPLITS["train"]:
        folders["train"] = None  # beside Bus and Car, Train is a class
    if folders["train"] is None or not _subfolders(folders["train"]):  # "train" may also be a class, beside "car"
        scored = [split for split in ("val", "test") if folders[split] is not None]
        if scored and len(scored) == len(_subfolders(root)):
            sources = {split: _class_folders(folders[split]) for split in scored}  # pyright: ignore[reportArgumentType]
            return SourceSplits.of(name, sources)
        return SourceSplits(name, _class_folders(root))
    used = [folder.name for folder in folders.values() if folder is not None]
    if unused := [name for name in inside if name not in used]:
        logger.warning("%s: folders beside those of the splits are left out: %s", root, abbreviate(unused))
    train = _class_folders(folders["train"])
    others = {
        split: None if folder is None else _class_folders(folder, train.class_names)
        for split, folder in folders.items()
        if split != "train"
    }
    return SourceSplits.of(name, {"train": train, **others})


def split_folder(root: Path, names: Sequence[str]) -> Path | None:
    """The folder of a split that has one of these names; as it is written first, then in any case (``Training``)."""
    written = next((root / name for name in names if (root / name).is_dir()), None)
    if written is not None:
        return written
    there = folders_in(root) if root.is_dir() else []
    return next((root / folder for name in names for folder in there if folder.lower() == name), None)


def _listed(root: Path) -> list[str]:
    """The names of the folders in a folder; raises UserError where it can't be listed."""
    try:
        return folders_in(root)
    except OSError as error:
        raise UserError(f"can't list {str(root)!r}: {error.strerror}") from error


def _subfolders(root: Path) -> list[str]:
    """Names of the class folders; what is hidden or can't be listed is left out."""
    found = _listed(root)
    odd = [name for name in found if is_image_name(name)]
    if odd:
        logger.warning("%s: folders named like images are left out: %s", root, abbreviate(odd))
        found = [name for name in found if name not in odd]
    return found


def _class_folders(root: Path, class_names: Sequence[str] | None = None) -> Source:
    """A folder with one folder for each class.

    Class folders that differ only in case are kept apart, as the file system does, and logged; so are images that lie
    beside the class folders, which are left out, and folders that seem to hold the class folders.
    """
    paths = PathList(root)
    others: list[str] = []
    labels = _subfolders(root)
    above = [root, *root.resolve().parents]  # a link to these holds all there is
    counts = {
        label: paths.add(_list_class(root / label, [*above, *(root / o for o in labels if o != label)], others))
        for label in labels
    }
    by_name = {normalise(printable(label)): count for label, count in counts.items()}
    if len(by_name) < len(counts):
        raise UserError(f"{str(root)!r} holds class folders of equal names: {abbreviate(list(counts))}")
    listed = [label for label, count in counts.items() if count]
    counts = by_name
    found = [label for label, count in counts.items() if count]
    if not found:
        raise UserError(f"no images in {str(root)!r}; expected a folder for each class with images in it")
    _warn_of_names(root, counts)
    _warn_of_layout(root, listed)
    classes = list(class_names) if class_names is not None else found
    unknown = [label for label in found if label not in classes]
    if unknown:
        raise UserError(
            f"{str(root)!r} holds classes that training has not: {abbreviate(unknown)}; allowed: {abbreviate(classes)}"
            f"{case_hint(unknown, classes)}"
        )
    labels = np.repeat([classes.index(label) for label in found], [counts[label] for label in found])
    broken = [(printable(path[len(paths.root) + 1 :]), "not an image by its name") for path in others]
    labels = labels.astype(np.int64)
    read: dict[str, Any] = {"raw": paths.raw, "size_of": paths.size, "path_of": paths.path}
    return Source(labels, classes, paths.load, paths.name, broken, **read)


def _list_class(folder: Path, outside: Sequence[Path], others: list[str]) -> Iterable[str]:
    try:
        yield from list_images(folder, outside, others)
    except OSError as error:
        logger.warning("%s is left out: %s", folder, error.strerror)


def _warn_of_names(root: Path, counts: dict[str, int]) -> None:
    empty = [label for label, count in counts.items() if not count]
    if empty:
        logger.warning("%s: no images in class folder %s", root, abbreviate(empty))
    for same in alike_but_for_case(counts):
        logger.warning("%s: class folders %s differ only in case and are kept apart", root, abbreviate(same))


def _warn_of_layout(root: Path, labels: Sequence[str]) -> None:
    """Log images that are of no class, and class folders that are a level too high: ``photos/{fold_1,fold_2}/cat``.

    Folders within class folders are no fault (``cat/2019/1.jpg``), unless all (or the only one) have the same ones and
    no image beside them, or each has only one of its own name, as archives are unpacked into.
    """
    if loose := images_in(root):
        logger.warning("%s: images beside the class folders are left out: %s", root, abbreviate(loose))
    if any(images_in(root / label) for label in labels):
        return
    inner = [{*folders_in(root / label)} for label in labels]
    if all(folders == {label} for label, folders in zip(labels, inner, strict=True)):
        found = f"{labels[0]}/{labels[0]}"
    elif len(shared := sorted(set.intersection(*inner))) > 1:  # of one folder all that it has
        found = f"{labels[0]}/{shared[0]}"
    else:
        return
    logger.warning(
        "%s: the classes are taken to be %s, but their images lie in folders within, such as %s",
        root,
        abbreviate(labels),
        found,
    )
