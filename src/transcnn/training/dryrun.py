"""``transcnn train --dry_run``: all of a run but the learning, and what the run would take.

Network, loss, optimizer, average and strategy are the run's own; the images are made up (segmentation and detection
take a batch of their data), so classification can be tried where the data isn't.
"""

from __future__ import annotations

import shutil
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.table import Table
from timm.models import get_pretrained_cfg
from torch.utils.data import DataLoader

from ..data.sets.channels import Channels
from ..distributed.processes import placement, rank, world
from ..distributed.runtime import choose_precision
from ..distributed.sharding import choose_strategy
from ..plugging.cost import count
from ..settings import TrainSettings, as_plain
from ..tasks.base import Task
from ..text import rich_text
from .callbacks import Ema

__all__ = ["assumed_splits", "dry_run", "flat"]

IMAGENET = 1_281_167  # training images of ImageNet-1K, which is what 1,000 classes are taken for
CPU_IMAGES = 2  # a step on a CPU is tried with so many images: more take long, and memory that there may not be


@dataclass(frozen=True)
class AssumedSplits:
    """What stands for data that isn't there, as :class:`~transcnn.data.sets.splits.Splits` would."""

    train: range
    class_names: list[str]
    channels: Channels
    name: str
    assumed: str  # what was assumed, in words
    val: None = None
    test: None = None
    broken: tuple[tuple[str, str], ...] = ()
    task_args: dict[str, Any] = field(default_factory=dict)

    @property
    def in_chans(self) -> int:
        """Channels of the images."""
        return self.channels.count


def assumed_splits(s: TrainSettings) -> AssumedSplits | None:
    """In place of data for classification that isn't there: the model's own classes and channels; else None."""
    elsewhere = "://" in str(s.data) or str(s.data).split("/")[0] in ("torch", "hfds", "wds", "tfds")
    if s.task != "classify" or s.data is None or elsewhere or Path(s.data).exists():
        return None
    published = get_pretrained_cfg(s.model)
    classes = published.num_classes if published else 1000
    images = IMAGENET if classes == 1000 else 0
    return AssumedSplits(
        train=range(images),
        class_names=[str(i) for i in range(classes)],
        channels=Channels(s.in_chans or 3),
        name=str(s.data),
        assumed=f"{s.data} isn't there: taken are {classes:,} classes, as the model has them"
        + (f", and {images:,} images, as ImageNet-1K has" if images else "; how many images there are isn't known"),
    )


class Probe(Callback):
    """Times the second of two steps, and counts in the first what is kept for the backward pass."""

    def __init__(self) -> None:
        self.kept: dict[int, int] = {}  # storage -> bytes
        self.seconds = 0.0
        self._hooks = ExitStack()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._began = time.monotonic()
        if batch_idx == 0:
            own = {p.untyped_storage().data_ptr() for p in pl_module.parameters()}

            def keep(tensor: torch.Tensor) -> torch.Tensor:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in own:
                    self.kept[storage.data_ptr()] = storage.nbytes()
                return tensor

            self._hooks.enter_context(torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor))

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        self._hooks.close()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        pl_module.last_loss.item()  # waits for what a GPU is still doing
        self.seconds = time.monotonic() - self._began


def dry_run(s: TrainSettings, learner: Task, splits: Any, loaders: Any) -> dict[str, Any]:
    """Take two steps and print parameters, multiply-adds, memory, speed, time, disk, and all settings.

    Returns:
        The figures that were printed.
    """
    figures = _figures(s, learner, splits, loaders)
    if rank() == 0:
        _print(s, learner, splits, figures)
    return figures


def _figures(s: TrainSettings, learner: Task, splits: Any, loaders: Any) -> dict[str, Any]:
    strategy = choose_strategy(s.strategy, learner.model, s.accelerator)
    precision: Any = choose_precision(s.precision, s.accelerator)
    probe = Probe()
    average = [Ema(s.ema.ema_decay, s.ema.ema_warmup)] if s.ema.ema else []
    trainer = L.Trainer(
        **placement(s.accelerator, strategy),
        precision=precision,
        max_steps=2,
        callbacks=[*average, probe],
        gradient_clip_val=s.optim.clip_grad,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    own = s.batch_size // world()
    images = own if trainer.strategy.root_device.type != "cpu" else min(own, CPU_IMAGES)
    batch = _batch(learner, loaders, images)
    multiply_adds = _count(learner, batch[0])
    if trainer.strategy.root_device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer.fit(learner, DataLoader([batch, batch], batch_size=None))  # pyright: ignore
    parameters = sum(p.numel() for p in learner.model.parameters())
    weights = sum(t.numel() * t.element_size() for t in learner.model.state_dict().values())
    states = trainer.optimizers[0].state.values()
    tensors = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
    state = sum(t.numel() * t.element_size() for t in tensors)
    copies = weights * (1 + len(average)) + state
    kept = sum(probe.kept.values()) / len(batch[0])
    speed = len(batch[0]) * world() / probe.seconds
    an_epoch = min(len(splits.train), (s.limit_batches or len(splits.train)) * s.batch_size)
    total = an_epoch * s.epochs
    return {
        "parameters": parameters,
        "multiply_adds": multiply_adds,
        "device": str(trainer.strategy.root_device.type),
        "precision": str(trainer.precision),
        "images_tried": len(batch[0]),
        "images_a_step": own,
        "bytes_fixed": copies + weights,  # gradients are as large as weights
        "bytes_an_image": kept,
        "bytes_peak": torch.cuda.max_memory_allocated() if trainer.strategy.root_device.type == "cuda" else None,
        "images_per_second": speed,
        "hours": total / speed / 3600 if total else None,
        "disk": 3 * copies + weights,  # last, previous, the next while it is written; best
        "disk_free": shutil.disk_usage(_existing(Path(s.out or "runs"))).free,
    }


def _batch(learner: Task, loaders: Any, images: int) -> Any:
    """Made-up images and labels; of other tasks than classification a batch of the data, cut short."""
    if learner.name != "classify":
        some, truth = next(iter(loaders.train_dataloader()))
        return some[:images], truth[:images]
    generator = torch.Generator().manual_seed(0)
    shape = learner.data_config["input_size"]
    labels = torch.from_numpy(np.arange(images) % len(learner.class_names))
    return torch.randn(images, *shape, generator=generator), labels


def _count(learner: Task, images: Any) -> int:
    """Multiply-adds of the network for one image."""
    if learner.whole_image:  # nothing is computed on the meta device, and all of attention is counted there
        return count(learner.model, images[:1].to("meta")).macs
    return count(learner.model, images[:1]).macs


def _existing(path: Path) -> Path:
    """The folder that a file system is asked about: the path, or what there is of it."""
    return next(folder for folder in (path.resolve(), *path.resolve().parents) if folder.exists())


def _print(s: TrainSettings, learner: Task, splits: Any, figures: dict[str, Any]) -> None:
    f = figures
    console = Console(highlight=False, soft_wrap=True)
    table = Table(box=None, show_header=False)
    shape = "x".join(str(n) for n in learner.data_config["input_size"])
    memory = f["bytes_fixed"] + f["bytes_an_image"] * f["images_a_step"]
    few = f["images_tried"] < f["images_a_step"]
    table.add_row("network", rich_text(f"{s.model}, {len(learner.class_names):,} classes, input {shape}"))
    data = getattr(splits, "assumed", f"{splits.name}: {len(splits.train):,} images to learn from")
    table.add_row("data", rich_text(data))
    table.add_row("parameters", f"{f['parameters'] / 1e6:.2f} M")
    table.add_row("multiply-adds", f"{f['multiply_adds'] / 1e9:.3f} G for an image (FLOPs are twice that)")
    parts = f"{_bytes(f['bytes_fixed'])} for weights, gradients, optimizer and average, {_bytes(f['bytes_an_image'])}"
    table.add_row("memory", f"about {_bytes(memory)} a process: {parts} for each of {f['images_a_step']} images")
    if f["bytes_peak"]:
        table.add_row("", f"{_bytes(f['bytes_peak'])} at most on the GPU, measured")
    where = f"{world()} process{'es' if world() > 1 else ''} on {f['device']}, {f['precision']}"
    note = f", tried with {f['images_tried']} images instead of {f['images_a_step']}" if few else ""
    table.add_row("speed", f"{f['images_per_second']:.3g} images/s ({where}{note})")
    if f["hours"]:
        table.add_row("time", f"{_hours(f['hours'])} for {s.epochs} epochs at that speed, without reading and scoring")
    enough = "" if f["disk"] < f["disk_free"] else ": NOT ENOUGH"
    table.add_row("disk", f"{_bytes(f['disk'])} for checkpoints at most, {_bytes(f['disk_free'])} free{enough}")
    console.print(table)
    settings = Table(box=None, header_style="bold")
    for title in ("setting", "value", "from"):
        settings.add_column(title, no_wrap=title == "setting", overflow="fold")
    for name, value in flat(as_plain(s)):
        settings.add_row(name, rich_text(value), rich_text(s.origin_of(name)))
    console.print()
    console.print(settings)


def flat(settings: dict[str, Any]) -> list[tuple[str, Any]]:
    """Names and values, those of groups as ``group.name``."""
    rows = []
    for name, value in settings.items():
        inner = value.items() if isinstance(value, dict) and name != "model_args" else None
        rows += [(f"{name}.{key}", one) for key, one in inner] if inner is not None else [(name, value)]
    return rows


def _bytes(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"


def _hours(hours: float) -> str:
    if hours < 2:
        return f"{hours * 60:.3g} minutes"
    return f"{hours:.3g} hours" if hours < 72 else f"{hours / 24:,.1f} days"
