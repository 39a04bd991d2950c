"""Classification: one label an image."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAUROC, MulticlassConfusionMatrix

from ..data.sets.image_dataset import ImageDataset
from ..data.sets.splits import Splits
from ..distributed.processes import gather_lists
from ..errors import UserError
from ..report.classify import MAX_MATRIX, write_report
from ..report.page import NAMES
from ..text import rich_text
from .distill import Teacher
from .features import map_of
from .image import ImageTask
from .imbalance import class_figures, macro_figures, remarks_on_classes
from .losses import ImbalancedCrossEntropy, weights_of
from .sliding import average

__all__ = ["Classify"]

Row = tuple[int, int, int, float]  # index in the split, true class, predicted class, its probability
MAX_CORRECT = 12  # correct predictions kept for the report, of as many classes
MAX_AUROC = 200  # classes
FIGURES = ("top1", "top5", "balanced_accuracy", "macro_precision", "macro_f1", "auroc", "loss")
MAX_WRONG = 48  # wrong predictions kept for the report, most confident first


class Classify(ImageTask):
    """Image classification: cross entropy with smoothed or mixed labels, scored by accuracy.

    Batches are (images (B, C, H, W), labels (B,)).
    """

    name = "classify"
    score = "top1"
    group = "classify"
    eval_metrics = ("top1", "balanced_accuracy", "macro_f1", "macro_precision", "auroc", "loss")
    silent_figures = ("balanced_accuracy", "macro_f1", "macro_precision", "auroc")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        a, classes = self.augment, len(self.class_names)
        self.teacher: Teacher | None = None
        self.train_loss: nn.Module = self._make_loss(a.smoothing)
        if a.mixup > 0 or a.cutmix > 0:
            self.mixup = Mixup(a.mixup, a.cutmix, prob=a.mix_prob, label_smoothing=a.smoothing, num_classes=classes)
        self.confusion = MulticlassConfusionMatrix(classes) if classes > 1 else None
        # It keeps all probabilities until the split is through.
        self.auroc = MulticlassAUROC(classes, average="none") if 1 < classes <= MAX_AUROC else None
        self._forget()

    @classmethod
    def open_data(cls, data: str | None, task_args: dict[str, Any], **settings: Any) -> Splits:
        """The splits of a classification data set; ``counts`` are the training images of each class."""
        splits = super().open_data(data, task_args, **settings)
        counts = np.bincount(splits.train.labels, minlength=len(splits.class_names)).tolist()
        weights_of(
            task_args.get("class_weights", "none"), counts, splits.class_names
        )  # refuses names that aren't there
        splits.task_args["counts"] = counts
        return splits

    @classmethod
    def remarks(cls, splits: Splits) -> list[str]:
        """About classes without images, and rare ones."""
        labels = {name: part.labels for name in ("train", "val", "test") if (part := getattr(splits, name)) is not None}
        return remarks_on_classes(labels, splits.class_names)

    @property
    def measured(self) -> tuple[str, ...]:
        """The AUROC is one of few classes."""
        return tuple(name for name in self.eval_metrics if name != "auroc" or self.auroc is not None)

    def _make_loss(self, smoothing: float) -> nn.Module:
        """As the task's settings say; timm's where they say nothing."""
        args = self.task_args
        counts = args.get("counts") or [1] * len(self.class_names)
        weights = weights_of(args.get("class_weights", "none"), counts, self.class_names)
        gamma = args.get("focal_gamma", 2.0) if args.get("loss") == "focal" else 0.0
        adjustment = args.get("logit_adjustment", 0.0)
        if weights is None and not gamma and not adjustment:
            mixed = self.augment.mixup > 0 or self.augment.cutmix > 0
            return SoftTargetCrossEntropy() if mixed else LabelSmoothingCrossEntropy(smoothing)
        shares = torch.tensor(counts, dtype=torch.float32).clamp(min=0.5) / max(1, sum(counts))
        return ImbalancedCrossEntropy(smoothing, weights, gamma, adjustment * shares.log() if adjustment else None)

    def loss(self, batch: Any) -> Tensor:
        """Cross entropy, after resizing and mixing where those are asked for."""
        images, labels = batch
        images = self.resized(images)
        if self.mixup is not None:
            images, labels = self.mixed(images, labels)
        logits = self(images).float()
        loss = self.train_loss(logits, labels)
        return loss if self.teacher is None else self.teacher.loss(loss, logits, images)

    def learn_from(self, teacher: Teacher) -> None:
        """Learn from a teacher's predictions as well."""
        self.teacher = teacher

    def evaluate_batch(self, batch: Any, batch_idx: int) -> None:
        """Count correct predictions; keep the most confident wrong ones with their index in the split."""
        images, labels = batch
        counted = labels >= 0  # broken files and padding are not to be scored
        indices = torch.tensor([self.sample_index(self._seen + i) for i in range(len(labels))])[counted.cpu()]
        self._seen += len(labels)
        logits, labels = self._logits(images)[counted], labels[counted]
        self._loss = self._loss.to(logits.device) + F.cross_entropy(logits, labels, reduction="sum").double()
        self._top5 = self._top5.to(logits.device) + _hits(logits, labels, 5)
        probabilities = logits.softmax(1)
        if self.auroc is not None and len(labels):
            self.auroc.update(probabilities, labels)
        probability, prediction = probabilities.max(1)
        if self.confusion is not None:
            self.confusion.update(prediction, labels)
        wrong = (prediction != labels).cpu()
        columns = (indices, labels.cpu(), prediction.cpu(), probability.cpu())
        rows = list(zip(*(column.tolist() for column in columns), strict=True))
        self._wrong = _most_confident([*self._wrong, *(row for row, no in zip(rows, wrong, strict=True) if no)])
        self._correct = _best_of_class([*self._correct, *(row for row, no in zip(rows, wrong, strict=True) if not no)])

    def _logits(self, images: Tensor) -> Tensor:
        """Logits (B, classes), of the mirrored images, too, where the task's settings say ``flip``."""
        logits = self(images).float()
        return average(logits, self(images.flip(-1)).float()) if self.task_args.get("flip") else logits

    def scores(self) -> dict[str, Any]:
        """``top1``, ``top5`` (more than five classes only), ``loss``; ``confusion``, ``wrong`` and ``images``.

        Each row of ``wrong``, and of ``correct``, the most confident one of each class, is (index in the split, true
        class, predicted class, its probability). All is that of all processes together.
        """
        if self.confusion is None:
            raise UserError("there must be at least two classes to score")
        confusion = self.confusion.compute().cpu()
        totals = torch.stack([self._loss.to(self.device), self._top5.to(self.device)])
        totals = self.trainer.strategy.reduce(totals, reduce_op="sum")
        images = max(1, int(confusion.sum()))
        result: dict[str, Any] = {"top1": confusion.diagonal().sum().item() / images * 100}
        if len(self.class_names) > 5:
            result["top5"] = totals[1].item() / images * 100
        wrong, correct = gather_lists(self._wrong), gather_lists(self._correct)
        result |= macro_figures(confusion.numpy())
        if self.auroc is not None:
            result["auroc"] = self._auroc(confusion.sum(1))
        result |= {"loss": totals[0].item() / images}
        result |= {"images": confusion.sum(), "confusion": confusion, "wrong": _most_confident(wrong)}
        result["correct"] = _best_of_class(correct)
        self._forget()
        return result

    def _auroc(self, images: Tensor) -> float:
        """The mean over the classes of their areas under the curve against all others, 0 to 1.

        ``images`` are those of each class. A class that no image has, or all have, has no such curve (torchmetrics
        answers 0) and is left out of the mean, which is NaN where none is left.
        """
        assert self.auroc is not None
        if not int(images.sum()):  # in no process any
            return math.nan
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of classes without images
            if not self.auroc.update_called:  # a process without images takes part in the gathering
                none = torch.zeros(0, device=self.device)
                self.auroc.update(none.reshape(0, len(self.class_names)), none.long())
            areas = self.auroc.compute().cpu()
        return float(areas[(images > 0) & (images < images.sum())].mean())

    def summary(self, scores: dict[str, Any]) -> dict[str, Any]:
        """Accuracies in percent: ``top1``, ``top5``, ``class_accuracy`` by name (None for a class without images).

        Beside them what counts all classes alike, ``class_precision`` and ``class_f1``, and where there are no more
        than 100 classes ``confusion``, a list for each true class.
        """
        confusion = scores["confusion"]
        totals, right = confusion.sum(1).tolist(), confusion.diagonal().tolist()
        per_class = {
            name: round(100 * r / n, 3) if n else None
            for name, r, n in zip(self.class_names, right, totals, strict=True)
        }
        numbers = {name: round(scores[name], 4) for name in FIGURES if name in scores}
        if math.isnan(numbers.get("auroc", 0.0)):  # of one class alone
            del numbers["auroc"]
        more: dict[str, Any] = class_figures(confusion.numpy(), self.class_names)
        del more["class_recall"]  # class_accuracy is that
        if len(self.class_names) <= MAX_MATRIX:
            more["confusion"] = confusion.tolist()
        images, seconds = int(scores["images"]), scores["seconds"]
        speed = {"images": images, "seconds": round(seconds, 2), "images_per_second": round(images / seconds, 1)}
        return {"task": self.name, **numbers, **speed, "class_accuracy": per_class, **more}

    def headline(self, metrics: dict[str, Any]) -> str:
        """For instance ``top-1 98.61 %``."""
        return f"top-1 {metrics['top1']:.2f} %"

    def print_table(self, metrics: dict[str, Any]) -> None:
        """Accuracies, and the ten classes with the lowest."""
        table = Table(box=None, show_header=False)
        for name in FIGURES[:-2]:
            if name in metrics:
                table.add_row(NAMES.get(name, name.replace("_", " ")), f"{metrics[name]:.2f} %")
        if "auroc" in metrics:
            table.add_row(NAMES["auroc"], f"{metrics['auroc']:.4f}")
        table.add_row("loss", f"{metrics['loss']:.4f}")
        twice = ", each also mirrored" if metrics.get("flip") else ""
        table.add_row("images", rich_text(f"{metrics['images']:,} ({metrics['split']} of {metrics['data']}{twice})"))
        table.add_row("speed", f"{metrics['images_per_second']:.0f} images/s")
        console = Console(highlight=False)
        console.print(table)
        known = [(value, name) for name, value in metrics["class_accuracy"].items() if value is not None]
        table = Table(box=None)
        for title in ("class", "accuracy", "precision", "F1"):
            table.add_column(title)
        for value, name in sorted(known)[:10]:
            rest = [metrics[key][name] for key in ("class_precision", "class_f1")]
            table.add_row(rich_text(name), f"{value:.2f} %", *("-" if v is None else f"{v:.2f} %" for v in rest))
        if len(known) > 10:
            table.add_row("...", f"{len(known) - 10} classes above")
        console.print()
        console.print(table)

    def write_report(self, folder: Path, scores: dict[str, Any], split: ImageDataset, metrics: dict[str, Any]) -> None:
        """Curves, confusion matrix, classes and the most confident wrong predictions."""
        history = folder / "metrics.csv"
        names = self.class_names
        rows: dict[str, list[Any]] = {"wrong": [], "correct": []}
        for kind, entries in rows.items():
            for index, truth, prediction, score in scores[kind]:
                image, _, name = split.read(index)
                entries.append((image, truth, prediction, score, Path(name).name))
        confusion = scores["confusion"].numpy()
        shown = {key: value for key, value in metrics.items() if not isinstance(value, dict)}
        shown["input_size"] = self.data_config.get("input_size")
        by = self.task_args.get("report_map", "pca")
        points = map_of(self.model, split, metrics.get("images_per_second", 0.0), by)
        known = history if history.exists() else None
        write_report(folder, known, confusion, names, metrics=shown, points=points, map_by=by, **rows)

    def _forget(self) -> None:
        for metric in (self.confusion, self.auroc):
            if metric is not None:
                metric.reset()
        self._loss = torch.zeros((), dtype=torch.float64)
        self._top5 = torch.zeros((), dtype=torch.float64)
        self._seen = 0
        self._wrong: list[Row] = []
        self._correct: list[Row] = []


def _most_confident(rows: list[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: (-row[3], row[0]))[:MAX_WRONG]


def _best_of_class(rows: list[Row]) -> list[Row]:
    """The most confident row of each of the first classes."""
    best: dict[int, Row] = {}
    for row in sorted(rows, key=lambda row: (row[1], -row[3], row[0])):
        best.setdefault(row[1], row)
    return list(best.values())[:MAX_CORRECT]


def _hits(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """How many labels are among the k largest logits."""
    best = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (best == labels[:, None]).any(1).sum()
