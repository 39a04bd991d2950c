"""Figures that large classes don't decide alone, and what to say of classes of very different sizes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..data.sources.source import abbreviate
from ..errors import require
from ..text import printable

__all__ = ["class_figures", "macro_figures", "remarks_on_classes"]

RATIO = 10  # between the largest and the smallest class, from which on it is told


def macro_figures(confusion: np.ndarray) -> dict[str, float]:
    """Figures in percent in which all classes count alike: balanced accuracy, and macro precision and F1.

    (The mean of the classes' recalls is the balanced accuracy, over classes that occur; precision and F1 are over
    classes that occur or are predicted.)
    """
    precision, _, f1 = _per_class(confusion)
    met = (confusion.sum(0) + confusion.sum(1)) > 0
    truths, predicted, counts = _pairs(confusion)
    metrics: Any = require("sklearn.metrics", "train")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes that are predicted and don't occur
        balanced = metrics.balanced_accuracy_score(truths, predicted, sample_weight=counts) if len(counts) else 0.0
    means = {"macro_precision": precision[met], "macro_f1": f1[met]}
    return {
        "balanced_accuracy": 100 * float(balanced),
        **{name: 100 * float(values.mean()) if len(values) else 0.0 for name, values in means.items()},
    }


def class_figures(confusion: np.ndarray, names: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """``class_precision``, ``class_recall`` and ``class_f1`` in percent by name; None for what can't be told."""
    precision, recall, f1 = _per_class(confusion)
    occurs, predicted = confusion.sum(1) > 0, confusion.sum(0) > 0
    known = {"class_precision": (precision, predicted), "class_recall": (recall, occurs), "class_f1": (f1, occurs)}
    return {
        title: {
            name: round(100 * float(value), 3) if told else None for name, value, told in zip(names, *pair, strict=True)
        }
        for title, pair in known.items()
    }


def remarks_on_classes(labels: dict[str, np.ndarray], names: Sequence[str]) -> list[str]:
    """Lines about classes without images in a split, and about ones that are far rarer than others in training."""
    remarks = []
    for split, values in labels.items():
        missing = sorted(set(range(len(names))) - set(np.unique(values).tolist()))
        if missing:
            remarks.append(f"the {split} split has no images of {printable(abbreviate([names[i] for i in missing]))}")
    counts = np.bincount(labels["train"], minlength=len(names))
    smallest, largest = int(np.where(counts, counts, counts.max()).argmin()), int(counts.argmax())
    if counts[largest] >= RATIO * counts[smallest]:
        few, many = (f"{printable(names[i])} has {counts[i]:,}" for i in (smallest, largest))
        remarks.append(
            f"{many} training images, {few}: --logit_adjustment 1 finds rare classes, and --eval_metric "
            "balanced_accuracy chooses the epoch by all classes alike"
        )
    return remarks


def _pairs(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """True class, predicted class and number of images, of each pair that occurs."""
    truths, predicted = np.nonzero(confusion)
    return truths, predicted, confusion[truths, predicted]


def _per_class(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall and F1 of each class, 0 where there is nothing to count."""
    truths, predicted, counts = _pairs(confusion)
    if not len(counts):
        none = np.zeros(len(confusion))
        return none, none, none
    metrics: Any = require("sklearn.metrics", "train")
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(
        truths, predicted, labels=np.arange(len(confusion)), sample_weight=counts, zero_division=0.0
    )
    return precision, recall, f1
