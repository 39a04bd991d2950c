"""The settings of a training run: one frozen object, in groups, from the command line to whoever reads them.

On the command line each has a flag of its own, with or without the group's name (``--optim.clip_grad 1``,
``--clip_grad 1``); in a recipe they stand under the group, or by themselves. Names are timm's.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, ParamSpec, TypeVar

from ..plain import Arguments
from ..text import without_passwords
from .groups import Augment, Classify, Detect, Distill, Ema, Multilabel, Optim, Regress, Segment, Table

__all__ = [
    "Augment",
    "Classify",
    "Detect",
    "Distill",
    "Ema",
    "Multilabel",
    "Optim",
    "Regress",
    "Segment",
    "Table",
    "TrainSettings",
    "as_plain",
    "takes_settings",
]

P = ParamSpec("P")
R = TypeVar("R")

# What ``transcnn train --help`` shows first, and the headings of what isn't in a group.
HELP_GROUPS = {
    "what most runs need": (
        *("task", "model", "pretrained", "img_size", "epochs", "batch_size", "lr", "out", "resume", "config"),
    ),
    "data": ("val_fraction", "strict_data", "accept_changed_data", "num_workers", "limit_batches", "in_chans"),
    "network": ("init_from", "freeze", "plug", "model_args", "drop_rate", "drop_path_rate"),
    "run": ("seed", "eval_metric", "early_stop", "save_every", "nonfinite", "max_nonfinite", "dry_run", "quiet"),
    "machine": (
        *("accelerator", "devices", "num_nodes", "strategy", "precision"),
        *("channels_last", "cuda_graphs", "grad_checkpointing", "optimize"),
    ),
}


@dataclass(frozen=True)
class TrainSettings:
    """All that a training run was asked for.

    Args:
        data: A folder of class folders (or of train/ with val/ or test/ that hold them), a table of files and labels
            (.csv, .tsv, .jsonl, .parquet, or a folder's metadata.csv), a Parquet file of images or a folder of them,
            what transcnn pack wrote, the URL of either (https, s3, hf://datasets/OWNER/NAME, ...), torch/...,
            hfds/..., wds/... as timm's readers know them; without it, the embedded handwritten digits.
            To segment, a folder or tar of images/{train,val,test}/ and labels/{train,val,test}/; to detect,
            of images/ and annotations/{train,val,test}.json in COCO's format, or of Pascal VOC's or YOLO's.
        task: What is learnt: one class an image, several labels (multilabel), numbers (regress), a class for each
            pixel, or boxes.
        model: A network of this package (see transcnn models) or any other of timm's.
        epochs: Times that the training images are gone through.
        batch_size: Images a step, of all processes together; each of N takes batch_size / N. (In timm and Lightning it
            is the batch of one process.) So results don't depend on N, nor does what lr has to be.
        lr: Learning rate (see lr_batch).
        img_size: Side of the images that the network is given; without it, what the network was made for, or to
            classify larger images from scratch what suits them, up to 224. To segment,
            side of the crops that are learnt from; whole images are evaluated.
        in_chans: Channels of the images, any number: of TIFF with several bands or pages, and arrays (.npy), those that
            they hold. Without it, what such files hold that no photograph does, else 1 for grey images and 3 for all
            others.
        out: The run's directory, new or empty; without it runs/DATE-TIME-MODEL-DATA.
        seed: Of the weights, the split, the order and the augmentation.
        precision: auto is bf16 where the CPU has it, else 32; 16 needs a GPU.
        resume: A run's directory or last.ckpt: go on exactly where it stopped, with its settings. ``epochs`` may be
            others than before; the schedule is then that of all of them.
        accept_changed_data: Go on with a run whose data has changed since it began. What was held back from learning
            stays so; new images are learnt from.
        init_from: Weights to start from: a run's directory, or a file of this package or of the authors. To segment or
            detect, those of a classifier (or of another decoder) are taken for the backbone.
        pretrained: Start from the model's published weights.
        freeze: What of the backbone stays as it is: all (only the last layer, or a decoder, learns), a number of
            stages, or patterns of names such as stages.0*. Norms of frozen parts stay in evaluation mode.
        plug: Put H-MHSA after these modules of any CNN, with commas, patterns, or auto (see transcnn plug MODEL).
        model_args: Further arguments of the model, such as {stem_stride: 1}.
        drop_rate: Dropout before the last layer of a network with one answer an image; without it the model's own.
        drop_path_rate: Stochastic depth of the last block, growing from 0 at the first.
        optim: How the weights are learnt.
        augment: How training images are varied.
        table: Which columns of a table are what.
        ema: The average of the weights that is scored and kept.
        distill: Whose predictions are learnt as well.
        classify: Settings of classification alone.
        multilabel: Settings of several labels an image alone.
        regress: Settings of numbers alone.
        segment: Settings of segmentation alone.
        detect: Settings of detection alone.
        val_fraction: Share of the training images held back where the data has no validation split.
        strict_data: Stop at the first image that can't be read, instead of leaving it out.
        num_workers: Processes that read images; without it, one for each core but one, and none for images in memory.
        eval_metric: The validation figure that chooses the best epoch, without it the first of these: to classify top1,
            balanced_accuracy, macro_f1, macro_precision, auroc; for labels map, macro_f1, micro_f1, exact_match; for
            numbers mae, rmse, r2, spearman; to segment miou, pixel_accuracy, mean_accuracy; to detect map, map50.
            ``loss`` (not to detect) ranks epochs where a small validation split gives many the same score.
        early_stop: Stop after this many epochs without a better one.
        save_every: Write last.ckpt each this many updates, not only after each epoch.
        nonfinite: What to do about max_nonfinite updates in a row whose gradients are not finite: go back to the last
            checkpoint with half the learning rate (three times at most), or stop; nonfinite.json then holds the cause.
        max_nonfinite: Fewer such updates in a row are left out, counted and noted in faults.log.
        grad_checkpointing: Less memory for about a third more time.
        channels_last: The memory format that is usually quicker.
        cuda_graphs: On one GPU, capture the launches of a step and replay them: up to three times as fast where
            batches are small. For all tasks but detect.
        optimize: Score images (on a CPU in each epoch, too) by the network as transcnn.optimize makes it: the same
            scores up to rounding, several times as fast.
        accelerator: cpu, gpu, or auto.
        devices: Processes on this machine, each with a device of its own. Under torchrun or Slurm theirs count.
        num_nodes: Machines; the same command runs on each, with MASTER_ADDR, MASTER_PORT and NODE_RANK set.
        strategy: What each of several processes holds: the whole network (ddp), or a part of its weights and of the
            optimizer's state (fsdp); auto is fsdp for networks of 60 M parameters or more on several GPUs.
        dry_run: Build everything, take two steps on made-up data, and print what the run would take (memory, time,
            disk) and where each setting came from. Data for classification needn't be there.
        limit_batches: Only this many batches an epoch, for trying out.
        quiet: Print nothing but errors.
        origins: Where settings that aren't the defaults' came from, by name or ``group.name``: the command line, a
            recipe, a call, the run that goes on. What is in it counts as given, also where it equals the default.
    """

    data: str | None = None
    _: KW_ONLY
    task: Literal["classify", "multilabel", "regress", "segment", "detect"] = "classify"
    model: str = "transcnn_nano"
    epochs: int = 50
    batch_size: int = 64
    lr: float = 1e-3
    img_size: int | None = None
    in_chans: int | None = None
    out: str | None = None
    seed: int = 0
    precision: Literal["auto", "32", "bf16", "16"] = "auto"
    resume: str | None = None
    accept_changed_data: bool = False
    init_from: str | None = None
    pretrained: bool = False
    freeze: list[str] | None = None
    plug: str | None = None
    model_args: Arguments | None = None
    drop_rate: float | None = None
    drop_path_rate: float = 0.0
    optim: Optim = Optim()
    augment: Augment = Augment()
    table: Table = Table()
    ema: Ema = Ema()
    distill: Distill = Distill()
    classify: Classify = Classify()
    multilabel: Multilabel = Multilabel()
    regress: Regress = Regress()
    segment: Segment = Segment()
    detect: Detect = Detect()
    val_fraction: float = 0.1
    strict_data: bool = False
    num_workers: int | None = None
    eval_metric: str | None = None
    early_stop: int | None = None
    save_every: int | None = None
    nonfinite: Literal["halve", "stop"] = "halve"
    max_nonfinite: int = 10
    grad_checkpointing: bool = False
    channels_last: bool = True
    cuda_graphs: bool = False
    optimize: bool = True
    accelerator: str = "auto"
    devices: int = 1
    num_nodes: int = 1
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    dry_run: bool = False
    limit_batches: int | None = None
    quiet: bool = False
    origins: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("data", "out", "resume", "init_from"):
            if isinstance(value := getattr(self, name), os.PathLike):
                object.__setattr__(self, name, os.fspath(value))
        for item in fields(self):
            if is_dataclass(item.default) and isinstance(value := getattr(self, item.name), Mapping):
                object.__setattr__(self, item.name, type(item.default)(**value))  # optim={"opt": "sgd"} from Python
        if isinstance(self.freeze, str | int):  # freeze="all" and freeze=2 from Python
            object.__setattr__(self, "freeze", [str(self.freeze)])

    def value_of(self, name: str) -> Any:
        """The value of a setting, by its name or ``group.name``."""
        group, _, inner = name.partition(".")
        return getattr(getattr(self, group), inner) if inner else getattr(self, group)

    def origin_of(self, name: str) -> str:
        """Where a setting came from (``default`` if nowhere else), by its name or ``group.name``."""
        return self.origins.get(name) or self.origins.get(name.partition(".")[0]) or "default"


def as_plain(settings: TrainSettings) -> dict[str, Any]:
    """Settings as ``config.yaml`` and checkpoints hold them: numbers, strings, lists and dictionaries; no passwords."""
    plain = {item.name: _plain(getattr(settings, item.name)) for item in fields(settings) if item.name != "origins"}
    return {**plain, "data": None if settings.data is None else without_passwords(plain["data"])}


def takes_settings(make: Callable[P, TrainSettings]) -> Callable[[Callable[[TrainSettings], R]], Callable[P, R]]:
    """Let a function of settings be called with their fields as arguments: ``train("photos", epochs=3)``."""

    def decorate(function: Callable[[TrainSettings], R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            settings = make(*args, **kwargs)
            if not settings.origins:
                given = [*(item.name for item in fields(settings)[: len(args)]), *kwargs]
                settings = replace(settings, origins=dict.fromkeys(given, "call"))
            return function(settings)

        call.settings_type = make  # pyright: ignore  (what the command line is made of)
        call.__signature__ = inspect.signature(make)  # pyright: ignore
        return call

    return decorate


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: _plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
