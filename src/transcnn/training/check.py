"""Settings that can't be meant, refused before anything is built."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import fields, is_dataclass

from ..data.bands import MAX_CHANNELS
from ..errors import MAX_SEED, MAX_SIDE, UserError, check_range
from ..settings import Optim, TrainSettings
from ..tasks import TASKS

__all__ = ["check", "check_meant", "check_metric", "check_named", "remarks_on_balance", "remarks_on_schedule"]

BY_HAND = ("command line", "call")  # where settings come from that somebody gave to this very run
CLASSIFY = ("classify",)
IMAGE = ("classify", "multilabel", "regress")  # one answer an image
# Settings that only some tasks read; all other settings are for all.
ONLY_FOR: dict[str, tuple[str, ...]] = {
    "img_size": (*IMAGE, "segment"),
    "drop_rate": IMAGE,
    "distill": CLASSIFY,
    "table": IMAGE,
    "table.separator": ("multilabel",),
    "classify": CLASSIFY,
    "multilabel": ("multilabel",),
    "regress": ("regress",),
    "segment": ("segment",),
    "detect": ("detect",),
    **{
        f"augment.{name}": IMAGE
        for name in (
            "policy",
            "pad",
            "degrees",
            "zoom",
            "scale",
            "ratio",
            "aa",
            "reprob",
            "remode",
            "sizes",
            "size_ends",
        )
    },
    **{f"augment.{name}": ("classify", "multilabel") for name in ("mixup", "cutmix", "mix_prob")},
    "augment.smoothing": ("classify", "segment"),
}
# Settings that mean nothing without another one, or one of two.
NEEDS: dict[str, str | tuple[str, ...]] = {
    "distill.distill_type": "distill.distill_from",
    "distill.distill_alpha": "distill.distill_from",
    "distill.distill_tau": "distill.distill_from",
    "ema.ema_decay": "ema.ema",
    "ema.ema_warmup": "ema.ema",
    "segment.logit_adjustment": "segment.class_weights",
    "augment.remode": "augment.reprob",
    "augment.mix_prob": ("augment.mixup", "augment.cutmix"),
    "optim.warmup_lr": "optim.warmup_epochs",
}
# Settings that mean nothing but where another one has one of these values.
ONLY_WITH: dict[str, tuple[str, tuple[str, ...]]] = {
    "classify.focal_gamma": ("classify.loss", ("focal",)),
    "optim.milestones": ("optim.sched", ("multistep",)),
    "optim.decay_epochs": ("optim.sched", ("step", "wsd", "rsqrt")),
    "optim.decay_rate": ("optim.sched", ("step", "multistep", "poly")),
    "optim.min_lr": ("optim.sched", ("cosine", "tanh", "poly", "wsd", "rsqrt")),
    "detect.rois": ("detect.detector", ("fasterrcnn", "maskrcnn")),
    "distill.distill_tau": ("distill.distill_type", ("soft",)),
    "segment.class_weights": ("segment.loss", ("ce", "both")),
    "augment.smoothing": ("segment.loss", ("ce", "both")),  # whose default stays for other tasks
}


def check_named(s: TrainSettings) -> None:
    """Raise UserError for an empty name, as an unset variable of the shell gives: it would count as not given."""
    for name in ("data", "resume", "init_from", "out", "plug", "distill.distill_from", "table.images"):
        if s.value_of(name) == "":
            raise UserError(f"{name.rpartition('.')[2]} is empty: give a name, or leave it out")


def check_meant(s: TrainSettings) -> None:
    """Raise UserError for a setting that was given and that nothing would read: another task's, or one without effect.

    What equals the default, or switches something off, is let pass: a run's ``config.yaml`` has every setting. So is
    what a recipe sets for something that a flag has switched off or chosen otherwise.
    """
    _check_ranges(s)
    _check_schedule(s)
    if s.task not in TASKS:  # refused where it is looked up
        return
    default = TrainSettings()
    groups = {item.name: fields(item.default) for item in fields(s) if is_dataclass(item.default)}
    # From Python whole groups are given; the task's own says more than what is in it.
    inner = [f"{name}.{item.name}" for name in s.origins for item in groups.get(name, ())]
    for name in (*s.origins, *inner):
        value = s.value_of(name)
        if value == default.value_of(name) or not value or value == "none":
            continue
        last = name.rpartition(".")[2]
        tasks = ONLY_FOR.get(name) or ONLY_FOR.get(name.partition(".")[0]) or (s.task,)
        if s.task not in tasks:
            instead = "; short_side and long_side say how large its images are" if name == "img_size" else ""
            raise UserError(f"{last} is for the task {_either(tasks)}, not for {s.task}{instead}")
        needed = (needs,) if isinstance(needs := NEEDS.get(name, ()), str) else needs
        off = needed and all(s.value_of(other) in (None, False, 0, "none") for other in needed)
        if off and not _overruled(s, name, needed):
            raise UserError(f"{last} has no effect without {_either([other.rpartition('.')[2] for other in needed])}")
        other, wanted = ONLY_WITH.get(name, ("", ()))
        if other and s.value_of(other) not in wanted and not _overruled(s, name, (other,)):
            raise UserError(f"{last} has no effect without {other.rpartition('.')[2]} {_either(wanted)}")


def _overruled(s: TrainSettings, name: str, needed: Sequence[str]) -> bool:
    """Whether a recipe gave the setting, and a flag (or another recipe) one of those that it needs."""
    given = s.origin_of(name)
    return given not in BY_HAND and any(s.origin_of(other) not in ("default", given) for other in needed)


def _either(words: Sequence[str]) -> str:
    """``a, b or c``."""
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def check(s: TrainSettings, eval_metrics: tuple[str, ...], world: int = 1) -> None:
    """Raise UserError for what can't be meant; ``eval_metrics`` are the metrics that may choose the best epoch."""
    check_metric(s, eval_metrics)
    from ..distributed.runtime import check_accelerator  # needs torch, which check_meant needn't wait for

    _check_ranges(s)
    check_accelerator(s.accelerator)
    if s.batch_size % world:
        less, more = s.batch_size // world * world, -(-s.batch_size // world) * world
        raise UserError(
            f"batch_size counts the images of all processes: {s.batch_size} can't be shared out to {world}; "
            f"{f'{less} or ' if less else ''}{more} can"
        )
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) and not (s.out or s.resume):
        raise UserError("processes that are restarted must find their run again: give --out (or --resume)")
    if s.lr <= 0:
        raise UserError(f"lr must be above 0, got {s.lr}")
    if s.cuda_graphs:
        _check_cuda_graphs(s, world)
    _check_sizes(s.augment.sizes or [], s.augment.size_ends or [])


def remarks_on_schedule(s: TrainSettings) -> list[str]:
    """What of the learning rate may not be what was meant, a line each: a recipe may be tried for fewer epochs."""
    o, found = s.optim, []
    if o.sched != "none" and o.warmup_epochs >= s.epochs:
        found.append(
            f"the warm-up of {o.warmup_epochs:g} epochs takes all of the run's {s.epochs}: the learning rate only "
            "rises (--warmup_epochs gives another)"
        )
    every = 90 if o.decay_epochs is None else o.decay_epochs
    if o.sched == "step" and every >= s.epochs:
        found.append(
            f"sched step multiplies the learning rate after each {every:g} epochs, and the run has {s.epochs}: it "
            "never does (--decay_epochs gives others)"
        )
    if o.sched == "multistep" and not any(0 < epoch < s.epochs for epoch in o.milestones or ()):
        found.append(f"no milestone of {o.milestones} is below {s.epochs} epochs: the learning rate never falls")
    return found


def remarks_on_balance(s: TrainSettings) -> list[str]:
    """A line where rare classes are made up for twice: what is drawn equally often needs no more weight."""
    c = s.classify
    again = [f"logit_adjustment {c.logit_adjustment:g}"] * bool(c.logit_adjustment)
    again += [f"class_weights {c.class_weights}"] * (c.class_weights in ("balanced", "sqrt"))
    if s.task != "classify" or c.sampler != "balanced" or not again:
        return []
    both = " and ".join(again)
    return [
        f"sampler balanced draws all classes equally often: with {both} rare ones are made up for twice, and predicted "
        "too often"
    ]


def _check_schedule(s: TrainSettings) -> None:
    """Raise UserError for a schedule by which the rate is never what is asked for, however long the run."""
    if s.optim.sched == "tanh" and s.optim.warmup_epochs >= s.epochs:  # it warms up to its rate at the warm-up's end
        raise UserError(f"sched tanh needs a warm-up shorter than the run, got warmup_epochs {s.optim.warmup_epochs:g}")
    usual = (0, Optim().warmup_epochs)
    warms_up = s.origin_of("optim.warmup_epochs") != "default" and s.optim.warmup_epochs not in usual
    for name, given in (("layer_decay", s.optim.layer_decay is not None), ("warmup_epochs", warms_up)):
        if s.optim.sched == "none" and given and not _overruled(s, f"optim.{name}", ("optim.sched",)):
            raise UserError(f"{name} has no effect with sched none: give --sched constant")  # timm's schedules heed it
    if s.optim.sched == "multistep" and not s.optim.milestones:
        raise UserError("sched multistep needs milestones: --milestones 30 60")


def check_metric(s: TrainSettings, eval_metrics: tuple[str, ...]) -> None:
    """Raise UserError for a metric to choose the epoch by that isn't one of these."""
    if s.eval_metric is not None and s.eval_metric not in eval_metrics:
        raise UserError(f"eval_metric of {s.task} must be one of {', '.join(eval_metrics)}, got {s.eval_metric}")


def _check_ranges(s: TrainSettings) -> None:
    check_range(1, epochs=s.epochs, batch_size=s.batch_size, early_stop=s.early_stop, save_every=s.save_every)
    check_range(1, limit_batches=s.limit_batches, max_nonfinite=s.max_nonfinite)
    check_range(1, MAX_SIDE, img_size=s.img_size)
    check_range(1, MAX_CHANNELS, in_chans=s.in_chans)
    check_range(0, MAX_SEED, seed=s.seed)
    check_range(0, num_workers=s.num_workers)
    check_range(0, 1, val_fraction=s.val_fraction, drop_rate=s.drop_rate, drop_path_rate=s.drop_path_rate)
    o, a, d = s.optim, s.augment, s.detect
    check_range(1, accumulate=o.accumulate, lr_batch=o.lr_batch)
    check_range(0, weight_decay=o.weight_decay, momentum=o.momentum, clip_grad=o.clip_grad)
    check_range(0.01, 1, layer_decay=o.layer_decay)
    check_range(0, warmup_epochs=o.warmup_epochs, warmup_lr=o.warmup_lr, min_lr=o.min_lr, decay_rate=o.decay_rate)
    if o.decay_epochs is not None and not o.decay_epochs > 0:
        raise UserError(f"decay_epochs must be above 0, got {o.decay_epochs}")
    check_range(0, 1, hflip=a.hflip, vflip=a.vflip, reprob=a.reprob, mix_prob=a.mix_prob)
    check_range(0, mixup=a.mixup, cutmix=a.cutmix, color_jitter=a.color_jitter, degrees=a.degrees)
    for name, value in (("smoothing", a.smoothing), ("zoom", a.zoom)):
        if not 0 <= value < 1:
            raise UserError(f"{name} must be from 0 to below 1, got {value}")
    for name, (low, high), most in (("scale", a.scale, 1), ("ratio", a.ratio, math.inf)):
        if not 0 < low <= high <= most:
            limits = "above 0" if most == math.inf else f"above 0 and at most {most}"
            raise UserError(f"{name} must be two numbers {limits}, the smaller first, got {[low, high]}")
    check_range(0, MAX_SIDE, pad=a.pad)
    check_range(0, 1, min_score=d.min_score)
    check_range(0, 1, threshold=s.multilabel.threshold)
    check_range(0, 10, focal_gamma=s.classify.focal_gamma, logit_adjustment=s.classify.logit_adjustment)
    check_range(0, ema_warmup=s.ema.ema_warmup)
    check_range(1, MAX_SIDE, fpn_channels=d.fpn_channels, max_found=d.max_found, anchor_size=d.anchor_size)


def _check_sizes(sizes: list[int], ends: list[float]) -> None:
    if len(sizes) != len(ends):
        raise UserError(f"size_ends must have one entry for each of sizes, got {ends} for {sizes}")
    if any(size < 1 for size in sizes):
        raise UserError(f"sizes must be 1 or more, got {sizes}")
    if ends != sorted(set(ends)) or any(not 0 < end <= 1 for end in ends):
        raise UserError(f"size_ends must grow, from above 0 to at most 1, got {ends}")


def _check_cuda_graphs(s: TrainSettings, world: int) -> None:
    import torch  # takes seconds, which other checks needn't wait for

    if s.task == "detect":
        raise UserError("cuda_graphs is for all tasks but detect")
    if world > 1:
        raise UserError(f"cuda_graphs is for one process, got {world}")
    if s.grad_checkpointing:
        raise UserError("cuda_graphs and grad_checkpointing exclude each other: give one of them")
    if s.accelerator not in ("auto", "gpu", "cuda") or not torch.cuda.is_available():
        raise UserError(f"cuda_graphs needs a CUDA GPU, got accelerator {s.accelerator}")
