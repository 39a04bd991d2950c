"""Checkpoints to go on from: written whole, the last two kept, each with a checksum that is looked at before use.

A run directory holds ``last.ckpt``, ``previous.ckpt`` (the one before) and ``checksums.sha256`` over both, which
``sha256sum --check`` reads too. Whatever moment a process or machine dies at, one of the two is whole and known to be.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from ..checkpoints.files import atomic_write
from ..checkpoints.loading import hint_at_run, read_info, save_weights
from ..distributed.processes import first_decides
from ..distributed.sharding import full_state
from ..errors import UserError
from ..text import printable

__all__ = ["KeepWeights", "can_save", "newest_good", "note", "store"]

LAST, PREVIOUS, DAMAGED, SUMS = "last.ckpt", "previous.ckpt", "damaged.ckpt", "checksums.sha256"
BEST = "best.safetensors"


def store(run_dir: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a checkpoint and put it in place as ``last.ckpt``; the last one becomes ``previous.ckpt``.

    The checksums of old and new are on disk before anything is renamed: a file whose sum is among them is whole,
    however far this came.

    Raises:
        UserError: The disk is full or can't be written; the checkpoints there are untouched.
    """
    last, previous = run_dir / LAST, run_dir / PREVIOUS
    before = _read_sums(run_dir)
    digest = ""

    def put(temporary: Path) -> None:
        nonlocal digest
        write(temporary)
        digest = _digest(temporary)
        _write_sums(run_dir, [(digest, LAST), *before])
        if last.exists():
            _keep_as(last, previous)

    atomic_write(last, put)
    older = [(old, PREVIOUS) for old, name in before if name == LAST][:1] if previous.exists() else []
    _write_sums(run_dir, [(digest, LAST), *older])


def newest_good(run_dir: Path) -> tuple[Path, str]:
    """The newest checkpoint that is whole, and what is to be said of a newer one that isn't (else "").

    A damaged ``last.ckpt`` is renamed to ``damaged.ckpt``, so that it doesn't take the place of the good one.

    Raises:
        UserError: There is none, or none that is whole.
    """
    problems = []
    for name in (LAST, PREVIOUS):
        path = run_dir / name
        if not path.is_file():
            continue
        problem = _problem(path)
        if not problem:
            remark = f"{'; '.join(problems)}; going on from {name}" if problems else ""
            if problems:
                with suppress(OSError):
                    os.replace(run_dir / LAST, run_dir / DAMAGED)
            return path, remark
        problems.append(f"{path} is damaged: {problem}")
    if problems:
        raise UserError(f"no checkpoint to go on from: {'; '.join(problems)}")
    raise UserError(f"nothing to resume: there is no {run_dir / LAST}{hint_at_run(run_dir)}")


def note(run_dir: Path, what: str) -> None:
    """Add a line to the run's ``faults.log``, as far as the disk allows it."""
    with suppress(OSError), (run_dir / "faults.log").open("a", encoding="utf-8") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {printable(what)}\n")


def can_save(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether a checkpoint after this batch holds all that counts.

    Gradients that are being accumulated aren't in it; and the last batch of an epoch waits for the epoch's end, as
    validation belongs to it.
    """
    between_updates = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
    return between_updates and batch_idx + 1 < trainer.num_training_batches


def _problem(path: Path) -> str:
    """What is wrong with a checkpoint; nothing if its checksum is right, or it has none and can be read."""
    sums = {digest for digest, _ in _read_sums(path.parent)}
    if sums:
        with suppress(OSError):
            return "" if _digest(path) in sums else "its checksum is another"
    try:
        read_info(path)
    except UserError as error:
        return str(error)
    return ""


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read_sums(run_dir: Path) -> list[tuple[str, str]]:
    try:
        lines = (run_dir / SUMS).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    pairs = [line.split(maxsplit=1) for line in lines]
    return [(pair[0], pair[1]) for pair in pairs if len(pair) == 2 and len(pair[0]) == 64]


def _write_sums(run_dir: Path, sums: list[tuple[str, str]]) -> None:
    text = "".join(f"{digest}  {name}\n" for digest, name in sums)
    atomic_write(run_dir / SUMS, lambda path: path.write_text(text, encoding="utf-8"))


def _keep_as(file: Path, name: Path) -> None:
    """Give a file a second name; where the file system has no links, another name."""
    temporary = name.with_name(f".{name.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        os.link(file, temporary)
        os.replace(temporary, name)
    except OSError:
        os.replace(file, name)


class KeepWeights(Checkpoint):
    """``last.ckpt`` after each epoch, ``best.safetensors`` where the validation split is answered as well or better.

    ``last.ckpt`` holds all that is needed to go on (weights, their average, optimizer, schedule, loops), and the
    run's settings and model under ``transcnn``. All are written whole or not at all.

    Args:
        run_dir: Where to.
        info: What is stored beside the weights: model, model_args, class_names, data_config, task, ...
        settings: The run's settings, for ``--resume``.
        every: Also write ``last.ckpt`` each this many updates.
        metric: What chooses the best epoch.
        lower_is_better: Metrics of which the smallest value is the best.

    Attributes:
        metric, mode: The metric as it is logged (``val_...``), and ``max`` or ``min``.
        best_epoch: The epoch that reached the metric's best value (from 1); 0 while none had a finite one.
        figures: The metric and the task's score at that epoch, by name.
        hold: While True, no checkpoint is written: the run is in trouble, and the last good one is to stay.
        went_on: Whether a step was done since the trainer began.
    """

    def __init__(
        self,
        run_dir: Path,
        info: dict[str, Any],
        settings: dict[str, Any],
        every: int | None,
        metric: str,
        lower_is_better: Collection[str] = ("loss",),
    ) -> None:
        self.run_dir = run_dir
        self.info = info
        self.settings = settings
        self.every = every
        self.metric = f"val_{metric}"
        self.mode = "min" if metric in lower_is_better else "max"
        self.figures: dict[str, float] = {}
        self.best_epoch = 0
        self.hold = False
        self.went_on = False
        self._seconds_before = 0.0
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """How long the run took so far, in all its sessions; what came after a session's last checkpoint isn't in."""
        return self._seconds_before + time.monotonic() - self._began

    def state_dict(self) -> dict[str, Any]:
        return {"best_epoch": self.best_epoch, "figures": self.figures, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_epoch = int(state_dict["best_epoch"])
        known = state_dict.get("figures")
        known = {self.metric: state_dict["best"]} if known is None else known  # earlier versions had one figure
        self.figures = {str(name): float(value) for name, value in known.items()}
        self._seconds_before = float(state_dict.get("seconds", 0.0))

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["transcnn"] = {**self.info, "settings": self.settings}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.best_epoch and not first_decides((self.run_dir / BEST).is_file):
            # A better epoch than these would be needed, for weights that are gone.
            self.best_epoch, self.figures = 0, {}

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        value = float(trainer.callback_metrics[self.metric])
        loss = float(trainer.callback_metrics.get("val_loss", 0.0))
        if not (math.isfinite(value) and math.isfinite(loss)):  # no comparison with NaN says that it is worse
            return
        sign = -1 if self.mode == "min" else 1
        best = self.figures.get(self.metric)
        if best is not None and sign * value < sign * best:  # of equals the later, which has learnt longer
            return
        self.best_epoch = trainer.current_epoch + 1
        names = {self.metric, f"val_{pl_module.score}"}
        self.figures = {name: float(trainer.callback_metrics[name]) for name in sorted(names)}
        averages = [average for c in trainer.callbacks if (average := getattr(c, "average", None)) is not None]  # pyright: ignore
        kept: Any = averages[0] if averages else pl_module
        state = full_state(kept.model)
        if trainer.is_global_zero:
            info = {**self.info, "settings": self.settings, **self.figures, "epoch": self.best_epoch}
            save_weights(self.run_dir / BEST, state, info)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.went_on = True
        updates = (batch_idx + 1) // trainer.accumulate_grad_batches
        if self.every and can_save(trainer, batch_idx) and updates % self.every == 0:
            self.save(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.save(trainer)

    def save(self, trainer: L.Trainer) -> None:
        """Write ``last.ckpt`` now; every process calls this."""
        if self.hold:
            return
        if trainer.is_global_zero:
            store(self.run_dir, lambda path: trainer.save_checkpoint(path))
        else:
            trainer.save_checkpoint(self.run_dir / LAST)  # takes part in gathering, writes nothing
