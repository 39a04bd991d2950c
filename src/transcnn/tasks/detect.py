"""Detection: boxes with names, and masks for Mask R-CNN."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision
from torchvision.ops import box_area, box_iou

from ..data.bands import is_per_channel
from ..data.sets.dense_dataset import DenseDataset
from ..data.sets.detect import open_set, open_splits
from ..data.sets.splits import Splits
from ..data.transforms.detect import DetectTransform
from ..distributed.processes import gather, gather_lists, world
from ..errors import require
from ..plugging.running import eval_mode
from ..report.dense import best_median_worst, write_dense_report
from ..report.overlay import SHOWN_SCORE, draw_detections, palette
from ..report.plots import plot_precision_recall
from ..settings import Augment
from ..text import rich_text
from .dense import DenseTask
from .inference import DetectInference

__all__ = ["Detect"]

SIZES = ("small", "medium", "large")  # below 32², below 96² pixels, above: COCO's


class Detect(DetectInference, DenseTask):
    """Detection, scored by COCO's mAP: precision averaged over recall, classes and IoU from 0.50 to 0.95.

    Batches are (list of images (C, H, W) from 0 to 1, list of targets).
    """

    name = "detect"
    group = "detect"
    score = "map"
    eval_metrics = ("map", "map50")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        require("faster_coco_eval", "dense")
        self.masks = self.task_args.get("detector") == "maskrcnn"
        self._forget()

    @classmethod
    def open_data(cls, data: str | None, task_args: dict[str, Any], **settings: Any) -> Splits:
        """The splits of a detection data set."""
        return open_splits(data, task_args, **settings)

    @classmethod
    def train_transform(
        cls, data_config: dict[str, Any], augment: Augment, task_args: dict[str, Any]
    ) -> DetectTransform:
        """Images mirrored and changed in colour, with boxes and masks that follow."""
        return DetectTransform(
            in_chans=data_config["input_size"][0],
            masks=task_args["detector"] == "maskrcnn",
            training=True,
            hflip=augment.hflip,
            vflip=augment.vflip,
            color_jitter=augment.color_jitter,
            bands=is_per_channel(data_config.get("pixel_range")),
        )

    @classmethod
    def open_split(
        cls, data: str | None, split: str, class_names: list[str], task_args: dict[str, Any], **settings: Any
    ) -> DenseDataset:
        """One split of a detection data set."""
        return open_set(data, split, class_names, **settings)

    @classmethod
    def enlargement(cls, short: int, long: int, task_args: dict[str, Any]) -> float:
        """The short side becomes ``short_side``, in training up to ``side_range`` times that, the long one fits."""
        side = task_args["short_side"] * max(1.0, *task_args["side_range"])
        return min(side / short, task_args["long_side"] / long)

    def loss(self, batch: Any) -> Tensor:
        """The sum of the detector's losses."""
        images, targets = batch
        wanted = ("boxes", "labels", "masks") if self.masks else ("boxes", "labels")
        losses = self.model(images, [{name: target[name] for name in wanted} for target in targets])
        return torch.stack(list(losses.values())).sum()

    def evaluate_batch(self, batch: Any, batch_idx: int) -> None:
        """Collect predicted and true boxes, and each image's own score with its index in the split."""
        images, targets = batch
        outputs = (self([image])[0] for image in images) if self.masks else self(images)
        for found, target in zip(outputs, targets, strict=True):
            index, self._seen = self.sample_index(self._seen), self._seen + 1
            if not target["counts"]:
                continue
            found = {name: value.detach().cpu() for name, value in found.items()}
            truth = {name: value.cpu() for name, value in target.items()}
            if self.masks:
                found["masks"] = found["masks"][:, 0] > 0.5
                truth["masks"] = truth["masks"].bool()
            kept = ("boxes", "labels", "masks") if self.masks else ("boxes", "labels")
            known = {**{name: truth[name] for name in kept}, "iscrowd": truth["crowd"].long(), "area": truth["area"]}
            self._metric[0].update([found], [known])
            self._ranking.append((index, _f1(found, truth)))

    def scores(self) -> dict[str, Any]:
        """``map``, ``map50``, ``map75``, ``map_small`` ... in percent, ``mask_map`` ...; ``class_ap``, ``images``.

        Sizes and classes that the data lacks are left out. Over several processes, which may have seen different
        numbers of images, all detections are gathered.
        """
        metric = self._metric[0]
        if world() > 1:
            metric.update([], [])  # a process without images would be warned
            own = {name: getattr(metric, name) for name in metric._defaults}
            gathered = gather(own)
            for name in own:
                setattr(metric, name, [entry for states in gathered for entry in states[name]])
        images = len(metric.groundtruth_labels)  # pyright: ignore
        boxes = torch.cat([torch.zeros(0, dtype=torch.long), *(x.cpu() for x in metric.groundtruth_labels)])  # pyright: ignore
        # For the report's curves. The IoUs of all images come with them: too many to be made in each epoch.
        metric.extended_summary = getattr(self._trainer, "testing", False)
        computed = metric.compute() if images else {}
        result: dict[str, Any] = {"map": 0.0, "map50": 0.0}
        for prefix, word in (("bbox_", ""), ("segm_", "mask_")) if self.masks else (("", ""),):
            for theirs, ours in (("map", "map"), ("map_50", "map50"), ("map_75", "map75"), *_SIZE_NAMES):
                value = float(computed.get(prefix + theirs, -1.0))
                if value >= 0:
                    result[word + ours] = 100 * value
        result["images"] = torch.tensor(images)
        classes = [int(c) for c in computed.get("classes", torch.zeros(0)).reshape(-1)]
        for prefix, word in (("bbox_", "class_ap"), ("segm_", "class_mask_ap")) if self.masks else (("", "class_ap"),):
            each = computed.get(f"{prefix}map_per_class", torch.zeros(0)).reshape(-1).tolist()
            result[word] = {c: 100 * value for c, value in zip(classes, each, strict=False) if value >= 0}
        # (IoU, recall, class, size, most detections), -1 where a class doesn't occur
        precision = computed.get("bbox_precision" if self.masks else "precision", torch.zeros(1, 1, 0, 1, 1))
        precision = precision[0, :, :, 0, -1].T.cpu().numpy()
        result["curves"] = {c: row for c, row in zip(classes, precision, strict=False) if (row >= 0).all()}
        result["class_boxes"] = torch.bincount(boxes, minlength=len(self.class_names)).tolist()
        result["ranking"] = gather_lists(self._ranking)
        self._forget()
        return result

    def summary(self, scores: dict[str, Any]) -> dict[str, Any]:
        """The figures in percent; ``class_ap`` by name (None for what doesn't occur)."""
        numbers = {name: round(value, 4) for name, value in scores.items() if isinstance(value, float)}
        seconds = numbers.pop("seconds")
        images = int(scores["images"])
        speed = {"images": images, "seconds": round(seconds, 2), "images_per_second": round(images / seconds, 2)}
        each = {
            kind: {name: _rounded(scores[kind].get(i)) for i, name in enumerate(self.class_names)}
            for kind in ("class_ap", "class_mask_ap")
            if kind in scores
        }
        return {"task": self.name, **numbers, **speed, **each}

    def headline(self, metrics: dict[str, Any]) -> str:
        """For instance ``mAP 61.20 %, mAP50 88.10 %``."""
        text = f"mAP {metrics['map']:.2f} %, mAP50 {metrics['map50']:.2f} %"
        return text + (f", mask mAP {metrics['mask_map']:.2f} %" if "mask_map" in metrics else "")

    def print_table(self, metrics: dict[str, Any]) -> None:
        """The figures, and the AP of each class."""
        table = Table(box=None, show_header=False)
        for name, value in metrics.items():
            if "map" in name and isinstance(value, float):
                table.add_row(name.replace("map", "mAP").replace("_", " "), f"{value:.2f} %")
        table.add_row("images", rich_text(f"{metrics['images']:,} ({metrics['split']} of {metrics['data']})"))
        table.add_row("speed", f"{metrics['images_per_second']:.1f} images/s")
        table.add_row()
        table.add_row("class", "AP")
        for name, value in metrics["class_ap"].items():
            table.add_row(rich_text(name), "does not occur" if value is None else f"{value:.2f} %")
        Console(highlight=False).print(table)

    def write_report(self, folder: Path, scores: dict[str, Any], split: DenseDataset, metrics: dict[str, Any]) -> None:
        """Curves, classes, and the best, median and worst predictions beside the ground truth."""
        colours, names = palette(len(self.class_names)), self.class_names
        examples = []
        for title, index, score in best_median_worst(scores["ranking"]):
            image, _ = split.read(index)
            pixels, target = split.transform(*split.read(index), 0)
            with eval_mode(self.model), torch.inference_mode():
                found = self.model([pixels.to(self.device)])[0]
            found = {name: value.cpu().numpy() for name, value in found.items()}
            truth = {name: value.numpy() for name, value in target.items() if name in ("boxes", "labels", "masks")}
            drawn = [draw_detections(image, what, names, colours, SHOWN_SCORE, enlarge=640) for what in (truth, found)]
            examples.append((f"{title}: F1 {score:.0%}", Path(split.name(index)).name, [image, *drawn]))
        rows = [
            {
                "class": name,
                "ap": None if (value := metrics["class_ap"][name]) is None else value / 100,
                "boxes": scores["class_boxes"][i],
            }
            for i, name in enumerate(names)
        ]
        key = list(zip(names, colours, strict=True))
        curves = {names[i]: values for i, values in scores["curves"].items()}
        figures = {"precision_recall.png": lambda: plot_precision_recall(curves, "Precision over recall at IoU 0.50")}
        write_dense_report(folder, "AP", rows, figures, examples, key, metrics)

    def _forget(self) -> None:
        kinds: Any = ("bbox", "segm") if self.masks else "bbox"
        metric = MeanAveragePrecision(
            iou_type=kinds,
            class_metrics=True,
            backend="faster_coco_eval",
            sync_on_compute=False,
            # COCO's 100 detections an image, or all that this detector may find.
            max_detection_thresholds=[1, 10, max(100, int(self.task_args.get("max_found", 100)))],
        )
        metric.warn_on_many_detections = False
        self._metric = (metric,)  # in a tuple: it stays on the CPU and out of checkpoints
        self._seen = 0
        self._ranking: list[tuple[int, float]] = []


_SIZE_NAMES = tuple((f"map_{size}", f"map_{size}") for size in SIZES)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _f1(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Of one image: detections from ``SHOWN_SCORE`` on that match a box of their class by an IoU of 0.5, each once.

    As COCO has it, crowds needn't be found, and others that lie in one of their class by half don't count.
    """
    sure, crowd = found["scores"] >= SHOWN_SCORE, truth["crowd"].bool()
    boxes, labels = found["boxes"][sure], found["labels"][sure]
    single = truth["boxes"][~crowd]
    match = box_iou(boxes, single) * (labels[:, None] == truth["labels"][~crowd])
    in_crowds = _inside(boxes, truth["boxes"][crowd]) * (labels[:, None] == truth["labels"][crowd])
    excused = (in_crowds >= 0.5).any(1).tolist()
    hits, missed, free = 0, 0, np.ones(len(single), bool)
    for row, is_excused in zip(match.numpy(), excused, strict=True):
        row = row * free
        if row.size and row.max() >= 0.5:
            free[row.argmax()] = False
            hits += 1
        else:
            missed += not is_excused
    total = hits + missed + len(single)
    return 2 * hits / total if total else 1.0


def _inside(boxes: Tensor, others: Tensor) -> Tensor:
    """The share of each box (N, 4) that lies in each other one (M, 4): (N, M)."""
    corners = torch.max(boxes[:, None, :2], others[:, :2]), torch.min(boxes[:, None, 2:], others[:, 2:])
    return (corners[1] - corners[0]).clamp(min=0).prod(2) / box_area(boxes)[:, None].clamp(min=1e-9)
