"""The groups of settings, each a frozen dataclass: a name of its own in a recipe, a heading in ``--help``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from ..plain import Arguments

__all__ = ["Augment", "Classify", "Detect", "Distill", "Ema", "Multilabel", "Optim", "Regress", "Segment", "Table"]


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
        decay_epochs: Epochs after each of which ``step`` multiplies the rate by ``decay_rate`` (without it 90); length
            of the decay of ``wsd`` and ``rsqrt`` (the last fifth of the run).
        decay_rate: What ``step`` and ``multistep`` multiply the rate by (without it 0.1); the power of ``poly`` (0.9).
        warmup_epochs: Epochs of linear warm-up, of which a part is fine; they count among ``epochs``.
        warmup_lr: Rate at the start of the warm-up.
        min_lr: Rate at the end of cosine, tanh, poly, wsd and rsqrt.
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
    decay_epochs: float | None = None
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
        color_jitter: Strength of changes of brightness, contrast and saturation; not beside ``aa``.
        aa: RandAugment in timm's notation, such as ``rand-m9-mstd0.5-inc1``.
        reprob: Probability to erase a rectangle.
        remode: What it is filled with: ``pixel`` noise or the mean colour (``const``).
        mixup: Mixup's alpha; 0 is off.
        cutmix: CutMix's alpha; 0 is off. With both, one of them is drawn for each batch.
        mix_prob: Probability that a batch is mixed at all.
        smoothing: Label smoothing.
        sizes: Smaller sides that batches are resized to in the first epochs, one after another, such as [32, 48];
            ``img_size`` comes after them. Early epochs then take a fraction of the time (not to segment or detect).
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
        distill_from: The teacher: a run's directory, a checkpoint of this package, or the name of a published model. It
            is shown the student's images, mixed and all, at the student's size.
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
        if isinstance(self.target, str):  # target="count" from Python
            object.__setattr__(self, "target", [self.target])
