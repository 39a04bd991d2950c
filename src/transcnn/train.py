"""``transcnn train``: from images to a run directory with a trained network, on Lightning's Trainer."""

from __future__ import annotations

import inspect
import os
import signal
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping

from .bars import TrainBar
from .engine import choose_precision, keep_freed_memory, quiet_libraries
from .errors import UserError
from .evaluate import measure, write_results
from .processes import first_decides, gather_lists, launch, lost_process, per_machine, placement, world
from .runs import data_config_of, load, new_run_dir, write_whole
from .settings import Augment, Detect, Distill, Ema, Optim, Segment
from .tasks import get_task
from .tasks.base import Task
from .training import callbacks as cb
from .training.building import make_learner, make_network
from .training.checkpointing import KeepWeights
from .training.dryrun import assumed_splits, dry_run
from .training.faults import GoBack, SkipNonFinite
from .training.given import as_yaml, check, find_resumed, find_start, plain, resumed_settings
from .training.loading import LoaderWatch
from .training.sharding import choose_strategy

__all__ = ["TrainResult", "train"]


@dataclass
class TrainResult:
    """What :func:`train` hands back: the run's directory, and its ``metrics.json`` as a dictionary."""

    run_dir: Path
    metrics: dict[str, Any]


def train(
    data: str | None = None,
    *,
    task: Literal["classify", "segment", "detect"] = "classify",
    model: str = "transcnn_nano",
    epochs: int = 50,
    batch_size: int = 64,
    lr: float = 1e-3,
    img_size: int | None = None,
    in_chans: int | None = None,
    out: str | None = None,
    seed: int = 0,
    precision: Literal["auto", "32", "bf16", "16"] = "auto",
    resume: str | None = None,
    init_from: str | None = None,
    pretrained: bool = False,
    plug: str | None = None,
    model_args: dict[str, Any] | None = None,
    drop_rate: float | None = None,
    drop_path_rate: float = 0.0,
    optim: Optim = Optim(),  # noqa: B008  (never changed; so written, each field becomes a flag)
    augment: Augment = Augment(),  # noqa: B008
    ema: Ema = Ema(),  # noqa: B008
    distill: Distill = Distill(),  # noqa: B008
    segment: Segment = Segment(),  # noqa: B008
    detect: Detect = Detect(),  # noqa: B008
    val_fraction: float = 0.1,
    strict_data: bool = False,
    num_workers: int | None = None,
    eval_metric: str | None = None,
    early_stop: int | None = None,
    save_every: int | None = None,
    nonfinite: Literal["halve", "stop"] = "halve",
    max_nonfinite: int = 10,
    grad_checkpointing: bool = False,
    channels_last: bool = True,
    cuda_graphs: bool = False,
    accelerator: str = "auto",
    devices: int = 1,
    num_nodes: int = 1,
    strategy: Literal["auto", "ddp", "fsdp"] = "auto",
    dry_run: bool = False,
    limit_batches: int | None = None,
    quiet: bool = False,
) -> TrainResult:
    """Train a network on images; the run's directory then holds its weights, figures and report.

    The best epoch is chosen on the validation part; the test part, if there is one, is looked at once at the end.

    Args:
        data: A folder of class folders (or of train/ with val/ or test/ that hold them), a Parquet file or a folder of
            them, what transcnn pack wrote, the URL of either (https, s3, hf://datasets/OWNER/NAME, ...), torch/...,
            hfds/..., wds/... as timm's readers know them; without it, the embedded handwritten digits.
            To segment, a folder or tar of images/{train,val,test}/ and labels/{train,val,test}/; to detect,
            of images/ and annotations/{train,val,test}.json in COCO's format, or of Pascal VOC's.
        task: What is learnt.
        model: A network of this package (see transcnn models) or any other of timm's.
        epochs: Times that the training images are gone through.
        batch_size: Images a step, of all processes together; each of N takes batch_size / N. (In timm and Lightning it
            is the batch of one process.) So results don't depend on N, nor does what lr has to be.
        lr: Learning rate (see lr_batch).
        img_size: Side of the images that the network is given; without it, what the network was made for. To segment,
            side of the parts of images that are learnt from; whole images are judged.
        in_chans: Channels of the images, 1 to 4; without it 1 for grey images, else 3.
        out: The run's directory, new or empty; without it runs/DATE-TIME-MODEL-DATA.
        seed: Of the weights, the split, the order and the augmentation.
        precision: auto is bf16 where the processor has it, else 32; 16 needs a GPU.
        resume: A run's directory or last.ckpt: go on exactly where it stopped, with its settings. ``epochs`` may be
            others than before; the schedule is then that of all of them.
        init_from: Weights to start from: a run's directory, a checkpoint of ours or a published one. To segment or
            detect, those of a classifier (or of another decoder) are taken for the backbone.
        pretrained: Start from the model's published weights.
        plug: Put H-MHSA after these modules of any CNN, with commas, patterns, or auto (see transcnn plug MODEL).
        model_args: Further arguments of the model, such as {stem_stride: 1}.
        drop_rate: Dropout before the last layer; without it the model's own.
        drop_path_rate: Stochastic depth of the last block, growing from 0 at the first.
        optim: How the weights are learnt.
        augment: How training images are varied.
        ema: The average of the weights that is scored and kept.
        distill: Whose answers are learnt as well.
        segment: What is peculiar to segmentation.
        detect: What is peculiar to detection.
        val_fraction: Share of the training images held back where the data has no validation part.
        strict_data: Stop at the first image that can't be read, instead of leaving it out.
        num_workers: Processes that read images; without it, one for each core but one, and none for images in memory.
        eval_metric: The validation figure that chooses the best epoch; without it top1, miou or map. ``loss`` tells
            epochs apart where a small validation part gives many the same score.
        early_stop: Stop after this many epochs without a better one.
        save_every: Write last.ckpt each this many updates, not only after each epoch.
        nonfinite: What to do about max_nonfinite updates in a row whose gradients are not finite: go back to the last
            checkpoint with half the learning rate (three times at most), or stop; nonfinite.json then holds the cause.
        max_nonfinite: Fewer such updates in a row are left out, counted and noted in faults.log.
        grad_checkpointing: Less memory for about a third more time.
        channels_last: The memory format that is usually quicker.
        cuda_graphs: On one GPU, record the launches of a step and play them back: up to three times as fast where
            batches are small. For classify and segment.
        accelerator: cpu, gpu, or auto.
        devices: Processes on this machine, each with a device of its own. Under torchrun or Slurm theirs count.
        num_nodes: Machines; the same command runs on each, with MASTER_ADDR, MASTER_PORT and NODE_RANK set.
        strategy: What each of several processes holds: the whole network (ddp), or a part of its weights and of the
            optimizer's state (fsdp); auto is fsdp for transcnn_large and larger ones on several GPUs.
        dry_run: Build everything, take two steps on made-up data, and print what the run would take (memory, time,
            disk) and where each setting came from. Data for classification needn't be there.
        limit_batches: Only this many batches an epoch, for trying out.
        quiet: Print nothing but errors.

    Returns:
        The run's directory and what was measured.

    Raises:
        UserError: Data, model or settings that can't be used, or a run directory that can't be written to.
        KeyboardInterrupt: The run was asked to stop (``callbacks.Interrupted``), after a checkpoint.
    """
    settings = plain(dict(locals()))
    with quiet_libraries():
        launch(accelerator, devices, num_nodes)
        resumed = first_decides(lambda: find_start(resume, out))
        if resumed:
            defaults = plain({name: p.default for name, p in inspect.signature(train).parameters.items()})
            settings = resumed_settings(settings, defaults, resumed)
        lr_factor = None
        while True:
            try:
                return _run(SimpleNamespace(**settings), resumed, lr_factor)
            except GoBack as back:  # noqa: PERF203  (three times at most)
                lr_factor = back.lr_factor
                resumed = first_decides(partial(find_resumed, str(back.run_dir)))


def _run(s: SimpleNamespace, resumed: Path | None, lr_factor: float | None) -> TrainResult:
    """Build everything, fit, measure."""
    task_class = get_task(s.task)
    check(s, task_class.eval_metrics, world())
    keep_freed_memory()
    L.seed_everything(s.seed, verbose=False)
    task_args = vars(s).get(task_class.group) or {}
    assumed = assumed_splits(s) if s.dry_run else None
    splits = assumed or task_class.open_data(
        s.data, task_args, val_fraction=s.val_fraction, seed=s.seed, strict=s.strict_data, in_chans=s.in_chans
    )
    task_args = {**task_args, **splits.task_args}
    network, args = make_network(s, splits, task_args)
    config = data_config_of(network, splits.in_chans, s.img_size)
    learner = make_learner(s, splits, network, config, task_args)
    loaders = None if assumed else _loaders(s, task_class, splits, config, task_args)
    if s.dry_run:
        return TrainResult(Path(), dry_run(s, learner, splits, loaders))

    info = {"model": s.model, "model_args": args, "class_names": splits.class_names, "data_config": config}
    info |= {"task": s.task, "task_args": task_args, "data": splits.name}
    here = resumed is not None and (s.out is None or Path(s.out).resolve() == resumed.parent.resolve())
    run_dir = resumed.parent if resumed and here else first_decides(lambda: new_run_dir(s.out, s.model, splits.name))
    metric = s.eval_metric or task_class.score
    keep = KeepWeights(run_dir, info, vars(s), s.save_every, metric)
    skip = SkipNonFinite(run_dir, keep, s.max_nonfinite, s.nonfinite == "halve", lr_factor)
    averages = [cb.Ema(s.ema["ema_decay"], s.ema["ema_warmup"])] if s.ema["ema"] else []
    strategy = choose_strategy(s.strategy, network, s.accelerator)
    trainer = _trainer(s, run_dir, [*averages, skip], keep, strategy)
    if trainer.is_global_zero:
        write_whole(run_dir / "config.yaml", lambda path: path.write_text(as_yaml(s)))
        if not s.quiet:
            _announce(s, splits, network, config, run_dir, trainer)
    _fit(trainer, learner, loaders, resumed)
    return _finish(s, task_class, splits, run_dir, trainer, keep)


def _loaders(
    s: SimpleNamespace, task_class: type[Task], splits: Any, config: dict[str, Any], task_args: dict[str, Any]
) -> L.LightningDataModule:
    return task_class.loaders(
        splits,
        config,
        Augment(**s.augment),
        task_args,
        batch_size=s.batch_size // world(),
        num_workers=max(0, (os.cpu_count() or 1) // per_machine() - 1) if s.num_workers is None else s.num_workers,
        seed=s.seed,
        progress=sys.stderr.isatty() and not s.quiet,
    )


def _fit(trainer: L.Trainer, learner: Task, loaders: Any, resumed: Path | None) -> None:
    try:
        trainer.fit(learner, datamodule=loaders, ckpt_path=resumed, weights_only=True)
    except cb.Stop as stop:
        raise cb.Interrupted(str(stop), stop.signum) from None
    except SystemExit:  # Lightning's answer to a KeyboardInterrupt
        raise cb.Interrupted("at once", signal.SIGINT) from None
    except RuntimeError as error:
        if not (lost := lost_process(error)):
            raise
        raise UserError(f"{lost}; go on from the last checkpoint with --resume") from error


def _trainer(
    s: SimpleNamespace,
    run_dir: Path,
    callbacks: list[Callback],
    keep: KeepWeights,
    strategy: Any,
) -> L.Trainer:
    callbacks = [*callbacks, cb.History(run_dir, s.quiet), cb.StopOnSignal(keep)]
    if not s.quiet:
        callbacks += [TrainBar(), LoaderWatch()]
    if s.early_stop:
        callbacks.append(EarlyStopping(keep.metric, mode=keep.mode, patience=s.early_stop))
    return L.Trainer(
        **placement(s.accelerator, strategy),
        precision=choose_precision(s.precision, s.accelerator),  # pyright: ignore
        max_epochs=s.epochs,
        callbacks=[*callbacks, keep],
        logger=cb.Events(run_dir, name="", version=""),
        gradient_clip_val=s.optim["clip_grad"],
        accumulate_grad_batches=s.optim["accumulate"],
        limit_train_batches=s.limit_batches,
        limit_val_batches=s.limit_batches,
        num_sanity_val_steps=0,
        log_every_n_steps=10,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _finish(
    s: SimpleNamespace,
    task_class: type[Task],
    splits: Any,
    run_dir: Path,
    trainer: L.Trainer,
    keep: KeepWeights,
) -> TrainResult:
    """Measure the best weights, write figures and report, say where they lie."""
    part, split = (splits.val, "val") if splits.test is None else (splits.test, "test")
    loaded = load(run_dir)
    learner, scores = measure(
        loaded,
        part,
        batch_size=2 * s.batch_size // world(),
        precision=s.precision,
        accelerator=s.accelerator,
        limit=s.limit_batches,
    )
    broken = list(dict.fromkeys(gather_lists(splits.broken)))
    metrics = learner.summary(scores)
    metrics |= {"split": split, "data": splits.name, "chosen_on": "val", "chosen_by": keep.metric, **keep.figures}
    metrics |= {"best_epoch": keep.best_epoch, "epochs": trainer.current_epoch, "train_seconds": round(keep.seconds, 1)}
    if not trainer.is_global_zero:
        return TrainResult(run_dir, metrics)
    write_results(run_dir, learner, scores, part, metrics, broken)
    if not s.quiet:
        what = "test images" if split == "test" else "validation images, which also chose the epoch"
        print(f"{learner.headline(metrics)} on {metrics['images']} {what} (epoch {keep.best_epoch} of {s.epochs})")
        print(f"report: {run_dir / 'report' / 'index.html'}")
    return TrainResult(run_dir, metrics)


def _announce(
    s: SimpleNamespace, splits: Any, network: torch.nn.Module, config: dict[str, Any], run_dir: Path, trainer: L.Trainer
) -> None:
    parameters = sum(p.numel() for p in network.parameters())
    sizes = [f"{len(part):,} {name}" for name, part in (("train", splits.train), ("val", splits.val)) if part]
    sizes += [f"{len(splits.test):,} test"] if splits.test is not None else []
    shape = "x".join(str(n) for n in config["input_size"])
    device = trainer.strategy.root_device.type
    lines = (
        f"{splits.name}: {', '.join(sizes)} images of {len(splits.class_names)} classes",
        f"{s.model}: {parameters / 1e6:.2f} M parameters, input {shape}, {trainer.precision} on {device}",
        f"run: {run_dir}",
    )
    print("\n".join(lines), file=sys.stderr)
