"""What every format comes down to: labelled images that are read one by one, in splits."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from ...errors import UserError
from ..names import distinct_names

__all__ = [
    "SPLITS",
    "Source",
    "SourceSplits",
    "abbreviate",
    "check_fraction",
    "first_line",
    "read_class_names",
    "split_of_name",
]
__all__ += [
    "first_reasons",
    "merge_splits",
    "names_of_lines",
    "number_classes",
    "split_stratified",
    "warn_of_unsplit",
    "with_progress",
]

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_CLASSES = 1 << 17
SPLITS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "eval"),
    "test": ("test", "testing"),
}


@dataclass
class Source:
    """Labelled images that are read one by one.

    Attributes:
        labels: One for each image, as :mod:`.targets` make them: int64, or rows of float32.
        class_names: In the order of the labels, in Unicode's form NFC; equal ones get their index.
        load: Index -> decoded image; raises BrokenImage.
        name_of: Index -> the image's name, for reports.
        broken: (name, reason) of what was found but is no image at all.
        raw: Index -> the image's bytes as they lie there, where there are any; raises BrokenImage.
        size_of: Index -> the size of the image's file in bytes, where that is known without reading it.
        path_of: Index -> the path of the image's file on this machine, where it is one.
        groups: For each image the file that it lies in, where going from one to another is slow; else None.
        together: For each image its group, whose images are held back together or not at all; else None.
    """

    labels: np.ndarray
    class_names: list[str]
    load: Callable[[int], Image.Image]
    name_of: Callable[[int], str]
    broken: list[tuple[str, str]] = field(default_factory=list)
    raw: Callable[[int], bytes] | None = None
    groups: np.ndarray | None = None
    size_of: Callable[[int], int] | None = None
    path_of: Callable[[int], str] | None = None
    together: np.ndarray | None = None

    def __post_init__(self) -> None:
        self.class_names = distinct_names(self.class_names)

    def __len__(self) -> int:
        return len(self.labels)


@dataclass
class SourceSplits:
    """The splits of a data set as they lie there; ``train`` is everything where it isn't split."""

    name: str
    train: Source | None
    val: Source | None = None
    test: Source | None = None
    test_indices: np.ndarray | None = None  # of ``train``, where the test split is split off by convention

    @classmethod
    def of(cls, name: str, sources: Mapping[str, Source | None]) -> SourceSplits:
        """From sources by the names of the splits; a missing one is None."""
        return cls(name, sources.get("train"), sources.get("val"), sources.get("test"))


def merge_splits(sources: Mapping[str, Source | None], name: str, what: str) -> SourceSplits:
    """The splits together, with the classes of the first that has any.

    Raises:
        UserError: ``what`` has no labels, or a split of it other classes.
    """
    first = next((source for source in sources.values() if source is not None), None)
    if first is None:
        raise UserError(f"nothing in {what!r} has a label (all are below 0)")
    for split in ("val", "test"):
        source = sources.get(split)
        if source is not None and source.class_names != first.class_names:
            if not set(source.class_names) <= set(first.class_names):
                raise UserError(f"{split} of {what!r} has other classes than train: {abbreviate(source.class_names)}")
            order = np.array([first.class_names.index(name) for name in source.class_names])
            source.labels, source.class_names = order[source.labels], first.class_names
    return SourceSplits.of(name, sources)


def number_classes(values: np.ndarray, what: str) -> tuple[np.ndarray, list[str]]:
    """Labels that are numbers from 0 without names: int64 indices of classes, and the classes' names.

    A number is its class's index, but for ids of a wide range (hashes, for instance): of these the distinct values
    become the classes, named after them.

    Raises:
        UserError: ``what`` has more than ``MAX_CLASSES`` distinct values.
    """
    if int(values.max()) < max(1000, 10 * len(values)) and int(values.max()) < MAX_CLASSES:
        return values.astype(np.int64), [str(i) for i in range(int(values.max()) + 1)]
    distinct, indices = np.unique(values, return_inverse=True)
    if len(distinct) > MAX_CLASSES:
        raise UserError(f"{what} has {len(distinct):,} distinct labels; at most {MAX_CLASSES:,} classes can be learnt")
    return indices.reshape(-1).astype(np.int64), [str(value) for value in distinct.tolist()]


def split_stratified(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the rest and of a ``fraction`` of each class, at least one of each class that has two or more.

    (scikit-learn's split refuses classes with one member, which photograph folders have.)
    """
    rng = np.random.default_rng(seed)
    taken: list[np.ndarray] = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        count = max(1, round(fraction * len(members))) if len(members) > 1 else 0
        taken.append(members[: min(count, len(members) - 1)])
    split = np.sort(np.concatenate(taken))
    return np.setdiff1d(np.arange(len(labels)), split), split


def split_of_name(name: str, otherwise: str = "train") -> str:
    """The split that a file's name says: train-00000-of-00002.parquet is of train; ``otherwise`` where it says none."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((split for split, synonyms in SPLITS.items() if any(word in synonyms for word in words)), otherwise)


def warn_of_unsplit(files: Iterable[str], split_of: Callable[[str, str], str], what: str) -> None:
    """Log the files that are of train for want of a word in their names, where the names of others say a split."""
    said = {file: split_of(file, "") for file in files}
    unsaid = [file for file, split in said.items() if not split]
    if 0 < len(unsaid) < len(said):
        logger.warning(
            "%s: names of files say train, val or test; that of %s says neither, and is learnt from",
            what,
            abbreviate(unsaid),
        )


def names_of_lines(text: str, what: str) -> list[str]:
    """Names, one a line from the class 0 on; blank lines between them, which stand for no class, are logged."""
    lines = [line.strip() for line in text.strip().splitlines()]
    if not all(lines):
        logger.warning("%s has blank lines between names: they are skipped, and don't count as classes", what)
    return [line for line in lines if line]


def read_class_names(folder: Path) -> list[str] | None:
    """The lines of ``classes.txt`` that aren't blank, if there is one."""
    file = folder / "classes.txt"
    try:
        text = file.read_text(encoding="utf-8-sig") if file.is_file() else None
    except ValueError as error:
        raise UserError(f"{file} is no text in UTF-8: {first_line(error)}") from error
    return None if text is None else names_of_lines(text, str(file))


def check_fraction(val_fraction: float) -> None:
    """Raise UserError for what is no share of the training images."""
    if not 0 < val_fraction < 1:
        raise UserError(f"val_fraction must be between 0 and 1, got {val_fraction}")


def abbreviate(names: Sequence[str]) -> str:
    """Up to eight of the names, quoted, and how many more there are."""
    first = ", ".join(repr(name if len(name) <= 200 else f"{name[:200]}...") for name in names[:8])
    return f"{first} and {len(names) - 8} more" if len(names) > 8 else first


def first_reasons(broken: Mapping[str, Sequence[tuple[str, str]]], count: int = 3) -> str:
    """For the end of a message: the first files that were left out, and why; nothing where none was."""
    found = [entry for entries in broken.values() for entry in entries]
    if not found:
        return ""
    shown = "; ".join(f"{abbreviate([name])}: {reason[:300]}" for name, reason in found[:count])
    return f" ({len(found)} left out: {shown}{'; ...' if len(found) > count else ''})"


def first_line(error: BaseException) -> str:
    """The first line of an error, for a message of one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def with_progress(items: Iterable[T], text: str, show: bool, total: int | None = None) -> Iterable[T]:
    """The items, with a bar on standard error while they come; ``total`` where they have no length."""
    if not show:
        return items
    from rich.console import Console
    from rich.progress import track

    return track(items, text, total, console=Console(stderr=True), transient=True)
