"""Multi-label classification: any number of labels an image, each with a probability of its own."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from timm.data import Mixup
from timm.loss import AsymmetricLossMultiLabel
from torch import Tensor

from ..data.sets.image_dataset import ImageDataset
from ..data.sets.splits import Splits
from ..data.sources.targets import Labels
from ..errors import require
from ..onnx.answers import probabilities
from ..report.labels import write_label_report
from ..text import printable, rich_text
from .collected import CollectedTask

__all__ = ["Multilabel", "best_thresholds"]

FIGURES = {"map": "mAP", "macro_f1": "macro F1", "micro_f1": "micro F1", "exact_match": "exact match"}
WORST = 24  # images of the report


class Multilabel(CollectedTask):
    """Any number of labels an image: binary cross entropy or asymmetric loss, scored by the mean average precision.

    Batches are (images (B, C, H, W), labels (B, L) of 0, 1 and NaN, which is not known). The thresholds from which on
    labels hold are chosen on the validation split and kept with the weights (``task_args["thresholds"]``).
    """

    name = "multilabel"
    group = "multilabel"
    outputs = "labels"
    score = "map"
    eval_metrics = (*FIGURES, "loss")
    targets = Labels

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        a = self.augment
        if a.mixup > 0 or a.cutmix > 0:
            self.mixup = Mixup(
                a.mixup,
                a.cutmix,
                prob=a.mix_prob,
                num_classes=len(self.class_names),
                multi_label=True,
                label_smoothing=0.0,
            )
        self.register_buffer("pos_weight", self._pos_weight(), persistent=False)
        asymmetric = self.task_args.get("loss") == "asl"
        weight: Any = self.pos_weight
        self._asl = AsymmetricLossMultiLabel(reduction="none", pos_weight=weight) if asymmetric else None

    @classmethod
    def open_data(cls, data: str | None, task_args: dict[str, Any], **settings: Any) -> Splits:
        """The splits of a multi-label data set; ``counts`` are the training images with each label."""
        splits = super().open_data(data, task_args, **settings)
        labels = splits.train.labels
        splits.task_args |= {"counts": (labels == 1).sum(0).tolist(), "without": (labels == 0).sum(0).tolist()}
        return splits

    @classmethod
    def remarks(cls, splits: Splits) -> list[str]:
        """About labels that no training image has, or all have."""
        labels, names = splits.train.labels, splits.class_names
        empty = {word: ((labels == value).sum(0) == 0).nonzero()[0] for word, value in (("no", 1), ("every", 0))}
        return [
            f"{word} training image has the label {printable(names[i])}"
            for word, which in empty.items()
            for i in which[:8]
        ]

    def caption(self, truth: Any) -> str:
        """The labels of an image."""
        return (
            ", ".join(name for name, value in zip(self.class_names, truth.tolist(), strict=True) if value == 1) or "-"
        )

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Binary cross entropy, or timm's asymmetric loss, of each entry."""
        if self._asl is not None:
            return self._asl(outputs, labels)
        weight: Any = self.pos_weight
        return F.binary_cross_entropy_with_logits(outputs, labels, pos_weight=weight, reduction="none")

    def _pos_weight(self) -> Tensor | None:
        """What counts more of each label, where images have it."""
        kind, args = self.task_args.get("class_weights", "none"), self.task_args
        if kind == "none" or not args.get("counts"):
            return None
        having, without = (torch.tensor(args[key], dtype=torch.float32).clamp(min=1) for key in ("counts", "without"))
        return (without / having) ** (1.0 if kind == "balanced" else 0.5)

    @property
    def thresholds(self) -> np.ndarray:
        """The probability from which on each label holds."""
        return np.array(self.task_args.get("thresholds") or [0.5] * len(self.class_names))

    def figures(self, indices: np.ndarray, outputs: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """``map``, ``macro_f1``, ``micro_f1``, ``exact_match`` in percent; ``table`` by label, ``worst`` images.

        In training the thresholds are chosen first: for each label the one of the best F1. Of outputs that are NaN no
        label holds; the loss, which is NaN then, tells of them.
        """
        scores = np.nan_to_num(probabilities(self.name, outputs))
        if not self.trainer.testing:
            fixed = self.task_args.get("threshold")
            chosen = best_thresholds(scores, labels) if fixed is None else [fixed] * len(self.class_names)
            self.task_args["thresholds"] = chosen  # stored with the weights
        predicted = scores >= self.thresholds
        rows = [self._label_row(i, scores[:, i], predicted[:, i], labels[:, i]) for i in range(len(self.class_names))]
        known = ~np.isnan(labels)
        right = (predicted == (labels == 1)) | ~known
        metrics: Any = require("sklearn.metrics", "train")
        micro = metrics.f1_score(labels[known] == 1, predicted[known], zero_division=0.0) if known.any() else 0.0
        f1 = [row["f1"] for row in rows if row["f1"] is not None]
        precision = [row["ap"] for row in rows if row["ap"] is not None]
        losses = np.where(known, np.abs(np.nan_to_num(labels) - scores), 0).max(1, initial=0)
        order = np.argsort(-losses, kind="stable")[:WORST]
        return {
            "map": 100 * float(np.mean(precision)) if precision else 0.0,
            "macro_f1": 100 * float(np.mean(f1)) if f1 else 0.0,
            "micro_f1": 100 * float(micro),
            "exact_match": 100 * float(right.all(1).mean()) if len(right) else 0.0,
            "table": rows,
            "worst": [(int(indices[i]), labels[i], predicted[i], float(losses[i])) for i in order],
        }

    def _label_row(self, i: int, scores: np.ndarray, predicted: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """Figures of one label (shares from 0 to 1), None for what can't be told."""
        known = ~np.isnan(labels)
        truth, scores, predicted = labels[known] == 1, scores[known], predicted[known]
        metrics: Any = require("sklearn.metrics", "train")
        row: dict[str, Any] = {"label": self.class_names[i], "images": int(truth.sum()), "of": int(known.sum())}
        row |= {"threshold": round(float(self.thresholds[i]), 4), "found": int((predicted & truth).sum())}
        row |= {"wrongly": int((predicted & ~truth).sum()), "ap": None, "precision": None, "recall": None, "f1": None}
        if truth.any():
            row["ap"] = float(metrics.average_precision_score(truth, scores))
            found = metrics.precision_recall_fscore_support(truth, predicted, average="binary", zero_division=0.0)
            row |= dict(zip(("precision", "recall", "f1"), map(float, found[:3]), strict=True))
        return row

    def summary(self, scores: dict[str, Any]) -> dict[str, Any]:
        """Figures in percent, by label ``class_ap``, ``class_f1``, ``class_precision``, ``class_recall``; ``labels``.

        None stands for a label that no image has; ``labels`` has counts and thresholds.
        """
        numbers = {name: round(scores[name], 4) for name in (*FIGURES, "loss")}
        images, seconds = int(scores["images"]), scores["seconds"]
        speed = {"images": images, "seconds": round(seconds, 2), "images_per_second": round(images / seconds, 1)}
        rows = scores["table"]
        by_label = {
            f"class_{key}": {row["label"]: None if row[key] is None else round(100 * row[key], 3) for row in rows}
            for key in ("ap", "f1", "precision", "recall")
        }
        counts = {
            row["label"]: {key: row[key] for key in ("images", "of", "found", "wrongly", "threshold")} for row in rows
        }
        return {"task": self.name, **numbers, **speed, **by_label, "labels": counts}

    def headline(self, metrics: dict[str, Any]) -> str:
        """For instance ``mAP 81.20 %, macro F1 74.00 %``."""
        return f"mAP {metrics['map']:.2f} %, macro F1 {metrics['macro_f1']:.2f} %"

    def print_table(self, metrics: dict[str, Any]) -> None:
        """The figures, and those of each label, the lowest average precision first."""
        table = Table(box=None, show_header=False)
        for name, word in FIGURES.items():
            table.add_row(word, f"{metrics[name]:.2f} %")
        table.add_row("loss", f"{metrics['loss']:.4f}")
        table.add_row("images", rich_text(f"{metrics['images']:,} ({metrics['split']} of {metrics['data']})"))
        table.add_row("speed", f"{metrics['images_per_second']:.0f} images/s")
        console = Console(highlight=False)
        console.print(table)
        table = Table(box=None)
        for title in ("label", "AP", "F1", "precision", "recall", "images", "threshold"):
            table.add_column(title)
        ranked = sorted(metrics["class_ap"].items(), key=lambda pair: (pair[1] is None, pair[1] or 0.0))
        for name, _ in ranked[:50]:
            values = [metrics[f"class_{key}"][name] for key in ("ap", "f1", "precision", "recall")]
            counts = metrics["labels"][name]
            words = ["-" if value is None else f"{value:.2f} %" for value in values]
            table.add_row(rich_text(name), *words, f"{counts['images']:,}", f"{counts['threshold']:.3f}")
        if len(ranked) > 50:
            table.add_row("...", f"{len(ranked) - 50} labels above")
        console.print()
        console.print(table)

    def write_report(self, folder: Path, scores: dict[str, Any], split: ImageDataset, metrics: dict[str, Any]) -> None:
        """Curves, labels, and the images whose labels are most wrong."""
        cells = []
        for index, truth, predicted, _ in scores["worst"]:
            image, _, name = split.read(index)
            wrong = [
                f"{'missed' if is_there else 'not there'}: {label}"
                for label, is_there, said in zip(self.class_names, truth == 1, predicted, strict=True)
                if is_there != said
            ]
            cells.append((image, [self.caption(torch.from_numpy(truth)), ", ".join(wrong) or "right", Path(name).name]))
        shown = {key: value for key, value in metrics.items() if not isinstance(value, dict | list)}
        shown["input_size"] = self.data_config.get("input_size")
        write_label_report(folder, scores["table"], cells, shown)


def best_thresholds(scores: np.ndarray, labels: np.ndarray) -> list[float]:
    """For each label the probability of best F1, half-way to the next lower one; 0.5 where there is nothing to choose.

    Args:
        scores: Probabilities, (N, L).
        labels: 1, 0 and NaN, (N, L).
    """
    metrics: Any = require("sklearn.metrics", "train")
    chosen = []
    for score, label in zip(scores.T, labels.T, strict=True):
        known = ~np.isnan(label)
        score, truth = score[known].astype(np.float64), label[known] == 1
        if not truth.any() or truth.all():
            chosen.append(0.5)
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            precision, recall, thresholds = metrics.precision_recall_curve(truth, score)
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        best = int(f1[:-1].argmax())
        lower = score[score < thresholds[best]].max(initial=0.0)
        chosen.append(float((thresholds[best] + lower) / 2))
    return chosen
