"""What a table says of its images beyond a class: several labels, and numbers, in figures."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from ..data.sources.source import abbreviate
from ..data.sources.table_source import NO_LABEL
from .samples import DataSet

__all__ = ["labels", "number_rows", "numbers", "values_of", "warnings"]

QUANTILES = {"min": 0.0, "q25": 0.25, "median": 0.5, "q75": 0.75, "max": 1.0}


def labels(data: DataSet) -> dict[str, Any]:
    """Of several labels an image: how many each has, and what isn't known.

    Returns:
        ``labels_per_image`` (number of labels -> images), ``unlabelled`` (rows left out for they say nothing), and
        ``unknown`` (label -> images of which it isn't known).
    """
    rows = values_of(data)
    per_image = Counter((rows == 1).sum(1).tolist())
    unknown = dict(zip(data.class_names, np.isnan(rows).sum(0).tolist(), strict=True))
    return {
        "labels_per_image": {str(number): per_image[number] for number in sorted(per_image)},
        "unlabelled": _unlabelled(data),
        "unknown": {name: count for name, count in unknown.items() if count},
    }


def numbers(data: DataSet) -> dict[str, Any]:
    """Of numbers: how they are distributed, by column and split.

    Returns:
        ``numbers`` (column -> split -> ``known``, ``unknown``, ``mean``, ``std`` and quantiles) and ``unlabelled``, as
        for labels; ``classes`` is empty.
    """
    rows = values_of(data)
    splits = np.array([sample.split or "all" for sample in data.samples])
    table = {
        name: {split: _figures(column[splits == split]) for split in dict.fromkeys(splits.tolist())}
        for name, column in zip(data.class_names, rows.T, strict=True)
    }
    return {"counted": "images", "classes": {}, "numbers": table, "unlabelled": _unlabelled(data)}


def values_of(data: DataSet) -> np.ndarray:
    """What is known of each image, (images, outputs), NaN where it isn't."""
    return np.array([sample.values for sample in data.samples], np.float64).reshape(-1, len(data.class_names))


def number_rows(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The table of numbers: a row for each column and split."""
    head = ["number", "split", "known", "mean", "std", *QUANTILES]
    rows = []
    for name, splits in found["numbers"].items():
        for split, figures in splits.items():
            shown = ["" if figures[key] is None else f"{figures[key]:,.6g}" for key in head[3:]]
            known, unknown = figures["known"], figures["unknown"]
            rows.append([name, split, f"{known:,}" + (f" of {known + unknown:,}" if unknown else ""), *shown])
    return head, rows


def warnings(found: dict[str, Any]) -> list[str]:
    """What to see to first, a line each."""
    lines = []
    if count := found.get("unlabelled"):
        lines.append(f"{count:,} rows have no label and are left out")
    for name, splits in found.get("numbers", {}).items():
        ends = {figures[key] for figures in splits.values() for key in ("min", "max")} - {None}
        if len(ends) == 1:
            lines.append(f"{name!r} is the same number for all images")
    if "labels_per_image" in found:
        everywhere = [
            name
            for name, row in found["classes"].items()
            if sum(row.values()) == found["images"] - found["unknown"].get(name, 0)
        ]
        if everywhere:
            plural = "s" * (len(everywhere) > 1)
            lines.append(f"every image has the label{plural} {abbreviate(everywhere)}")
    return lines


def _unlabelled(data: DataSet) -> int:
    return sum(reason.endswith(NO_LABEL) for _, reason in data.broken)


def _figures(values: np.ndarray) -> dict[str, Any]:
    known = values[~np.isnan(values)]
    counts: dict[str, Any] = {"known": len(known), "unknown": len(values) - len(known)}
    if not len(known):
        return {**counts, "mean": None, "std": None, **dict.fromkeys(QUANTILES)}
    ends = dict(zip(QUANTILES, np.quantile(known, list(QUANTILES.values())).tolist(), strict=True))
    return {**counts, "mean": float(known.mean()), "std": float(known.std()), **ends}
