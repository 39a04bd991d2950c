"""Regression: numbers of an image, in the unit of the data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchmetrics.functional.regression import spearman_corrcoef

from ..data.sets.image_dataset import ImageDataset
from ..data.sets.splits import Splits
from ..data.sources.targets import Numbers
from ..errors import require
from ..report.numbers import write_number_report
from ..text import rich_text
from .collected import CollectedTask

__all__ = ["Regress"]

FIGURES = {"mae": "MAE", "rmse": "RMSE", "r2": "R²", "spearman": "Spearman"}
WORST = 24  # images of the report


class Regress(CollectedTask):
    """One number or several an image, learnt standardised and answered in the data's unit.

    Batches are (images (B, C, H, W), numbers (B, T), NaN where one is not known). ``task_args`` hold mean and standard
    deviation of the training images' numbers.
    """

    name = "regress"
    group = "regress"
    outputs = "numbers"
    score = "mae"
    eval_metrics = (*FIGURES, "loss")
    lower_is_better = ("mae", "rmse", "loss")
    targets = Numbers

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        count = len(self.class_names)
        for name, otherwise in (("mean", 0.0), ("std", 1.0)):
            values = torch.tensor(self.task_args.get(name) or [otherwise] * count, dtype=torch.float32)
            self.register_buffer(name, values, persistent=False)

    @classmethod
    def open_data(cls, data: str | None, task_args: dict[str, Any], **settings: Any) -> Splits:
        """The splits of a data set with numbers; ``mean`` and ``std`` of the training images' are the scale."""
        splits = super().open_data(data, task_args, **settings)
        # Of few numbers those that differ may all have been held back.
        cls.targets().check(splits.train.labels, splits.class_names, "the training split")
        numbers = splits.train.labels.astype(np.float64)
        splits.task_args |= {"mean": np.nanmean(numbers, 0).tolist(), "std": np.nanstd(numbers, 0).tolist()}
        return splits

    def caption(self, truth: Any) -> str:
        """The numbers of an image."""
        return ", ".join("?" if math.isnan(value) else f"{value:,.6g}" for value in truth.tolist())

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Of standardised numbers, as ``loss`` says."""
        wanted = (labels - self.mean) / self.std  # pyright: ignore
        kind = {"mse": F.mse_loss, "l1": F.l1_loss, "huber": F.huber_loss}[self.task_args.get("loss", "mse")]
        return kind(outputs, wanted, reduction="none")

    def figures(self, indices: np.ndarray, outputs: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """``mae``, ``rmse``, ``r2``, ``spearman``, means over the columns; ``table`` by column, ``pairs``, ``worst``.

        NaN stands for what can't be told, such as the correlation of one image; a column whose labels don't tell a
        figure is left out of its mean.
        """
        mean, std = (getattr(self, name).cpu().numpy().astype(np.float64) for name in ("mean", "std"))
        found = outputs.astype(np.float64) * std + mean
        rows = [self._column(i, found[:, i], labels[:, i]) for i in range(len(self.class_names))]
        errors = np.nan_to_num(np.abs(found - labels) / std).max(1, initial=0)
        order = np.argsort(-errors, kind="stable")[:WORST]
        worst = [(int(indices[i]), labels[i], found[i]) for i in order]
        return {**_means(rows, labels), "table": rows, "pairs": (labels, found), "worst": worst}

    def _column(self, i: int, found: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        known = ~np.isnan(labels)
        truth, found = labels[known].astype(np.float64), found[known]
        row: dict[str, Any] = {"name": self.class_names[i], "images": len(truth), **dict.fromkeys(FIGURES, math.nan)}
        if not len(truth) or not np.isfinite(found).all():  # the loss isn't either, which is told
            return row
        metrics: Any = require("sklearn.metrics", "train")
        row["mae"] = float(metrics.mean_absolute_error(truth, found))
        row["rmse"] = float(metrics.root_mean_squared_error(truth, found))
        row["of_the_mean"] = float(np.abs(truth - self.mean[i].item()).mean())  # pyright: ignore
        if len(truth) > 1:
            row["r2"] = float(metrics.r2_score(truth, found))
            if truth.min() < truth.max() and found.min() < found.max():
                row["spearman"] = float(spearman_corrcoef(torch.from_numpy(found), torch.from_numpy(truth)))
        return row

    def warnings_about(self, scores: dict[str, Any]) -> list[str]:
        """A loss that isn't finite, or about the same number for all images."""
        told = super().warnings_about(scores)
        truth, found = scores.get("pairs", (np.zeros((0, 1)),) * 2)
        for name, wanted, said in zip(self.class_names, truth.T, found.T, strict=False):
            known = ~np.isnan(wanted)
            if known.sum() > 2 and said[known].std() < 0.01 * wanted[known].std():
                told.append(f"about the same {name} is predicted for all images, though they differ")
        return told

    def summary(self, scores: dict[str, Any]) -> dict[str, Any]:
        """The figures, in the data's unit but for R² and Spearman; ``columns`` has those of each; None: can't be told.

        ``of_the_mean`` is the mean absolute error of always answering the mean of the training images.
        """
        numbers = {name: _rounded(scores[name]) for name in (*FIGURES, "loss")}
        images, seconds = int(scores["images"]), scores["seconds"]
        speed = {"images": images, "seconds": round(seconds, 2), "images_per_second": round(images / seconds, 1)}
        columns = {
            row["name"]: {key: _rounded(value) for key, value in row.items() if key != "name"}
            for row in scores["table"]
        }
        return {"task": self.name, **numbers, **speed, "columns": columns}

    def headline(self, metrics: dict[str, Any]) -> str:
        """For instance ``MAE 1.25, R² 0.940``."""
        return f"MAE {_shown(metrics['mae'])}, R² {_shown(metrics['r2'])}"

    def print_table(self, metrics: dict[str, Any]) -> None:
        """The figures of each column."""
        table = Table(box=None)
        for title in ("", *FIGURES.values(), "MAE of the mean", "images"):
            table.add_column(title)
        for name, row in metrics["columns"].items():
            words = [_shown(row.get(key)) for key in (*FIGURES, "of_the_mean")]
            table.add_row(rich_text(name), *words, f"{row['images']:,}")
        console = Console(highlight=False)
        console.print(table)
        console.print()
        table = Table(box=None, show_header=False)
        table.add_row("loss", f"{metrics['loss']:.4f}")
        table.add_row("images", rich_text(f"{metrics['images']:,} ({metrics['split']} of {metrics['data']})"))
        table.add_row("speed", f"{metrics['images_per_second']:.0f} images/s")
        console.print(table)

    def write_report(self, folder: Path, scores: dict[str, Any], split: ImageDataset, metrics: dict[str, Any]) -> None:
        """Curves, truth against prediction, and the images that are furthest off."""
        cells = []
        for index, truth, found in scores["worst"]:
            image, _, name = split.read(index)
            said = self.caption(torch.from_numpy(found))
            cells.append((image, [self.caption(torch.from_numpy(truth)), f"predicted {said}", Path(name).name]))
        shown = {key: value for key, value in metrics.items() if not isinstance(value, dict | list)}
        shown["input_size"] = self.data_config.get("input_size")
        truth, found = scores["pairs"]
        write_number_report(folder, self.class_names, truth, found, scores["table"], cells, shown)


def _means(rows: Sequence[Mapping[str, Any]], labels: np.ndarray) -> dict[str, float]:
    """Of each figure the mean over the columns whose labels (N, columns) tell it; NaN where none does."""
    distinct = [len(np.unique(column[~np.isnan(column)])) for column in labels.T]
    means = {}
    for name in FIGURES:
        told = {
            "r2": [row["images"] > 1 for row in rows],
            "spearman": [count > 1 for count in distinct],
        }.get(name, [row["images"] > 0 for row in rows])
        values = [row[name] for row, known in zip(rows, told, strict=True) if known]
        means[name] = float(np.mean(values)) if values else math.nan
    return means


def _rounded(value: Any) -> Any:
    """Six significant digits; None for NaN, which JSON hasn't."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:,.4g}"
