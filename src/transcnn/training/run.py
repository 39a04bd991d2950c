"""One training run: build everything, fit, measure the best weights, write figures and report."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback

from ..checkpoints.files import atomic_write
from ..checkpoints.header import check_class_names
from ..checkpoints.loading import data_config_of, load, read_info
from ..data.sets.channels import Channels
from ..distributed.processes import (
    all_or_none,
    first_decides,
    first_here,
    gather,
    gather_lists,
    lost_process,
    per_machine,
    placement,
    rank,
    world,
)
from ..distributed.runtime import choose_precision, keep_freed_memory
from ..distributed.sharding import choose_strategy
from ..errors import UserError, first_line
from ..inspection.copies import copies_between_splits
from ..plain import dump_plain
from ..settings import TrainSettings, as_plain
from ..tasks import get_task
from ..tasks.base import Task
from ..tasks.samples import write_samples
from ..text import printable
from . import callbacks as cb
from .building import make_learner, make_network
from .check import check, check_metric, remarks_on_balance, remarks_on_schedule
from .checkpointing import BEST, KeepWeights, note
from .data_record import check_unchanged, keep_split, read_record, record_of, write_record
from .dryrun import assumed_splits, dry_run
from .evaluation import measure, say_what_is_off, write_results
from .faults import SkipNonFinite
from .input_size import choose_img_size
from .loading import LoaderWatch
from .memory import check_memory
from .progress import TrainBar
from .run_dir import RunLock, new_run_dir

__all__ = ["TrainResult", "run"]

# What training data is measured for once: by it a network's weights, and its answers, mean what they do.
MEASURED = ("mean", "std", "image_mean", "image_std", "anchor_size")


@dataclass
class TrainResult:
    """What :func:`train` hands back: the run's directory, and its ``metrics.json`` as a dictionary."""

    run_dir: Path
    metrics: dict[str, Any]


def run(s: TrainSettings, resumed: Path | None, lr_factor: float | None, lock: RunLock) -> TrainResult:
    """Build everything, fit, measure."""
    task_class = get_task(s.task)
    check(s, task_class.eval_metrics, world())
    keep_freed_memory()
    L.seed_everything(s.seed, verbose=False)
    task_args = task_class.args_of(s)
    assumed = assumed_splits(s) if s.dry_run else None
    opened = {"val_fraction": s.val_fraction, "seed": s.seed, "strict": s.strict_data, "in_chans": s.in_chans}
    splits: Any = assumed or first_here(lambda: task_class.open_data(s.data, task_args, **opened))
    _check_names(splits)
    record = None if s.dry_run else _check_data(s, splits, resumed)
    task_args = {**task_args, **splits.task_args}
    if resumed is None and assumed is None:
        s = choose_img_size(s, splits, quiet=s.quiet or rank() > 0)
    if resumed is not None and assumed is None:  # as the data was when the run began, and the size that suited it
        info = read_info(resumed)
        splits.read_as(Channels.of(info["data_config"]))
        before = info.get("task_args") or {}
        task_args |= {name: before[name] for name in MEASURED if name in before and name in splits.task_args}
        s = replace(s, img_size=info["settings"].get("img_size"))
    network, args = all_or_none(lambda: make_network(s, splits, task_args, resumed))
    config = splits.channels.added_to(data_config_of(network, splits.in_chans, s.img_size or args.get("img_size")))
    learner = all_or_none(lambda: make_learner(s, splits, network, config, task_args))
    check_metric(s, learner.measured)
    loaders: Any = None if assumed else _loaders(s, task_class, splits, config, task_args)
    if s.dry_run:
        return TrainResult(Path(), dry_run(s, learner, splits, loaders))

    info = {"model": s.model, "model_args": args, "class_names": splits.class_names, "data_config": config}
    info |= {"task": s.task, "task_args": task_args, "data": splits.name}
    info["precision"] = choose_precision(s.precision, s.accelerator)  # what auto came to
    if resumed is not None:
        _check_epochs(resumed, s.epochs)
    _check_memory(s, learner, splits, task_args)
    # What these refuse is refused before anything is written.
    learner.configure_optimizers()
    averages = [cb.Ema(s.ema.ema_decay, s.ema.ema_warmup)] if s.ema.ema else []
    strategy = choose_strategy(s.strategy, network, s.accelerator)
    run_dir = first_decides(lambda: _enter(s, resumed, splits.name, lock))
    metric = s.eval_metric or task_class.score
    keep = KeepWeights(run_dir, info, as_plain(s), s.save_every, metric, task_class.lower_is_better)
    skip = SkipNonFinite(run_dir, keep, s.max_nonfinite, s.nonfinite == "halve", lr_factor)
    trainer = _trainer(s, run_dir, [*averages, skip], keep, strategy)
    if trainer.is_global_zero:
        asked = dump_plain(
            as_plain(replace(s, resume=None, accept_changed_data=False))
        )  # as a recipe it is a new run's
        atomic_write(run_dir / "config.yaml", lambda path: path.write_text(asked, encoding="utf-8"))
        write_record(run_dir, record or {})
        write_samples(run_dir, learner, loaders.splits.train)
        if not s.quiet:
            _announce(s, splits, network, config, run_dir, trainer)
            for line in (*remarks_on_schedule(s), *remarks_on_balance(s), *copies_between_splits(splits)):
                print(f"transcnn: {printable(line)}", file=sys.stderr)
    _fit(trainer, learner, loaders, resumed, keep)
    return _finish(s, task_class, splits, run_dir, trainer, keep)


def _check_names(splits: Any) -> None:
    """Raise UserError for classes that no file of weights could hold, hours before one is written and read."""
    try:
        check_class_names(list(splits.class_names))
    except ValueError as error:
        raise UserError(f"{splits.name} can't be learnt: {error}") from error


def _check_data(s: TrainSettings, splits: Any, resumed: Path | None) -> dict[str, Any]:
    """What the run learns from, compared with what it did before; what was held back stays so."""

    def compare() -> tuple[dict[str, Any], dict[str, Any] | None]:
        record = record_of(splits)
        kept = None if resumed is None else read_record(resumed.parent)
        return record, None if kept == record else kept

    record, kept = first_decides(compare)
    if kept is None or resumed is None:
        return record
    keep_split(kept, splits)

    def compare_record() -> dict[str, Any]:
        record = record_of(splits)
        changes = check_unchanged(kept, record, s.accept_changed_data)
        if changes:
            message = f"the data has changed since the run began: {'; '.join(changes)}"
            note(resumed.parent, message)
            print(f"transcnn: {printable(message)}", file=sys.stderr)
        return record

    return first_decides(compare_record)


def _check_memory(s: TrainSettings, learner: Task, splits: Any, task_args: dict[str, Any]) -> None:
    """Raise UserError where a step needs more memory than there is. (A GPU says it itself.)"""
    if torch.cuda.is_available() and s.accelerator != "cpu":
        return
    channels, *crop = learner.data_config["input_size"]
    height, width = (learner.largest_size(splits, task_args) if s.task == "detect" else None) or crop
    dtype = torch.bfloat16 if "bf16" in choose_precision(s.precision, s.accelerator) else None
    images = min(s.batch_size, len(splits.train)) // world()
    shape = (channels, height, width)
    all_or_none(lambda: check_memory(learner.model, images, shape, processes=per_machine(), dtype=dtype))


def _check_epochs(resumed: Path, epochs: int) -> None:
    """Raise UserError where a checkpoint has learnt for more epochs than are asked for."""
    content = torch.load(resumed, mmap=True, map_location="cpu", weights_only=True)
    for name in ("loops", "fit_loop", "epoch_progress", "current"):
        content = content.get(name) if isinstance(content, dict) else None
    done = content.get("processed", 0) if isinstance(content, dict) else 0
    if isinstance(done, int) and done > epochs:  # what else it is shows when it is restored
        error = UserError(
            f"{resumed} has learnt for {done} epochs already: epochs must be {done} or more, got {epochs}"
        )
        error.reported = rank() > 0
        raise error


def _enter(s: TrainSettings, resumed: Path | None, data: str, lock: RunLock) -> Path:
    """The run's directory, locked: that of the run that goes on unless ``out`` names another, else a new one."""
    if resumed is None:
        return new_run_dir(s.out, s.model, data, lock)
    if s.out is not None and Path(s.out).resolve() != resumed.parent.resolve():
        run_dir = new_run_dir(s.out, s.model, data, lock)
        for name in (BEST, "metrics.csv"):  # what was reached before belongs to it
            if (before := resumed.parent / name).is_file():
                atomic_write(run_dir / name, partial(shutil.copyfile, before))
        return run_dir
    lock.acquire(resumed.parent)
    return resumed.parent


def _loaders(
    s: TrainSettings, task_class: type[Task], splits: Any, config: dict[str, Any], task_args: dict[str, Any]
) -> Any:
    return task_class.loaders(
        splits,
        config,
        s.augment,
        task_args,
        batch_size=s.batch_size // world(),
        num_workers=max(0, (os.cpu_count() or 1) // per_machine() - 1) if s.num_workers is None else s.num_workers,
        seed=s.seed,
        progress=sys.stderr.isatty() and not s.quiet,
    )


def _fit(trainer: L.Trainer, learner: Task, loaders: Any, resumed: Path | None, keep: KeepWeights) -> None:
    try:
        trainer.fit(learner, datamodule=loaders, ckpt_path=resumed, weights_only=True)
    except cb.Stop as stop:
        raise cb.Interrupted(str(stop), stop.signum) from None
    except torch.OutOfMemoryError as error:
        size = f"{trainer.datamodule.batch_size} images a step"  # pyright: ignore
        raise UserError(
            f"the GPU's memory doesn't hold {size}: give a smaller --batch_size or --img_size, or --grad_checkpointing "
            f"({str(error).splitlines()[0][:120]})"
        ) from error
    except MisconfigurationException as error:
        raise UserError(str(error).splitlines()[0]) from error
    except SystemExit:  # Lightning's answer to a KeyboardInterrupt
        raise cb.Interrupted("at once", signal.SIGINT) from None
    except UserError:
        raise
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, RuntimeError) and (lost := lost_process(error)):
            raise UserError(f"{lost}; go on from the last checkpoint with --resume") from error
        if resumed is None or keep.went_on or "memory" in str(error):
            raise
        # The states of optimizer, loops and callbacks are as many things as there are versions and libraries.
        told = UserError(f"can't go on from {resumed}, which is damaged or of other versions: {first_line(error)}")
        told.reported = rank() > 0
        raise told from error


def _trainer(
    s: TrainSettings,
    run_dir: Path,
    callbacks: list[Callback],
    keep: KeepWeights,
    strategy: Any,
) -> L.Trainer:
    callbacks = [*callbacks, cb.History(run_dir, s.quiet, s.eval_metric)]
    if s.early_stop:
        callbacks.append(cb.EarlyStopping(keep.metric, mode=keep.mode, patience=s.early_stop, check_finite=False))
    callbacks.append(cb.StopOnSignal(keep))  # what it writes holds what the others have counted
    if not s.quiet:
        callbacks += [TrainBar(), LoaderWatch()]
    return L.Trainer(
        **placement(s.accelerator, strategy),
        precision=choose_precision(s.precision, s.accelerator),  # pyright: ignore
        max_epochs=s.epochs,
        callbacks=[*callbacks, keep],
        logger=cb.Events(run_dir, name="", version=""),
        gradient_clip_val=s.optim.clip_grad,
        accumulate_grad_batches=s.optim.accumulate,
        limit_train_batches=s.limit_batches,
        limit_val_batches=s.limit_batches,
        num_sanity_val_steps=0,
        log_every_n_steps=10,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _finish(
    s: TrainSettings,
    task_class: type[Task],
    splits: Any,
    run_dir: Path,
    trainer: L.Trainer,
    keep: KeepWeights,
) -> TrainResult:
    """Measure the best weights, write figures and report, say where they lie."""
    if not keep.best_epoch:
        error = UserError(
            f"no epoch had a finite {keep.metric} and val_loss, so no weights were kept as the best; last.ckpt holds "
            f"the last ones. Try a smaller --lr (it was {s.lr:g}) or --precision 32"
        )
        error.reported = rank() > 0
        raise error
    # The weights as everybody loads them are scored, a validation split once more: what the report shows beyond the
    # figures of each epoch (curves, wrong predictions) is made here alone.
    part, split = (splits.val, "val") if splits.test is None else (splits.test, "test")
    everywhere = all(gather((run_dir / BEST).is_file()))  # else another machine has another disk
    loaded = load(run_dir) if everywhere else first_decides(lambda: load(run_dir))
    learner, scores, part = measure(
        loaded,
        part,
        batch_size=2 * s.batch_size // world(),
        precision=s.precision,
        accelerator=s.accelerator,
        optimize=s.optimize,
        limit=s.limit_batches,
    )
    broken = list(dict.fromkeys(gather_lists(splits.broken)))
    metrics = learner.summary(scores)
    metrics |= {name: scores[name] for name in ("precision", "device", "path")}
    # As the file says; of a run whose best weights are gone, the last ones are scored.
    best = int(loaded.info.get("epoch", trainer.current_epoch))
    figures = {name: loaded.info[name] for name in keep.figures if name in loaded.info}
    metrics |= {"split": split, "data": splits.name, "chosen_on": "val", "chosen_by": keep.metric, **figures}
    metrics |= {"best_epoch": best, "epochs": trainer.current_epoch, "train_seconds": round(keep.seconds, 1)}
    if not trainer.is_global_zero:
        return TrainResult(run_dir, metrics)
    write_results(run_dir, learner, scores, part, metrics, broken)
    if not s.quiet:
        say_what_is_off(learner, scores, broken, run_dir)
        what = "test images" if split == "test" else "validation images, which also chose the epoch"
        print(f"{learner.headline(metrics)} on {metrics['images']} {what} (epoch {best} of {s.epochs})")
        print(f"report: {printable(run_dir / 'report' / 'index.html')}")
    return TrainResult(run_dir, metrics)


def _announce(
    s: TrainSettings, splits: Any, network: torch.nn.Module, config: dict[str, Any], run_dir: Path, trainer: L.Trainer
) -> None:
    parameters = sum(p.numel() for p in network.parameters())
    sizes = [f"{len(part):,} {name}" for name, part in (("train", splits.train), ("val", splits.val)) if part]
    sizes += [f"{len(splits.test):,} test"] if splits.test is not None else []
    shape = "x".join(str(n) for n in config["input_size"])
    device = trainer.strategy.root_device.type
    for remark in get_task(s.task).remarks(splits):
        print(remark, file=sys.stderr)
    lines = (
        f"{splits.name}: {', '.join(sizes)} images of {len(splits.class_names)} {get_task(s.task).outputs}",
        f"{s.model}: {parameters / 1e6:.2f} M parameters, input {shape}, {trainer.precision} on {device}",
        f"run: {run_dir}",
    )
    print("\n".join(map(printable, lines)), file=sys.stderr)
