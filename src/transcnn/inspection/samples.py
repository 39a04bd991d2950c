"""The images of a data set one by one, whatever it is to teach: bytes, classes, and how to draw them."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from ..data.broken import NoPhotograph
from ..data.images import decode
from ..data.sets import detect, segment
from ..data.sets.channels import measure_channels
from ..data.sets.dense_dataset import DenseDataset
from ..data.sources.files import dense_layout
from ..data.sources.opening import open_source
from ..data.sources.source import Source
from ..data.sources.targets import Classes, Labels, Numbers, Targets
from ..errors import UserError
from ..report.overlay import blend, draw_detections, palette
from ..settings import Table

__all__ = ["DataSet", "Sample", "open_data"]


TARGETS: dict[str, Callable[[], Targets]] = {"classify": Classes, "multilabel": Labels, "regress": Numbers}


@dataclass(frozen=True)
class Sample:
    """One image.

    Attributes:
        name, split: Of it; the split is "" where there are none.
        label: Its class, labels or numbers in words; None to segment or detect, where ``truth`` says what is in it.
        values: Of labels 1, 0 or NaN where it isn't known, and numbers: (outputs,); else None.
        raw: Its bytes, where they lie in a file.
        load: Itself and its truth.
    """

    name: str
    split: str
    label: str | None
    values: np.ndarray | None
    raw: Callable[[], bytes] | None
    load: Callable[[], tuple[Image.Image, Any]]


@dataclass(frozen=True)
class DataSet:
    """The samples of a data set, its classes, and files that make no sample."""

    task: str
    class_names: list[str]
    samples: list[Sample]
    broken: list[tuple[str, str]]
    colours: Sequence[Sequence[int]]

    @property
    def whole(self) -> bool:
        """Whether what is known is about an image as a whole."""
        return self.task in TARGETS

    def classes_in(self, sample: Sample, truth: Any) -> np.ndarray:
        """How much of each class there is: an image, boxes, or pixels; (classes,)."""
        count = len(self.class_names)
        if sample.values is not None:
            return (sample.values == 1).astype(np.int64) if self.task == "multilabel" else np.zeros(count, np.int64)
        if self.task == "classify":
            return np.bincount([self.class_names.index(str(sample.label))], minlength=count)
        values = truth["labels"] if self.task == "detect" else truth[truth >= 0].ravel()
        return np.bincount(values, minlength=count)

    def drawn(self, sample: Sample, image: Image.Image, truth: Any) -> tuple[Image.Image, str]:
        """An image with its boxes or label map drawn in, and what is in it in words."""
        if self.whole:
            return image, str(sample.label)
        present = np.flatnonzero(self.classes_in(sample, truth)).tolist()
        words = ", ".join(self.class_names[i] for i in present) or "nothing"
        if self.task == "segment":
            return blend(image, truth.astype(np.int64), self.colours, 0.45), words
        found = {name: truth[name] for name in ("boxes", "labels")}
        if any(not _is_box(mask) for mask in truth["masks"]):
            found["masks"] = np.stack([mask() for mask in truth["masks"]])
        return draw_detections(image, found, self.class_names, self.colours, 0.0, key=False, enlarge=160), words


def _is_box(mask: Any) -> bool:
    """Whether a mask, not decoded yet, is no more than its box."""
    return isinstance(mask, partial) and not mask.args[0]


def open_data(data: str | None, task: str = "auto", table: Table | None = None) -> DataSet:
    """Open a data set to be looked at; ``auto`` goes by how its folder is laid out.

    Raises:
        UserError: Nothing that can be read so.
    """
    if task == "auto":
        task = (dense_layout(data) if data else None) or "classify"
    if task in TARGETS:
        return _labelled(data, task, table)
    if task not in ("segment", "detect"):
        raise UserError(f"task must be one of auto, {', '.join(TARGETS)}, segment, detect, got {task}")
    parts, names, colours = (segment if task == "segment" else detect).open_parts(data)
    largest = max(parts.values(), key=len)
    with suppress(UserError):  # of images of several kinds, those of one are read
        measure_channels({"train": largest, **parts}, None)
    samples = [sample for split, part in parts.items() for sample in _of_part(split, part)]
    broken = [entry for part in parts.values() for entry in part.broken]
    return DataSet(task, names, samples, broken, colours or palette(len(names)))


def _labelled(data: str | None, task: str, table: Table | None) -> DataSet:
    splits = open_source(data, table, TARGETS[task]())
    several = splits.val is not None or splits.test is not None
    samples, broken, names = [], [], []
    for split, source in (("train", splits.train), ("val", splits.val), ("test", splits.test)):
        if source is None:
            continue
        names = names or source.class_names
        broken += source.broken
        for i in range(len(source)):
            label: Any = source.labels[i]
            raw = None if source.raw is None else partial(source.raw, i)
            words = source.class_names[label] if task == "classify" else _words(task, label, source.class_names)
            values = None if task == "classify" else label
            load = partial(_with_nothing, source, i)
            samples.append(Sample(source.name_of(i), split if several else "", words, values, raw, load))
    return DataSet(task, names, samples, broken, palette(len(names)))


def _words(task: str, values: np.ndarray, names: Sequence[str]) -> str:
    """Labels, or numbers with their names where there are several."""
    if task == "multilabel":
        return "; ".join(name for name, value in zip(names, values.tolist(), strict=True) if value == 1) or "no label"
    numbers = ["?" if np.isnan(value) else f"{value:,.6g}" for value in values.tolist()]
    named = [f"{name} {number}" for name, number in zip(names, numbers, strict=True)]
    return "; ".join(named) if len(names) > 1 else numbers[0]


def _of_part(split: str, part: DenseDataset) -> Iterator[Sample]:
    for i in range(len(part)):
        raw = None if part.source.raw is None else partial(part.source.raw, i)
        yield Sample(part.name(i), split, None, None, raw, partial(part.read, i))


def _with_nothing(source: Source, i: int) -> tuple[Image.Image, None]:
    """An image without a truth, as people see it."""
    try:
        return source.load(i), None
    except NoPhotograph:
        if source.raw is None:
            raise
        return decode(io.BytesIO(source.raw(i)), finish=lambda image: image.convert("RGB")), None
