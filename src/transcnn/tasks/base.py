"""What every task has in common: optimizer and schedule, seeds, the road from a data set to scores.

A task is one small class: which data it opens, what its loss is and how it is scored. Runs, checkpoints, resume,
reports and errors are the same for all of them (``train.py``, ``callbacks.py``, ``runs.py``).
"""

from __future__ import annotations

import logging
import math
import random
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import numpy as np
import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn

from ..distributed.processes import rank, world
from ..distributed.sharding import Sharded, shard
from ..errors import UserError, first_line
from ..fast import accelerate_training, record_training
from ..fast.inference.optimize import try_optimize
from ..settings import Augment, Optim, TrainSettings, as_plain
from ..text import printable
from .inference import Inference
from .statistics import StatisticsWarmup

__all__ = ["Task"]

_log = logging.getLogger(__name__)
ENOUGH = 64  # images; to score fewer, making and loading what scores them takes longer than it saves


class Task(Inference, L.LightningModule):
    """A model with what it learns and how it is scored.

    Args:
        model: The network.
        class_names: Names of the classes, in the order of the model's outputs.
        data_config: How an image becomes the model's input, in timm's words: ``input_size`` (C, H, W), ``mean``,
            ``std``, ``interpolation``, ``crop_pct``, ``crop_mode``.
        lr: Learning rate for the images of one update (see ``Optim.lr_batch``).
        epochs: Length of the schedule.
        optim: The optimizer's and schedule's settings.
        augment: The settings of what is mixed and smoothed in a batch.
        seed: Every random draw of step n follows from this and n alone, so that a resumed run draws the same.
        channels_last: Whether images are given to the model in that memory format.
        cuda_graphs: Whether a GPU plays training's forward and backward passes back (``fast.record_training``).
        optimize: Whether splits of ``ENOUGH`` images or more are scored by the network as ``fast.optimize`` makes it.
        task_args: The task's own settings, and what it learnt from the data; plain values, kept with the weights.
    """

    name: ClassVar[str]
    outputs: ClassVar[str] = "classes"  # what the network has an output for each of
    scored: ClassVar[str] = "images"  # what a class is predicted of
    group: ClassVar[str] = ""  # the argument of ``train`` that holds the task's own settings
    score: ClassVar[str]  # the metric that people compare; logged as val_<score>
    eval_metrics: ClassVar[tuple[str, ...]]  # what ``--eval_metric`` may name, the score first
    silent_figures: ClassVar[tuple[str, ...]] = ()  # that the line of an epoch shows only where one chooses the best
    lower_is_better: ClassVar[tuple[str, ...]] = ("loss",)  # of these

    def __init__(
        self,
        model: nn.Module,
        class_names: list[str],
        data_config: dict[str, Any],
        *,
        lr: float = 1e-3,
        epochs: int = 1,
        optim: Optim | None = None,
        augment: Augment | None = None,
        seed: int = 0,
        channels_last: bool = False,
        cuda_graphs: bool = False,
        optimize: bool = False,
        task_args: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.model = model.to(memory_format=torch.channels_last) if channels_last else model  # pyright: ignore
        self.class_names = class_names
        self.data_config = data_config
        self.lr = lr
        self.epochs = epochs
        self.optim = optim or Optim()
        self.augment = augment or Augment()
        self.seed = seed
        self.channels_last = channels_last
        self.cuda_graphs = cuda_graphs
        self.optimize = optimize
        self.task_args = task_args or {}
        self.updates_per_epoch = 1  # set before fitting
        self.frozen: list[nn.Module] = []  # parts of the network that stay as they are
        self.warnings: list[str] = []  # about the last validation
        self._recorded: Callable[[Any], Any] | None = None
        self._fast: tuple[nn.Module, ...] = ()  # the network that a split is scored by; in a tuple, for it is no part
        self.path = "plain"  # or "optimized": how the last split was scored
        self._statistics: StatisticsWarmup | None = None  # while training
        self.lr_factor = 1.0  # less after a run has gone back, see faults.SkipNonFinite

    # --- what a task fills in ---------------------------------------------------------------------------------------

    @classmethod
    def args_of(cls, settings: TrainSettings) -> dict[str, Any]:
        """The task's own settings as plain values, before it has seen any data: ``task_args``."""
        return as_plain(settings)[cls.group] if cls.group else {}

    @classmethod
    @abstractmethod
    def open_data(
        cls,
        data: str | None,
        task_args: dict[str, Any],
        *,
        val_fraction: float,
        seed: int,
        strict: bool,
        in_chans: int | None,
    ) -> Any:
        """The splits of what the user named: ``train``, ``val``, ``test`` (or None), ``class_names``, ``in_chans``,
        ``name``, ``broken`` and ``task_args`` (what the data adds to them); raises ``UserError`` for what can't be
        read so."""

    @classmethod
    def remarks(cls, splits: Any) -> list[str]:
        """What is told about the data when training begins, a line each."""
        return []

    @property
    def measured(self) -> tuple[str, ...]:
        """Those of ``eval_metrics`` that are measured with this many classes."""
        return self.eval_metrics

    @classmethod
    @abstractmethod
    def loaders(
        cls, splits: Any, data_config: dict[str, Any], augment: Augment, task_args: dict[str, Any], **settings: Any
    ) -> L.LightningDataModule:
        """A data module over the splits; ``settings``: ``batch_size``, ``num_workers``, ``seed``, ``progress``."""

    @classmethod
    @abstractmethod
    def open_split(
        cls, data: str | None, split: str, class_names: list[str], task_args: dict[str, Any], **settings: Any
    ) -> Any:
        """One split of a data set, for evaluation.

        ``settings`` are ``val_fraction``, ``seed``, ``strict``, and ``held``: the names of images that a run held back,
        where these are known, which are then the validation split.
        """

    @classmethod
    @abstractmethod
    def split_loader(cls, split: Any, data_config: dict[str, Any], task_args: dict[str, Any], **settings: Any) -> Any:
        """A loader in order over one split; its ``dataset`` is the split with the transform of evaluation.

        ``settings`` are ``batch_size`` and ``num_workers``.
        """

    @classmethod
    def largest_size(cls, splits: Any, task_args: dict[str, Any]) -> tuple[int, int] | None:
        """Height and width of the largest images that the network will see; None where the input size says it."""
        return None

    @abstractmethod
    def loss(self, batch: Any) -> Tensor:
        """The loss of one training batch."""

    @abstractmethod
    def evaluate_batch(self, batch: Any, batch_idx: int) -> None:
        """Take one batch into the scores."""

    @abstractmethod
    def scores(self) -> dict[str, Any]:
        """The scores of all batches since the last call; numbers are logged, other things are for the report."""

    def caption(self, truth: Any) -> str:
        """What stands below a training image on the sheet of samples: its label in words."""
        return self.class_names[truth] if truth >= 0 else "can't be read"

    def warnings_about(self, scores: dict[str, Any]) -> list[str]:
        """What looks wrong about scores, a line each: a loss that isn't finite, one class for everything."""
        found = []
        if not math.isfinite(loss := scores.get("loss", 0.0)):
            found.append(
                f"the loss is {loss:g}, no finite number: the network's outputs overflow (a smaller --lr helps)"
            )
        if (confusion := scores.get("confusion")) is not None:
            true, predicted = confusion.sum(1), confusion.sum(0)
            if int((true > 0).sum()) > 1 and int((predicted > 0).sum()) == 1:
                name = printable(self.class_names[int(predicted.argmax())])
                found.append(f"all {self.scored} are predicted as {name!r}, though there are other classes")
        return found

    @abstractmethod
    def summary(self, scores: dict[str, Any]) -> dict[str, Any]:
        """The scores as ``metrics.json`` holds them, with ``images``, ``seconds`` and ``images_per_second``."""

    @abstractmethod
    def headline(self, metrics: dict[str, Any]) -> str:
        """The figure that counts, in a few words."""

    @abstractmethod
    def print_table(self, metrics: dict[str, Any]) -> None:
        """The figures as a table on standard output."""

    @abstractmethod
    def write_report(self, folder: Path, scores: dict[str, Any], split: Any, metrics: dict[str, Any]) -> None:
        """Draw ``report/`` from what was scored on ``split``."""

    def learn_from(self, teacher: Any) -> None:
        """Learn from the predictions of a :class:`~transcnn.tasks.distill.Teacher` as well."""
        raise UserError(f"distill_from is for the task classify, not for {self.name}")

    # --- the same for all -------------------------------------------------------------------------------------------

    def sample_index(self, nth: int) -> int:
        """Index in the split of the nth sample that this process scores; processes take turns (``EpochSampler``)."""
        return nth * world() + rank()

    def forward(self, x: Any) -> Any:
        """Images to the model's output; while a split is scored, by the optimized copy if there is one."""
        if self._fast:
            try:
                return self._fast[0](x)
            except Exception as error:  # of any network that timm knows
                name, reason = type(self.model).__name__, first_line(error)
                _log.warning("%s runs as it is, for optimized it fails: %s", name, reason)
                self._fast, self.path, self.optimize = (), "plain", False  # nor in later epochs
        if self.channels_last and isinstance(x, Tensor):
            x = x.contiguous(memory_format=torch.channels_last)
        # A captured graph would keep the momentum that norms have while it is captured.
        warming = self._statistics is not None and self._statistics.running
        return self.model(x) if self._recorded is None or warming else self._recorded(x)

    def train(self, mode: bool = True) -> Any:
        """Training mode for all but what is frozen."""
        super().train(mode)
        for module in self.frozen if mode else ():
            module.eval()
        return self

    def configure_model(self) -> None:
        """Train with kernels of our own, and share the weights out where the strategy says so."""
        if self.trainer.strategy.root_device.type in ("cpu", "cuda"):
            accelerate_training(self.model)
        if self.cuda_graphs:
            self._recorded = record_training(self.model)
        if isinstance(self.trainer.strategy, Sharded):
            shard(self.model, self.trainer.strategy.mesh)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed dropout, stochastic depth and mixing for this very step: nothing random needs to be in a checkpoint."""
        if self._statistics is not None:
            self._statistics.step()
        step = (self.seed, self.current_epoch, batch_idx, self.global_rank)
        state = int(np.random.SeedSequence(step).generate_state(1)[0])
        torch.manual_seed(state)
        np.random.seed(state)  # noqa: NPY002  (timm's Mixup draws from the global generator)
        random.seed(state)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One batch's loss; ``last_loss`` keeps it for the epoch's mean."""
        try:
            loss = self.loss(batch)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise UserError(
                "BatchNorm can't learn from a single value per channel: this network's last maps have one position and "
                "the batch has one image; give --batch_size 2 or more (of each process), or larger images"
            ) from error
        self.last_loss = loss.detach()
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Score one batch of the validation split."""
        self.evaluate_batch(batch, batch_idx)

    def on_validation_epoch_start(self) -> None:
        """Have all processes score the same network: norms' statistics are each process's own unless synchronised."""
        if world() > 1:
            for buffer in self.model.buffers():
                torch.distributed.broadcast(buffer, 0)
        if self.trainer.strategy.root_device.type == "cpu":  # a GPU would tune kernels for sizes that training lacks
            self._optimize(self.trainer.val_dataloaders)

    def on_validation_epoch_end(self) -> None:
        """Log the validation scores as ``val_...``; ``warnings`` is what looks wrong about them."""
        self._fast = ()
        scores = self.scores()
        self.warnings = self.warnings_about(scores)
        numbers = {f"val_{name}": value for name, value in scores.items() if isinstance(value, int | float)}
        self.log_dict(numbers, rank_zero_only=False)

    def on_test_epoch_start(self) -> None:
        """Make the network that scores the split."""
        self._optimize(self.trainer.test_dataloaders)

    def _optimize(self, loader: Any) -> None:
        """Score the images of ``loader`` by an optimized copy of the network, if asked for and worth it."""
        fast = None
        if self.optimize and len(loader.dataset) >= ENOUGH and not isinstance(self.trainer.strategy, Sharded):
            dtypes = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
            fast = try_optimize(self.model, dtypes.get(str(self.trainer.precision)))
            self.optimize = fast is not None  # where it can't be, once is enough to try and to say so
        self._fast = () if fast is None else (fast,)
        self.path = "plain" if fast is None else "optimized"

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Score one batch of any split."""
        self.evaluate_batch(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Keep the scores for whoever asked (``evaluate.measure``)."""
        self._fast = ()
        self.test_scores = self.scores()

    def configure_optimizers(self) -> Any:
        """timm's optimizer and schedule; the schedule steps with each update."""
        o = self.optim
        if o.opt not in list_optimizers():
            raise UserError(f"no optimizer is named {o.opt!r}; some that are: adamw, sgd, lamb, lion, nadamw")
        extra: dict[str, Any] = {"betas": tuple(o.betas)} if o.betas else {}
        try:
            optimizer = create_optimizer_v2(
                self.model,
                o.opt,
                lr=self.lr,
                weight_decay=o.weight_decay,
                momentum=o.momentum,
                layer_decay=o.layer_decay,
                **extra,
                **(o.opt_args or {}),
            )
        except (TypeError, ValueError, AssertionError, ImportError) as error:  # some need libraries and GPUs
            raise UserError(f"opt={o.opt!r}, opt_args={o.opt_args}: {error}") from error
        if getattr(optimizer, "is_second_order", False):
            raise UserError(
                f"opt={o.opt!r} needs second derivatives, which training doesn't compute; others: adamw, sgd"
            )
        updates = self.updates_per_epoch
        default = 0.9 if o.sched == "poly" else 0.1
        try:
            scheduler, _ = create_scheduler_v2(
                optimizer,
                o.sched,
                num_epochs=self.epochs,
                decay_epochs=o.decay_epochs,
                decay_milestones=o.milestones or [],
                decay_rate=default if o.decay_rate is None else o.decay_rate,
                warmup_epochs=round(o.warmup_epochs * updates) / updates,  # pyright: ignore  (whole updates)
                warmup_lr=min(o.warmup_lr, self.lr),
                min_lr=min(o.min_lr, self.lr),
                step_on_epochs=False,
                updates_per_epoch=updates,
            )
        except (ValueError, AssertionError) as error:
            raise UserError(f"sched={o.sched!r}: {error}") from error
        if scheduler is None:  # sched="none"
            return optimizer
        scheduler.step_update(0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The schedule follows from the settings and the updates made; a saved one would keep the epochs it was for."""
        checkpoint["lr_schedulers"] = []

    def on_train_start(self) -> None:
        """A run that goes on for other epochs than before has another rate at once; frozen parts are put in eval mode.

        (Not before: Lightning keeps the modes that it finds, and warns of parts that don't train.)
        """
        if self.frozen:
            self.train()
        self._statistics = StatisticsWarmup(self.model)
        if scheduler := self.lr_schedulers():
            self.lr_scheduler_step(scheduler, None)

    def on_train_end(self) -> None:
        """Leave norms with the momentum that they came with."""
        if self._statistics is not None:
            self._statistics.stop()

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """timm's schedulers get the number of updates made."""
        scheduler.step_update(self.global_step)
        for group in scheduler.optimizer.param_groups:
            group["lr"] *= self.lr_factor
