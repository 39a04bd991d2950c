"""What a network's outputs say about images as a whole, by task: NumPy alone, so that exported files need no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["answers", "probabilities"]

Answer = dict[str, Any]


def answers(
    task: str, outputs: np.ndarray, class_names: Sequence[str], task_args: Mapping[str, Any] | None, top_k: int
) -> list[Answer]:
    """What ``transcnn predict`` returns for each row of outputs (B, classes), without the file's name."""
    return _ANSWERS[task](np.asarray(outputs, np.float32), class_names, task_args or {}, top_k)


def probabilities(task: str, outputs: np.ndarray) -> np.ndarray:
    """Of each output, (B, classes) -> the same: softmax where an image is of one class, else the sigmoid of each."""
    if task == "classify":
        scores = np.exp(outputs - outputs.max(1, keepdims=True))
        return scores / scores.sum(1, keepdims=True)
    return 1 / (1 + np.exp(-np.clip(outputs, -80, 80)))


def _classes(outputs: np.ndarray, names: Sequence[str], args: Mapping[str, Any], top_k: int) -> list[Answer]:
    """``{"top": [{"label": ..., "score": ...}, ...]}``: the likeliest classes and their probabilities."""
    return [{"top": _top(row, names, top_k)} for row in probabilities("classify", outputs)]


def _top(scores: np.ndarray, names: Sequence[str], top_k: int) -> list[dict[str, Any]]:
    order = np.argsort(-scores, kind="stable")[:top_k]
    return [{"label": names[i], "score": float(scores[i])} for i in order]


def _labels(outputs: np.ndarray, names: Sequence[str], args: Mapping[str, Any], top_k: int) -> list[Answer]:
    """``{"labels": [...], "top": [...]}``: the labels that hold, the most probable first, and probabilities."""
    thresholds = np.array(args.get("thresholds") or [0.5] * len(names))
    rows = []
    for scores in probabilities("multilabel", outputs):
        order = np.argsort(-scores, kind="stable")
        holding = [names[i] for i in order if scores[i] >= thresholds[i]]
        rows.append({"labels": holding, "top": _top(scores, names, top_k)})
    return rows


def _numbers(outputs: np.ndarray, names: Sequence[str], args: Mapping[str, Any], top_k: int) -> list[Answer]:
    """``{"values": {name: number}}`` in the unit of the data."""
    mean, std = (np.array(args.get(key) or [other] * len(names)) for key, other in (("mean", 0.0), ("std", 1.0)))
    return [{"values": dict(zip(names, row.tolist(), strict=True))} for row in outputs * std + mean]


_ANSWERS: dict[str, Callable[..., list[Answer]]] = {"classify": _classes, "multilabel": _labels, "regress": _numbers}
