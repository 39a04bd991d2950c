"""Segmentation: a class for each pixel."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from ..data.bands import is_per_channel
from ..data.images import fit_factor
from ..data.sets.dense_dataset import DenseDataset
from ..data.sets.segment import open_set, open_splits
from ..data.sets.splits import Splits
from ..data.transforms.segment import IGNORE, TrainTransform
from ..dense.segmenters import class_weights
from ..distributed.processes import gather_lists
from ..report.dense import best_median_worst, class_iou, write_segment_report
from ..report.overlay import blend, palette
from ..settings import Augment
from ..text import rich_text
from .dense import DenseTask
from .inference import SegmentInference, logits_of_pixels

__all__ = ["Segment"]

MAX_PIXELS = 1 << 22  # pixels times images that are evaluated together


class Segment(SegmentInference, DenseTask):
    """Semantic segmentation: cross entropy, Dice or both, scored by the mean IoU over all pixels of a set.

    Training batches are (images (B, C, h, w), label maps (B, h, w)); others are lists of images (C, h, w) and of label
    maps (H, W) at full size, which is where scores are measured.
    """

    name = "segment"
    scored = "pixels"
    group = "segment"
    score = "miou"
    eval_metrics = ("miou", "pixel_accuracy", "mean_accuracy", "loss")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        classes = len(self.class_names)
        self.confusion = MulticlassConfusionMatrix(classes, ignore_index=IGNORE)
        weights = class_weights(self.task_args.get("class_weights", "none"), self.task_args.get("shares"))
        self.register_buffer("class_weights", weights, persistent=False)
        self._forget()

    @classmethod
    def open_data(cls, data: str | None, task_args: dict[str, Any], **settings: Any) -> Splits:
        """The splits of a segmentation data set."""
        return open_splits(data, task_args, **settings)

    @classmethod
    def train_transform(
        cls, data_config: dict[str, Any], augment: Augment, task_args: dict[str, Any]
    ) -> TrainTransform:
        """Parts of images, enlarged or shrunk, mirrored and changed in colour, with label maps that follow."""
        in_chans, *size = data_config["input_size"]
        return TrainTransform(
            tuple(size),
            scale_range=tuple(task_args["scale_range"]),
            hflip=augment.hflip,
            vflip=augment.vflip,
            color_jitter=augment.color_jitter,
            bands=is_per_channel(data_config.get("pixel_range")),
            in_chans=in_chans,
            mean=data_config["mean"],
            std=data_config["std"],
            resize=task_args["resize"],
        )

    @classmethod
    def open_split(
        cls, data: str | None, split: str, class_names: list[str], task_args: dict[str, Any], **settings: Any
    ) -> DenseDataset:
        """One split of a segmentation data set."""
        return open_set(data, split, class_names, task_args["label_ids"], task_args, **settings)

    @classmethod
    def enlargement(cls, short: int, long: int, task_args: dict[str, Any]) -> float:
        """That of the evaluation's resize, if there is any; windows are what is seen of larger images."""
        factor = fit_factor((short, long), task_args["resize"]) if task_args.get("resize") else 1.0
        window = task_args.get("window")
        return min(factor, window / long) if window else factor

    @property
    def colours(self) -> list[list[int]]:
        """Of each class: the data's, or our own."""
        return self.task_args.get("colours") or palette(len(self.class_names))

    def loss(self, batch: Any) -> Tensor:
        """Of the pixels that count; 0 where none does."""
        images, labels = batch
        logits = self(images).float()
        loss, kind = logits.new_zeros(()), self.task_args.get("loss", "ce")
        if kind in ("ce", "both"):
            weights: Any = self.class_weights
            losses = F.cross_entropy(
                logits,
                labels,
                weights,
                ignore_index=IGNORE,
                reduction="sum",
                label_smoothing=self.augment.smoothing,
            )
            counted = labels[labels != IGNORE]
            total = counted.numel() if weights is None else weights[counted].sum()
            loss = loss + losses / max(float(total), 1e-6)
        if kind in ("dice", "both"):
            loss = loss + self._dice(logits, labels)
        return loss

    def _dice(self, logits: Tensor, labels: Tensor) -> Tensor:
        from segmentation_models_pytorch.losses import DiceLoss

        return DiceLoss("multiclass", from_logits=True, ignore_index=IGNORE)(logits, labels)

    def evaluate_batch(self, batch: Any, batch_idx: int) -> None:
        """Count pixels by true and predicted class; keep each image's own score with its index in the split."""
        images, labels = batch
        start = 0
        for shape, group in groupby(zip(images, labels, strict=True), key=lambda pair: (pair[0].shape, pair[1].shape)):
            pairs = list(group)
            step = max(1, MAX_PIXELS // (shape[1].numel() * 4))
            for first in range(0, len(pairs), step):
                some = pairs[first : first + step]
                truth = torch.stack([label for _, label in some])
                logits = self.predict_logits(torch.stack([image for image, _ in some]), truth.shape[1:])
                self._count(logits, truth, self._seen + start)
                start += len(some)
        self._seen += len(images)

    def predict_logits(self, images: Tensor, size: Any) -> Tensor:
        """Logits (B, classes, H, W) at ``size``, with windows and mirroring as the settings say."""
        return logits_of_pixels(self, images, size, len(self.class_names), self.task_args)

    def _count(self, logits: Tensor, truth: Tensor, start: int) -> None:
        counted = (truth != IGNORE).sum()
        self._loss += F.cross_entropy(logits, truth, ignore_index=IGNORE, reduction="sum").double().cpu()
        self._pixels += counted.double().cpu()
        prediction = logits.argmax(1)
        self.confusion.update(prediction, truth)
        for i, (one, true) in enumerate(zip(prediction, truth, strict=True)):
            kept = true != IGNORE
            if kept.any():
                classes = len(self.class_names)
                table = torch.bincount(true[kept] * classes + one[kept], minlength=classes**2).view(classes, classes)
                # Only the classes that the image shows: a few stray pixels of another must not decide.
                shown = table.sum(1) > 0
                score = class_iou(table.cpu().numpy())[shown.cpu().numpy()].mean().item()
                self._images.append((self.sample_index(start + i), score))

    def scores(self) -> dict[str, Any]:
        """``miou``, ``pixel_accuracy``, ``mean_accuracy`` in percent, ``loss``; ``confusion``, ``images``, ``ranking``.

        ``ranking`` is (index in the split, IoU of its classes) of each image. All is that of all processes together.
        """
        none = torch.zeros(0, dtype=torch.long, device=self.device)
        self.confusion.update(none, none)  # a process without images would be warned
        confusion = self.confusion.compute().cpu()
        totals = torch.stack([self._loss, self._pixels, torch.tensor(float(len(self._images)), dtype=torch.float64)])
        totals = self.trainer.strategy.reduce(totals.to(self.device), reduce_op="sum").cpu()
        matrix = confusion.double().numpy()
        truths = matrix.sum(1)
        with np.errstate(invalid="ignore"):
            recall = matrix.diagonal() / truths
        result: dict[str, Any] = {
            "miou": 100 * _mean(class_iou(matrix)),
            "pixel_accuracy": 100 * matrix.trace() / max(1.0, matrix.sum()),
            "mean_accuracy": 100 * _mean(recall),
            "loss": totals[0].item() / max(1.0, totals[1].item()),
        }
        result |= {"images": totals[2].round().long(), "confusion": confusion}
        result["ranking"] = gather_lists(self._images)
        self._forget()
        return result

    def summary(self, scores: dict[str, Any]) -> dict[str, Any]:
        """``miou``, ``pixel_accuracy``, ``mean_accuracy`` and ``class_iou`` in percent (None: it doesn't occur)."""
        values = class_iou(scores["confusion"].double().numpy())
        per_class = {
            name: None if np.isnan(value) else round(100 * float(value), 3)
            for name, value in zip(self.class_names, values, strict=True)
        }
        numbers = {name: round(scores[name], 4) for name in ("miou", "pixel_accuracy", "mean_accuracy", "loss")}
        images, seconds = int(scores["images"]), scores["seconds"]
        speed = {"images": images, "seconds": round(seconds, 2), "images_per_second": round(images / seconds, 2)}
        return {"task": self.name, **numbers, **speed, "class_iou": per_class}

    def headline(self, metrics: dict[str, Any]) -> str:
        """For instance ``mIoU 56.20 %``."""
        return f"mIoU {metrics['miou']:.2f} %, pixel accuracy {metrics['pixel_accuracy']:.2f} %"

    def print_table(self, metrics: dict[str, Any]) -> None:
        """The figures, and the IoU of each class."""
        table = Table(box=None, show_header=False)
        for name, word in (("miou", "mIoU"), ("pixel_accuracy", "pixel accuracy"), ("mean_accuracy", "mean accuracy")):
            table.add_row(word, f"{metrics[name]:.2f} %")
        table.add_row("loss", f"{metrics['loss']:.4f}")
        table.add_row("images", rich_text(f"{metrics['images']:,} ({metrics['split']} of {metrics['data']})"))
        table.add_row("speed", f"{metrics['images_per_second']:.1f} images/s")
        table.add_row()
        table.add_row("class", "IoU")
        for name, value in metrics["class_iou"].items():
            table.add_row(rich_text(name), "does not occur" if value is None else f"{value:.2f} %")
        Console(highlight=False).print(table)

    def write_report(self, folder: Path, scores: dict[str, Any], split: DenseDataset, metrics: dict[str, Any]) -> None:
        """Curves, classes, the confusion matrix, and the best, median and worst predictions beside the ground truth."""
        examples = []
        for title, index, score in best_median_worst(scores["ranking"]):
            image, truth = split.read(index)
            pixels = split.transform(image)[0][None].to(self.device)
            with torch.inference_mode():
                prediction = self.predict_logits(pixels, truth.shape)[0].argmax(0).cpu().numpy()
            blended = [blend(image, labels, self.colours) for labels in (truth, np.where(truth < 0, -1, prediction))]
            examples.append((f"{title}: IoU {score:.0%}", Path(split.name(index)).name, [image, *blended]))
        write_segment_report(folder, scores["confusion"].numpy(), self.class_names, self.colours, examples, metrics)

    def _forget(self) -> None:
        self.confusion.reset()
        self._loss = torch.zeros((), dtype=torch.float64)
        self._pixels = torch.zeros((), dtype=torch.float64)
        self._seen = 0
        self._images: list[tuple[int, float]] = []


def _mean(values: np.ndarray) -> float:
    """Of those that are known; 0 where none is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else 0.0
