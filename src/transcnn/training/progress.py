"""Bars for work that takes long: training and scoring, with images/s and the time that is left.

Lightning's RichProgressBar knows batches a second and the time left of an epoch, not of the run.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["EvalBar", "TrainBar", "clock"]


class _Bar(Callback):
    """Shown where standard error is a terminal; gone when the work is done, whatever ended it."""

    progress: Progress | None = None

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


class TrainBar(_Bar):
    """A bar for the running epoch with images/s and the time that is left, where standard error is a terminal."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not (trainer.is_global_zero and sys.stderr.isatty()):
            return
        text = TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}  {task.fields[what]}")
        speed = TextColumn("{task.fields[speed]:.0f} images/s  {task.fields[left]} left")
        console = Console(stderr=True)
        self.progress = Progress(text, BarColumn(), MofNCompleteColumn(), speed, console=console, transient=True)
        self.task = self.progress.add_task(
            "",
            total=int(trainer.num_training_batches),
            epoch=trainer.current_epoch + 1,
            epochs=trainer.max_epochs,
            what="train",
            speed=0.0,
            left="-:--",
        )
        self.progress.start()
        self.began, self.first, self.images = time.monotonic(), None, 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.progress is None:
            return
        self.first = batch_idx if self.first is None else self.first
        self.images += len(batch[0]) * trainer.world_size
        seconds = time.monotonic() - self.began
        batches = trainer.num_training_batches
        to_do = batches * (trainer.max_epochs - trainer.current_epoch) - batch_idx - 1
        left = seconds / (batch_idx + 1 - self.first) * to_do
        self.progress.update(self.task, completed=batch_idx + 1, speed=self.images / seconds, left=clock(left))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.progress is not None:
            self.progress.update(self.task, what="validate")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close()


class EvalBar(_Bar):
    """A bar of the batches that are scored with images/s and the time that is left."""

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not (trainer.is_global_zero and sys.stderr.isatty()):
            return
        columns = (TextColumn("eval"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"))
        console = Console(stderr=True)
        self.progress = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
        batches: Any = trainer.num_test_batches
        self.task = self.progress.add_task("", total=sum(batches), speed="")
        self.progress.start()
        self.began, self.images = time.monotonic(), 0

    def on_test_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.progress is not None:
            self.images += len(batch[0]) * trainer.world_size
            speed = f"{self.images / (time.monotonic() - self.began):.0f} images/s"
            self.progress.update(self.task, advance=1, speed=speed)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close()


def clock(seconds: float) -> str:
    """Seconds as a person reads them: 45 s, 3:20 min, 2:05 h."""
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    if whole < 6000:
        return f"{whole // 60}:{whole % 60:02} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02} h"
