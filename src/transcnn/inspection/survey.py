"""A data set in figures: what is there by class and split, sizes and modes, what is broken or odd, exact duplicates."""

from __future__ import annotations

import hashlib
import io
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.images import BrokenImage, decode, upright
from ..data.loading.read_ahead import read_ahead
from ..data.sources.source import abbreviate, with_progress
from . import known
from .samples import DataSet, Sample

__all__ = ["IMBALANCE", "survey"]

IMBALANCE = 10  # the largest class is so many times the smallest one: worth a word
SMALL_SIDE, LONG = 8, 8  # pixels, and times its short side, from which on an image is odd
PLAIN_MODES = ("RGB", "L")
MOST_LISTED = 10_000  # files of each kind
BOX_SIDES = (32, 96)  # COCO's: small is below 32² pixels, large from 96² on


@dataclass(frozen=True)
class Look:
    """What one image is, by itself."""

    size: tuple[int, int]
    mode: str
    format: str
    turned: bool
    frames: int
    digest: str
    bytes: int
    classes: np.ndarray
    boxes: list[float]


def survey(data: DataSet, most: int | None = None, progress: bool = False) -> dict[str, Any]:
    """All figures of a data set, as plain values; see docs/inspect.md.

    Args:
        data: From :func:`.samples.open_data`.
        most: Images of each split that are opened, spread evenly; None opens all. Labels are counted of all.
        progress: Show a bar.
    """
    chosen = _spread(data.samples, most)
    looks: list[tuple[Sample, Look]] = []
    broken = list(data.broken)
    shown = with_progress(
        read_ahead(chosen, lambda sample: _look(data, sample), 64), f"{len(chosen):,} images", progress, len(chosen)
    )
    for sample, found in shown:
        if isinstance(found, BrokenImage):
            broken.append((sample.name, str(found)))
        else:
            looks.append((sample, found))
    result: dict[str, Any] = {"task": data.task, "images": len(data.samples), "opened": len(chosen)}
    result["splits"] = dict(Counter(sample.split or "all" for sample in data.samples))
    result |= known.numbers(data) if data.task == "regress" else _classes(data, looks)
    if data.task == "multilabel":
        result |= known.labels(data)
    result |= _shapes(looks)
    if data.task == "detect":
        result |= _boxes(looks)
    result["broken"] = [list(entry) for entry in broken[:MOST_LISTED]]
    result["odd"] = _odd(looks)
    result["duplicates"] = _duplicates(looks)
    result["warnings"] = _warnings(result)
    return result


def _spread(samples: Sequence[Sample], most: int | None) -> list[Sample]:
    if most is None:
        return list(samples)
    by_split: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_split[sample.split].append(sample)
    return [
        group[i]
        for group in by_split.values()
        for i in np.unique(np.linspace(0, len(group) - 1, min(most, len(group))).astype(int)).tolist()
    ]


def _look(data: DataSet, sample: Sample) -> Look:
    """Open one image whole; raises BrokenImage where it, or its label, can't be read."""
    content = sample.raw() if sample.raw is not None else None
    image, truth = (None, None) if data.whole and content is not None else sample.load()
    if content is not None:
        facts = decode(io.BytesIO(content), finish=_facts)
    else:
        assert image is not None
        content, facts = image.tobytes(), _facts(image)
    boxes = []
    if data.task == "detect" and truth is not None:
        sides = truth["boxes"][:, 2:] - truth["boxes"][:, :2]
        boxes = np.sqrt(np.maximum(sides.prod(1), 0)).tolist()
    size, mode, kind, turned, frames = facts
    digest = hashlib.sha256(content).hexdigest()
    return Look(size, mode, kind, turned, frames, digest, len(content), data.classes_in(sample, truth), boxes)


def _facts(image: Any) -> tuple[tuple[int, int], str, str, bool, int]:
    turned = upright(image)
    frames = getattr(image, "n_frames", 1)
    return turned.size, image.mode, image.format or "none", turned.size != image.size, int(frames)


def _classes(data: DataSet, looks: Sequence[tuple[Sample, Look]]) -> dict[str, Any]:
    """Images (boxes, shares of pixels) by class and split, and the largest and the smallest class."""
    splits = list(dict.fromkeys(sample.split or "all" for sample in data.samples))
    counts = {split: np.zeros(len(data.class_names), np.int64) for split in splits}
    if data.whole:
        index = {name: i for i, name in enumerate(data.class_names)}
        for sample in data.samples:
            which = index[str(sample.label)] if sample.values is None else sample.values == 1
            counts[sample.split or "all"][which] += 1
    else:
        for sample, look in looks:
            counts[sample.split or "all"] += look.classes
    unit = {"detect": "boxes", "segment": "pixels"}.get(data.task, "images")
    table = {name: {split: int(counts[split][i]) for split in splits} for i, name in enumerate(data.class_names)}
    totals = {name: sum(row.values()) for name, row in table.items()}
    result: dict[str, Any] = {"counted": unit, "classes": table}
    if totals:
        largest, smallest = max(totals, key=lambda name: totals[name]), min(totals, key=lambda name: totals[name])
        result |= {"largest_class": [largest, totals[largest]], "smallest_class": [smallest, totals[smallest]]}
    return result


def _shapes(looks: Sequence[tuple[Sample, Look]]) -> dict[str, Any]:
    if not looks:
        return {"sizes": {}, "modes": {}, "formats": {}}
    sizes = np.array([look.size for _, look in looks])
    order = np.argsort(sizes.prod(1), kind="stable")
    ends = {word: sizes[order[int(at * (len(order) - 1))]].tolist() for word, at in
            (("smallest", 0.0), ("median", 0.5), ("largest", 1.0))}  # fmt: skip
    return {
        "sizes": {**ends, "distinct": len(np.unique(sizes, axis=0))},
        "modes": dict(Counter(look.mode for _, look in looks).most_common()),
        "formats": dict(Counter(look.format for _, look in looks).most_common()),
        "bytes": int(sum(look.bytes for _, look in looks)),
    }


def _boxes(looks: Sequence[tuple[Sample, Look]]) -> dict[str, Any]:
    sides = np.array([side for _, look in looks for side in look.boxes])
    small, large = BOX_SIDES
    kinds = {"small": sides < small, "medium": (sides >= small) & (sides < large), "large": sides >= large}
    return {
        "box_sizes": {word: int(kept.sum()) for word, kept in kinds.items()},
        "images_without_boxes": sum(not look.boxes for _, look in looks),
    }


def _odd(looks: Sequence[tuple[Sample, Look]]) -> list[list[str]]:
    """Images that are read, but may not be what was meant."""
    usual = {mode for mode, count in Counter(look.mode for _, look in looks).items() if count > 0.05 * len(looks)}
    found = []
    for sample, look in looks:
        short, long = sorted(look.size)
        reasons = [
            f"{look.size[0]}x{look.size[1]} pixels" if short < SMALL_SIDE else "",
            f"{long / short:.0f} times as long as wide" if long > LONG * short else "",
            f"mode {look.mode}" if look.mode not in usual or not _is_plain(look.mode) else "",
            f"{look.frames} frames, of which the first counts" if look.frames > 1 else "",
            "turned by its EXIF orientation" if look.turned else "",
        ]
        if any(reasons):
            found.append([sample.name, "; ".join(reason for reason in reasons if reason)])
    return found[:MOST_LISTED]


def _is_plain(mode: str) -> bool:
    """Whether a mode is common: grey, RGB, or that of any number of channels (``Bands.mode``)."""
    return mode in PLAIN_MODES or " x " in mode


def _duplicates(looks: Sequence[tuple[Sample, Look]]) -> dict[str, Any]:
    """Files that are equal byte for byte: in how many groups, between splits, with several labels."""
    groups: dict[str, list[Sample]] = defaultdict(list)
    for sample, look in looks:
        groups[look.digest].append(sample)
    several = [group for group in groups.values() if len(group) > 1]
    across = [group for group in several if len({sample.split for sample in group}) > 1]
    contradicting = [group for group in several if len({sample.label for sample in group}) > 1]
    first = [*contradicting, *(group for group in across if group not in contradicting)]
    listed = [*first, *(group for group in several if group not in first)][: MOST_LISTED // 10]
    return {
        "groups": len(several),
        "copies": sum(len(group) - 1 for group in several),
        "across_splits": len(across),
        "contradicting": len(contradicting),
        "files": [[[sample.name, sample.split, sample.label or ""] for sample in group] for group in listed],
    }


def _warnings(found: dict[str, Any]) -> list[str]:
    """What to see to first, a line each."""
    lines, duplicates = [], found["duplicates"]
    if duplicates["contradicting"]:
        lines.append(f"{duplicates['contradicting']:,} images are there under several labels")
    if duplicates["across_splits"]:
        lines.append(f"{duplicates['across_splits']:,} images are in several splits: scores look better than they are")
    if found["broken"]:
        lines.append(f"{len(found['broken']):,} files can't be used")
    empty = [name for name, row in found["classes"].items() if not sum(row.values())]
    if empty:
        lines.append(f"there is nothing of the class{'es' if len(empty) > 1 else ''} {abbreviate(empty)}")
    if "largest_class" in found:
        (large, most), (small, least) = found["largest_class"], found["smallest_class"]
        if least and most >= IMBALANCE * least:
            unit = found["counted"]
            lines.append(f"{large!r} has {most / least:.0f} times as many {unit} as {small!r}")
    return lines + known.warnings(found)
