"""What happens around the training steps: averaged weights, a line and a row an epoch, signals."""

from __future__ import annotations

import csv
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.callbacks import EarlyStopping as _EarlyStopping
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from ..checkpoints.files import atomic_write
from ..distributed.processes import rank, world
from ..distributed.sharding import Sharded, full_state, load_full, shard
from ..errors import UserError
from .checkpointing import KeepWeights, can_save
from .progress import clock

SIGHUP = getattr(signal, "SIGHUP", None)  # Windows has none

__all__ = ["EarlyStopping", "Ema", "Events", "History", "Interrupted", "Stop", "StopOnSignal"]


class Interrupted(KeyboardInterrupt):
    """A run was asked to stop and has written its last checkpoint; ``signum`` is the signal that asked."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum
        self.reported = rank() > 0  # the first process says it


class Ema(WeightAveraging):
    """Exponential moving average of weights and statistics: what is validated and kept.

    Before update n the old average keeps ``min(decay, (1 + n) / (warmup + n))``, so that it soon forgets the random
    weights of the start. (Lightning's EMAWeightAveraging has no such warm-up, timm's ModelEmaV3 neither checkpoints nor
    shards of Lightning's.)
    """

    def __init__(self, decay: float, warmup: int = 10) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"ema_decay must be from 0 to below 1, got {decay}")

        def average(averaged: list[Tensor], current: list[Tensor], updates: Tensor | int) -> None:
            n = int(updates)
            new_share = 1 - min(decay, (1 + n) / (warmup + n))
            with torch.no_grad():
                if averaged[0].is_floating_point():
                    torch._foreach_lerp_(averaged, current, new_share)
                else:  # counters
                    for mean, value in zip(averaged, current, strict=True):
                        mean.copy_(value)

        super().__init__(multi_avg_fn=average)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Copy the network before it is sharded, which a copy could not be."""
        if stage == "fit":
            self._average_model = AveragedModel(pl_module, pl_module.device, use_buffers=True, **self._kwargs)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if isinstance(trainer.strategy, Sharded) and self.average is not None:
            shard(self.average.model, trainer.strategy.mesh)  # pyright: ignore

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if not isinstance(trainer.strategy, Sharded) or self._average_model is None:
            return super().on_save_checkpoint(trainer, pl_module, checkpoint)
        state = full_state(self._average_model)
        checkpoint["current_model_state"] = checkpoint["state_dict"]
        checkpoint["state_dict"] = {n.removeprefix("module."): v for n, v in state.items() if n.startswith("module.")}
        checkpoint["averaging_state"] = {n: v for n, v in state.items() if not n.startswith("module.")}
        return None

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if not isinstance(trainer.strategy, Sharded) or self._average_model is None:
            return super().on_load_checkpoint(trainer, pl_module, checkpoint)
        state = {f"module.{name}": value for name, value in checkpoint["state_dict"].items()}
        load_full(self._average_model, {**state, **checkpoint["averaging_state"]})
        load_full(pl_module, checkpoint["current_model_state"])
        return None

    @property
    def average(self) -> L.LightningModule | None:
        """The averaged copy, while fitting."""
        return self._average_model.module if self._average_model is not None else None  # pyright: ignore


class EarlyStopping(_EarlyStopping):
    """Lightning's, with the patience of now: a run that goes on may be given another.

    (Of the same name, under which checkpoints hold its state.)
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "patience": self.patience})


class History(Callback):
    """``metrics.csv``, a row for each epoch, and a line on standard error to go with it.

    A resumed run drops the rows of the epochs that it does again.
    """

    def __init__(self, run_dir: Path, quiet: bool = False, metric: str | None = None) -> None:
        self.path = run_dir / "metrics.csv"
        self.quiet = quiet
        self.metric = metric  # that was asked for
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.rows: list[dict[str, Any]] = []
        self.images = 0
        self.train_seconds = 0.0
        self.losses: Tensor | None = None  # sum over the epoch's batches so far
        self.batches = 0
        self.warned: list[str] = []

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses, "batches": self.batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.losses, self.batches = state_dict["losses"], state_dict["batches"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.path.exists():
            self.rows = [row for row in _read_rows(self.path) if int(row["epoch"]) <= trainer.current_epoch]
        self.began = self.epoch_began = time.monotonic()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.images = self.batches = 0
        self.losses = None
        self.epoch_began = time.monotonic()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = pl_module.last_loss.double()
        if not torch.isfinite(loss):  # the update is left out, see SkipNonFinite
            return
        self.losses = loss if self.losses is None else self.losses.to(loss.device) + loss
        self.batches += 1
        self.images += len(batch[0]) * trainer.world_size
        self.train_seconds = time.monotonic() - self.epoch_began

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        losses = torch.zeros((), dtype=torch.double) if self.losses is None else self.losses
        sums = torch.stack([losses.to(pl_module.device), losses.new_tensor(self.batches).to(pl_module.device)])
        total, batches = trainer.strategy.reduce(sums, reduce_op="sum").tolist()  # pyright: ignore
        loss = total / max(1, batches)
        lr = max(group["lr"] for group in trainer.optimizers[0].param_groups)
        values = {name: float(value) for name, value in trainer.callback_metrics.items()} | {"train_loss": loss}
        row: dict[str, Any] = {"epoch": trainer.current_epoch + 1, "step": trainer.global_step}
        row |= {name: f"{value:.6g}" for name, value in sorted(values.items())}
        row["lr"] = f"{lr:.6g}"
        row["images_per_second"] = f"{self.images / max(self.train_seconds, 1e-9):.1f}"
        row["seconds"] = f"{time.monotonic() - self.epoch_began:.2f}"
        self.rows.append(row)
        for logger in trainer.loggers:
            logger.log_metrics({"train_loss": loss, "lr": lr}, trainer.global_step)
        if trainer.is_global_zero:
            atomic_write(self.path, self._write)
            if not self.quiet:
                self._say(trainer, values, row)

    def _write(self, path: Path) -> None:
        with path.open("w", newline="") as file:
            names = dict.fromkeys(name for row in self.rows for name in row)
            writer = csv.DictWriter(file, list(names))
            writer.writeheader()
            writer.writerows(self.rows)

    def _say(self, trainer: L.Trainer, values: dict[str, float], row: dict[str, Any]) -> None:
        done, epochs = trainer.current_epoch + 1, trainer.max_epochs or 0
        times = [float(r["seconds"]) for r in self.rows[-3:]]
        left = (epochs - done) * sum(times) / len(times)
        silent = {"images", *getattr(trainer.lightning_module, "silent_figures", ())} - {self.metric}
        names = [name for name in values if name.removeprefix("val_") not in silent]
        shown = [f"{name.replace('_', ' ')} {values[name]:.4g}" for name in names]
        speed = f"{float(row['images_per_second']):.0f} images/s"
        self.console.print(f"epoch {done}/{epochs}  {'  '.join(shown)}  {speed}  {clock(left)} left")
        warnings: list[str] = getattr(trainer.lightning_module, "warnings", [])
        for warning in warnings:
            if warning not in self.warned:  # once as long as it lasts
                self.console.print(f"  {warning}", markup=False)
        self.warned = warnings


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.csv`` that are whole; the rest of a damaged file is left out."""
    rows = []
    with suppress(csv.Error, OSError), path.open(newline="", encoding="utf-8", errors="replace") as file:
        for row in csv.DictReader(file):
            with suppress(ValueError, KeyError, TypeError):
                if int(row["epoch"]) < 1 or not 0 <= float(row["seconds"]) < 1e12:  # nor NaN
                    continue
                rows.append({name: value for name, value in row.items() if name is not None})
    return rows


class Events(TensorBoardLogger):
    """TensorBoard events alone; settings are in ``config.yaml``, so Lightning's file of them isn't written."""

    def save(self) -> None:
        self.experiment.flush()


class StopOnSignal(Callback):
    """SIGTERM, SIGHUP and SIGINT (Ctrl-C) end the run after the next update, with a checkpoint; another Ctrl-C at once.

    SIGHUP comes when a terminal is closed; where it is ignored, as under nohup, it stays so.
    """

    def __init__(self, keep: KeepWeights) -> None:
        self.keep = keep
        self.asked, self.asked_at = 0, 0.0
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        with suppress(ValueError):  # signals are the main thread's alone
            for signum in (signal.SIGTERM, signal.SIGINT, SIGHUP):
                if signum is not None and not (signum == SIGHUP and signal.getsignal(signum) == signal.SIG_IGN):
                    self._before[signum] = signal.signal(signum, self._ask)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if can_save(trainer, batch_idx):
            self._stop_if_asked(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop_if_asked(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._restore()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._restore()

    def _ask(self, signum: int, frame: Any) -> None:
        now = time.monotonic()
        # torchrun hands on the Ctrl-C that the terminal has sent to each process already.
        handed_on = world() > 1 and now - self.asked_at < 2
        if self.asked and signum == signal.SIGINT and not handed_on:
            raise KeyboardInterrupt
        self.asked, self.asked_at = signum, now

    def _stop_if_asked(self, trainer: L.Trainer) -> None:
        asked = self.asked
        if trainer.world_size > 1:  # the processes get their signals at different steps, or only one gets any
            asked = int(
                trainer.strategy.reduce(torch.tensor(asked, device=trainer.strategy.root_device), reduce_op="max")
            )
        if asked:
            self.keep.save(trainer)
            path = self.keep.run_dir
            raise Stop(f"after update {trainer.global_step}; go on with: transcnn train --resume {path}", asked)

    def _restore(self) -> None:
        while self._before:
            signum, handler = self._before.popitem()
            signal.signal(signum, handler if handler is not None else signal.SIG_DFL)


class Stop(Exception):
    """Leaves Lightning's loops, which end the process on a ``KeyboardInterrupt``; ``train`` turns it into one."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum
