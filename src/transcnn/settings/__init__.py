"""The settings of a training run: one frozen object, in groups, from the command line to whoever reads them.

On the command line each has a flag of its own, with or without the group's name (``--optim.clip_grad 1``,
``--clip_grad 1``); in a recipe they stand under the group. Names are timm's.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, ParamSpec, TypeVar

from .plain import Arguments

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
class Optim:
    """How the weights are learnt, beyond ``lr``.

    Args:
        opt: Optimizer, any name of ``timm.optim.list_optimizers()``.
        weight_decay: Weight decay; norms and biases have none.
        layer_decay: Each layer's rate is this times that of the layer above it (0.65 to 0.8 to fine-tune).
        betas: The optimizer's betas, if it has any.
        momentum: The optimizer's momentum, if it has any.
        opt_args: Further arguments of the optimizer, such as {ns_steps: 3} of muon.
        sched: Schedule of the rate: cosine, step, poly, constant, ... (those of ``timm.scheduler``).
        milestones: Epochs after which ``multistep`` multiplies the rate by ``decay_rate``.
        decay_rate: What ``step`` and ``multistep`` multiply the rate by (without it 0.1); the power of ``poly`` (0.9).
        warmup_epochs: Epochs of linear warm-up, of which a part is fine; they count among ``epochs``.
        warmup_lr: Rate at the start of the warm-up.
        min_lr: Rate at the end of the cosine.
        lr_batch: The images per update that ``lr`` is meant for: the rate used is lr · (images per update) / lr_batch.
            Without it ``lr`` is used as it stands.
        clip_grad: Largest norm of the gradient; larger ones are scaled down.
        accumulate: Batches whose gradients are summed before an update.
    """

    opt: str = "adamw"
    weight_decay: float = 0.05
    layer_decay: float | None = None
    betas: tuple[float, float] | None = None
    momentum: float = 0.9
    opt_args: Arguments | None = None
    sched: str = "cosine"
    milestones: list[int] | None = None
    decay_rate: float | None = None
    warmup_epochs: float = 2.0
    warmup_lr: float = 1e-6
    min_lr: float = 1e-6
    lr_batch: int | None = None
    clip_grad: float | None = 1.0
    accumulate: int = 1


@dataclass(frozen=True)
class Augment:
    """How training images and labels are varied.

    Args:
        policy: ``small``: the whole image, shifted by a few pixels; ``imagenet``: a part of random size and shape, for
            photographs; ``none``; ``auto`` is ``small`` up to 64 pixels, else ``imagenet``.
        pad: Pixels that ``small`` shifts by at most; None is an eighth of ``img_size``.
        degrees: Largest rotation (``small``).
        zoom: Largest relative change of size (``small``).
        scale: Smallest and largest part of the image that ``imagenet`` takes.
        ratio: Smallest and largest width / height of that part.
        hflip: Probability to mirror left and right (0 where sides matter, as in digits).
        vflip: Probability to mirror top and bottom.
        color_jitter: Strength of changes of brightness, contrast and saturation.
        aa: RandAugment in timm's notation, such as ``rand-m9-mstd0.5-inc1``.
        reprob: Probability to erase a rectangle.
        remode: What it is filled with: ``pixel`` noise or the mean colour (``const``).
        mixup: Mixup's alpha; 0 is off.
        cutmix: CutMix's alpha; 0 is off. With both, one of them is drawn for each batch.
        mix_prob: Probability that a batch is mixed at all.
        smoothing: Label smoothing.
        sizes: Smaller sides that batches are resized to in the first epochs, one after another, such as [32, 48];
            ``img_size`` comes after them. Early epochs then take a fraction of the time (classification only).
        size_ends: The share of all epochs after which each of ``sizes`` ends, such as [0.5, 0.75].
    """

    policy: Literal["auto", "imagenet", "small", "none"] = "auto"
    pad: int | None = None
    degrees: float = 0.0
    zoom: float = 0.0
    scale: tuple[float, float] = (0.35, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float | None = None
    aa: str | None = None
    reprob: float = 0.0
    remode: Literal["pixel", "const"] = "pixel"
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_prob: float = 1.0
    smoothing: float = 0.1
    sizes: list[int] | None = None
    size_ends: list[float] | None = None


@dataclass(frozen=True)
class Ema:
    """A moving average of the weights, which is what is scored and kept.

    Args:
        ema: Whether to keep one.
        ema_decay: Share of the old average that stays at each update, once warmed up.
        ema_warmup: Updates n after which the share is still (1 + n) / (ema_warmup + n) at most, so that the first,
            random weights are soon forgotten.
    """

    ema: bool = True
    ema_decay: float = 0.999
    ema_warmup: int = 10


@dataclass(frozen=True)
class Distill:
    """Learning from another network's predictions too, as DeiT does it (classification only).

    Args:
        distill_from: The teacher: a run's directory, a checkpoint of ours, or the name of a published model. It is
            shown the student's images, mixed and all, at the student's size.
        distill_type: ``hard``: the teacher's first choice is a second label; ``soft``: its probabilities are.
        distill_alpha: Share of the teacher in the loss; the rest is the labels'.
        distill_tau: Temperature that softens both networks' probabilities (``soft``).
    """

    distill_from: str | None = None
    distill_type: Literal["hard", "soft"] = "hard"
    distill_alpha: float = 0.5
    distill_tau: float = 3.0


@dataclass(frozen=True)
class Classify:
    """Classification: what is done about classes of very different sizes.

    Args:
        loss: Cross entropy, or focal loss, in which images that are answered well already count little.
        focal_gamma: How little (``focal``): the loss times (1 - probability of the truth) to this power.
        class_weights: Rare classes count more in the loss: by 1 / their images (``balanced``), by the root of that
            (``sqrt``), or by name, such as {cat: 3, dog: 1}; the mean over the training images is 1.
        logit_adjustment: Learn with this times the logarithm of the classes' shares added to the logits, so that
            without it rare classes are found as well (Menon et al., 2007.07314); 1 is for balanced accuracy.
        sampler: What an epoch goes through: each image once, in random order (``shuffle``), or all classes equally
            often (``balanced``), the images of rare ones several times and not all of large ones.
        report_map: How the report lays images on a plane by their features: principal components, or t-SNE.
    """

    loss: Literal["ce", "focal"] = "ce"
    focal_gamma: float = 2.0
    class_weights: Literal["none", "balanced", "sqrt"] | Arguments = "none"
    logit_adjustment: float = 0.0
    sampler: Literal["shuffle", "balanced"] = "shuffle"
    report_map: Literal["pca", "tsne"] = "pca"


@dataclass(frozen=True)
class Multilabel:
    """Any number of labels an image: a probability for each label by itself.

    Args:
        loss: Binary cross entropy, or asymmetric loss (Ridnik et al., 2009.14119), in which the many labels that an
            image doesn't have count little.
        class_weights: Rare labels count more where an image has them: by images without over with it (``balanced``), or
            the root of that (``sqrt``).
        threshold: The probability from which on a label holds; without it, for each label the one of best F1 on the
            validation split.
    """

    loss: Literal["bce", "asl"] = "bce"
    class_weights: Literal["none", "balanced", "sqrt"] = "none"
    threshold: float | None = None


@dataclass(frozen=True)
class Regress:
    """Numbers of an image.

    Args:
        loss: Of numbers standardised by mean and standard deviation of the training images: squared error (``mse``),
            absolute error (``l1``), or the squared one up to one standard deviation and the absolute one beyond
            (``huber``), which outliers pull less.
    """

    loss: Literal["mse", "l1", "huber"] = "mse"


@dataclass(frozen=True)
class Segment:
    """Segmentation: the decoder, the loss, what counts, and how whole images are evaluated.

    Args:
        decoder: What is put on the backbone's maps: ``fpn`` (the paper's), ``pspnet``, ``upernet``, ``unet``.
        decoder_channels: Its width; without it 256, of ``pspnet`` 512.
        loss: Cross entropy, Dice, or both summed.
        class_weights: Rare classes count more in the cross entropy: by the ``median`` of all classes' shares over their
            own (SegNet), by 1 / ``log``(1.02 + share) (ENet), or ``none``.
        logit_adjustment: In evaluation, subtract this times the logarithm of the class weights from the logits, from 0
            to 1 (Menon et al., 2007.07314): class weights find rare classes, but too much of them.
        ignore_index: The value of label maps that doesn't count; without it 255, and classes named void or unlabelled.
        resize: Short side that images are resized to before anything else; without it they keep their size.
        scale_range: Smallest and largest enlargement of training images, drawn for each.
        window: Evaluate images in overlapping windows of this side instead of as a whole.
        flip: Evaluate images also mirrored, and average.
    """

    decoder: Literal["fpn", "pspnet", "upernet", "unet"] = "fpn"
    decoder_channels: int | None = None
    loss: Literal["ce", "dice", "both"] = "ce"
    class_weights: Literal["none", "median", "log"] = "none"
    logit_adjustment: float = 0.0
    ignore_index: int | None = None
    resize: int | None = None
    scale_range: tuple[float, float] = (0.5, 2.0)
    window: int | None = None
    flip: bool = False


@dataclass(frozen=True)
class Detect:
    """Detection: the detector, the size of its images, and which detections are kept.

    Args:
        detector: ``retinanet``, ``fasterrcnn``, or ``maskrcnn``, which finds masks as well as boxes.
        fpn_channels: Width of the pyramid and of the heads on it.
        short_side: Short side that images are resized to.
        long_side: Longest that the other side may become.
        side_range: Smallest and largest short side in training, relative to ``short_side``.
        anchor_size: Side of the smallest anchors in pixels, each further level has twice that; without it 32, or less
            where the data has small objects.
        rois: Regions of each training image that the heads of Faster and Mask R-CNN learn from; fewer are quicker.
        min_score: Detections of a lower score are left out.
        max_found: At most so many detections an image.
    """

    detector: Literal["retinanet", "fasterrcnn", "maskrcnn"] = "retinanet"
    fpn_channels: int = 256
    short_side: int = 800
    long_side: int = 1333
    side_range: tuple[float, float] = (1.0, 1.0)
    anchor_size: int | None = None
    rois: int = 512
    min_score: float = 0.05
    max_found: int = 100


@dataclass(frozen=True)
class Table:
    """A table of files and labels (CSV, TSV, JSON lines, Parquet) as data: which of its columns is what.

    Args:
        images: Folder that the files' names are relative to; without it, the folder of the table.
        target: Columns to learn, several with commas or as several words; without it ``label``.
        file_column: Column of the files; without it ``file``, ``file_name``, ``filename``, ``path`` or ``image``.
        split_column: Column that says train, val or test of each row; without it ``split``, if there is one.
        separator: What divides the labels of a cell (multilabel); without it ``;`` or ``|`` or a comma.
        group: Column whose equal values stay together (a patient's images, a place's) when a validation split is held
            back.
    """

    images: str | None = None
    target: list[str] | None = None
    file_column: str | None = None
    split_column: str | None = None
    separator: str | None = None
    group: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.images, os.PathLike):
            object.__setattr__(self, "images", os.fspath(self.images))


@dataclass(frozen=True)
class TrainSettings:
    """All that a training run was asked for.

    Args:
        data: A folder of class folders (or of train/ with val/ or test/ that hold them), a table of files and labels
            (.csv, .tsv, .jsonl, .parquet, or a folder's metadata.csv), a Parquet file of images or a folder of them,
            what transcnn pack wrote, the URL of either (https, s3, hf://datasets/OWNER/NAME, ...), torch/...,
            hfds/..., wds/... as timm's readers know them; without it, the embedded handwritten digits.
            To segment, a folder or tar of images/{train,val,test}/ and labels/{train,val,test}/; to detect,
            of images/ and annotations/{train,val,test}.json in COCO's format, or of Pascal VOC's.
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
        init_from: Weights to start from: a run's directory, a checkpoint of ours or a published one. To segment or
            detect, those of a classifier (or of another decoder) are taken for the backbone.
        pretrained: Start from the model's published weights.
        freeze: What of the backbone stays as it is: all (only the last layer, or a decoder, learns), a number of
            stages, or patterns of names such as stages.0*. Norms of frozen parts stay in evaluation mode.
        plug: Put H-MHSA after these modules of any CNN, with commas, patterns, or auto (see transcnn plug MODEL).
        model_args: Further arguments of the model, such as {stem_stride: 1}.
        drop_rate: Dropout before the last layer; without it the model's own.
        drop_path_rate: Stochastic depth of the last block, growing from 0 at the first.
        optim: How the weights are learnt.
        augment: How training images are varied.
        table: Which columns of a table are what.
        ema: The average of the weights that is scored and kept.
        distill: Whose predictions are learnt as well.
        classify: What is peculiar to classification.
        multilabel: What is peculiar to several labels an image.
        regress: What is peculiar to numbers.
        segment: What is peculiar to segmentation.
        detect: What is peculiar to detection.
        val_fraction: Share of the training images held back where the data has no validation split.
        strict_data: Stop at the first image that can't be read, instead of leaving it out.
        num_workers: Processes that read images; without it, one for each core but one, and none for images in memory.
        eval_metric: The validation figure that chooses the best epoch; without it top1, miou or map; to classify
            also balanced_accuracy, macro_f1, macro_precision, auroc; for labels map, macro_f1, micro_f1, exact_match;
            for numbers mae, rmse, r2, spearman. ``loss`` ranks epochs where a small validation
            split gives many the same score.
        early_stop: Stop after this many epochs without a better one.
        save_every: Write last.ckpt each this many updates, not only after each epoch.
        nonfinite: What to do about max_nonfinite updates in a row whose gradients are not finite: go back to the last
            checkpoint with half the learning rate (three times at most), or stop; nonfinite.json then holds the cause.
        max_nonfinite: Fewer such updates in a row are left out, counted and noted in faults.log.
        grad_checkpointing: Less memory for about a third more time.
        channels_last: The memory format that is usually quicker.
        cuda_graphs: On one GPU, capture the launches of a step and replay them: up to three times as fast where
            batches are small. For classify and segment.
        optimize: Score images (on a CPU in each epoch, too) by the network as transcnn.optimize makes it: the same
            scores up to rounding, several times as fast.
        accelerator: cpu, gpu, or auto.
        devices: Processes on this machine, each with a device of its own. Under torchrun or Slurm theirs count.
        num_nodes: Machines; the same command runs on each, with MASTER_ADDR, MASTER_PORT and NODE_RANK set.
        strategy: What each of several processes holds: the whole network (ddp), or a part of its weights and of the
            optimizer's state (fsdp); auto is fsdp for transcnn_large and larger ones on several GPUs.
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

    def value_of(self, name: str) -> Any:
        """The value of a setting, by its name or ``group.name``."""
        group, _, inner = name.partition(".")
        return getattr(getattr(self, group), inner) if inner else getattr(self, group)

    def origin_of(self, name: str) -> str:
        """Where a setting came from (``default`` if nowhere else), by its name or ``group.name``."""
        return self.origins.get(name) or self.origins.get(name.partition(".")[0]) or "default"


def as_plain(settings: TrainSettings) -> dict[str, Any]:
    """Settings as ``config.yaml`` and checkpoints hold them: numbers, strings, lists and dictionaries."""
    return {item.name: _plain(getattr(settings, item.name)) for item in fields(settings) if item.name != "origins"}


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
