"""From a run's settings to its network, and to what learns with it."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from timm.models import get_pretrained_cfg

from ..checkpoints.arguments import check_model_args, check_plug, short
from ..checkpoints.bounded import build_bounded, own_arguments, registered
from ..checkpoints.folders import CONFIG, WEIGHTS, stored_class_names
from ..checkpoints.header import check_class_names, refused
from ..checkpoints.loading import data_config_of, load, read_info
from ..checkpoints.published import Classes, load_body, load_checkpoint
from ..data.sources.source import abbreviate
from ..dense.build import build_network
from ..distributed.processes import rank, world
from ..errors import UserError
from ..plain import check_plain
from ..plugging.build import source_of_weights
from ..plugging.plug import plug as plug_in
from ..plugging.plug import plug_like, plug_spec
from ..settings import TrainSettings
from ..tasks import get_task
from ..tasks.base import Task
from ..tasks.distill import Teacher
from ..text import printable
from .freezing import freeze
from .levels import LEVELS, choose_levels

__all__ = ["make_learner", "make_network", "published_start"]


def make_learner(
    s: TrainSettings, splits: Any, network: torch.nn.Module, config: dict[str, Any], task_args: dict[str, Any]
) -> Task:
    """The task around the network, with its optimizer's settings and its teacher."""
    augment, optim = s.augment, s.optim
    learner = get_task(s.task)(
        network,
        splits.class_names,
        config,
        lr=s.lr * s.batch_size * optim.accumulate / (optim.lr_batch or s.batch_size * optim.accumulate),
        epochs=s.epochs,
        optim=optim,
        augment=augment,
        seed=s.seed,
        channels_last=s.channels_last,
        cuda_graphs=s.cuda_graphs,
        optimize=s.optimize,
        task_args=task_args,
    )
    if s.freeze:
        backbone: Any = network if learner.whole_image else network.body
        learner.frozen = freeze(network, backbone, s.freeze)
    if s.distill.distill_from:
        learner.learn_from(Teacher(s.distill, splits.class_names, config, s.augment.sizes or ()))  # pyright: ignore
    batches = min(max(1, len(splits.train) // s.batch_size), s.limit_batches or sys.maxsize)
    learner.updates_per_epoch = -(-batches // optim.accumulate)
    return learner


def make_network(
    s: TrainSettings, splits: Any, task_args: dict[str, Any], resumed: Path | None = None
) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The network, and the arguments that make it again; of a run that goes on, that of its checkpoint's header."""
    if resumed:
        network, args = _made_again(s, splits, task_args, resumed)
    else:
        network, args = _made_new(s, splits, task_args)
    if s.grad_checkpointing:
        try:
            network.set_grad_checkpointing(True)  # pyright: ignore
        except (AttributeError, AssertionError, NotImplementedError) as error:  # timm's that have none
            raise UserError(f"{s.model} has no gradient checkpointing: leave grad_checkpointing out") from error
    if world() > 1 and torch.cuda.is_available() and s.accelerator != "cpu":
        # timm's: PyTorch's would drop the activations that some norms hold. On CPUs there is none.
        network = convert_sync_batchnorm(network)
    return network, args


def _made_again(
    s: TrainSettings, splits: Any, task_args: dict[str, Any], resumed: Path
) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Weights follow from the checkpoint, so nothing is downloaded nor read from where the run began."""
    args = read_info(resumed).get("model_args") or {}
    name = registered(s.model, args, resumed)
    sizes = {"num_classes": len(splits.class_names), "in_chans": splits.in_chans}
    every = {**sizes, **args, **_drop_path(s)}
    return build_bounded(partial(build_network, s.task, name, task_args, **every), resumed), args


def _made_new(s: TrainSettings, splits: Any, task_args: dict[str, Any]) -> tuple[torch.nn.Module, dict[str, Any]]:
    args = dict(s.model_args or {})
    if s.drop_rate is not None:
        args["drop_rate"] = s.drop_rate
    _settle_sizes(s, splits, args)
    given = args.pop("plug", None)
    try:
        check_model_args(args, own_arguments(s.model))  # what no file may hold could not be loaded again
    except ValueError as error:
        raise UserError(str(error)) from error
    start = _find_weights(s.init_from) if s.init_from else None
    info = _info_of(start) if start else {}
    if info.get("model") == s.model:
        for level in {*LEVELS} & {*(info.get("model_args") or {})}:  # further levels have weights of their own
            args.setdefault(level, info["model_args"][level])
        _say_other_arguments(s, start, info.get("model_args") or {}, args)
    if seen := get_task(s.task).largest_size(splits, task_args):
        fixed = s.pretrained or start is not None
        choose_levels(s.model, args, seen, fixed=fixed, quiet=s.quiet or rank() > 0)
    network = build_network(
        s.task,
        s.model,
        task_args,
        pretrained=s.pretrained,
        num_classes=len(splits.class_names),
        in_chans=splits.in_chans,
        **{**args, **_drop_path(s)},
    )
    if s.pretrained and not s.quiet and rank() == 0:
        print(published_start(s, len(splits.class_names)), file=sys.stderr)
    # What is plugged, and what a classifier's weights are for.
    host: torch.nn.Module = network if get_task(s.task).whole_image else network.body  # pyright: ignore
    held = (info.get("model_args") or {}).get("plug")
    whole = host is network or _kind(info.get("task"), info.get("task_args")) == _kind(s.task, task_args)
    if start and not held:
        _take(s, network if whole else host, start, whole, info.get("class_names") or [], splits.class_names)
    if where := s.plug or given or held:
        if isinstance(where, str):
            size = data_config_of(network, splits.in_chans, s.img_size)["input_size"]
            plug_in(host, where, example=torch.zeros(1, *size))
        else:
            plug_like(host, where)
        args["plug"] = plug_spec(host)
    if start and held:
        _take(s, network if whole else host, start, whole, info.get("class_names") or [], splits.class_names)
    return network, args


def _settle_sizes(s: TrainSettings, splits: Any, args: dict[str, Any]) -> None:
    """See that arguments of the network agree with data and settings, and give its size to one made for one alone."""
    for name, known in (("num_classes", len(splits.class_names)), ("in_chans", splits.in_chans)):
        if (given := args.pop(name, known)) != known:
            raise UserError(f"model_args: {name} is {given}, for the data it is {known}")
    cfg = get_pretrained_cfg(s.model)
    if not get_task(s.task).whole_image or cfg is None or not cfg.fixed_input_size:
        return
    own = args.get("img_size", s.img_size)
    if not isinstance(own, int | None) or (s.img_size or own) != own:
        raise UserError(f"model_args: img_size is {own}; to train, give --img_size, one number")
    if s.augment.sizes:
        raise UserError(f"sizes: {s.model} takes images of one size alone")
    if own is not None and own != cfg.input_size[-1]:
        args["img_size"] = own


def published_start(s: TrainSettings, classes: int) -> str:
    """Which published weights training starts from, and what of the network they are not for."""
    cfg = get_pretrained_cfg(s.model)
    assert cfg is not None
    name = f"{s.model}.{cfg.tag}" if cfg.tag and "." not in s.model else s.model
    if not get_task(s.task).whole_image:
        rest = "they are the backbone's, all else starts anew"
    elif classes == cfg.num_classes:
        rest = f"the head of {classes} classes included"
    else:
        rest = f"the head for {classes} outputs starts anew"
    return f"{name}: weights of {cfg.num_classes} classes from {source_of_weights(s.model)}; {rest}"


def _drop_path(s: TrainSettings) -> dict[str, float]:
    """Stochastic depth, which is for training alone: files don't hold it."""
    return {"drop_path_rate": s.drop_path_rate} if s.drop_path_rate else {}


def _take(
    s: TrainSettings, part: torch.nn.Module, weights: Path, whole: bool, theirs: list[str], ours: list[str]
) -> None:
    """Load a file's weights into the network, or into its backbone alone and say so; ``theirs`` are its classes."""
    if whole:
        load_checkpoint(part, weights, classes=Classes(theirs, ours) if theirs else None)
        return
    count, unused = load_body(part, weights)
    if not s.quiet:
        rest = f", not taken: {abbreviate(unused)}" if unused else ""
        print(printable(f"backbone: {count} tensors of {weights}; all else starts anew{rest}"), file=sys.stderr)


def _info_of(weights: Path) -> dict[str, Any]:
    """What a file of ours says of its network; of a folder's weights its classes; nothing for files of others."""
    if weights.name == WEIGHTS and (weights.parent / CONFIG).is_file():
        names = stored_class_names(weights.parent)
        return {"class_names": names} if names else {}
    info = read_info(weights) if weights.suffix in (".safetensors", ".ckpt") and weights.is_file() else {}
    with refused(weights):
        check_plain(info, "the header")
        for key in ("model_args", "task_args"):
            if not isinstance(info.get(key) or {}, dict):
                raise ValueError(f"{key} must be names with values")
        if "class_names" in info:
            check_class_names(info["class_names"])
        if held := (info.get("model_args") or {}).get("plug"):
            check_plug(held)
    return info


def _say_other_arguments(s: TrainSettings, start: Path | None, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Tell of arguments that the network of a file's weights was made with and this one isn't; weights may still fit.

    Sizes of the data, what is plugged and what is for training alone are each run's own.
    """
    own = ("plug", "num_classes", "in_chans", "img_size")
    other = {k: v for k, v in theirs.items() if k not in own and not k.endswith("_rate") and ours.get(k) != v}
    if other and not s.quiet and rank() == 0:
        words = ", ".join(f"{short(name)}: {short(value)}" for name, value in other.items())
        print(
            f"{s.model}: the weights of {printable(start)} are those of a network with {{{words}}}, which this one is "
            "made without (--model_args gives them)",
            file=sys.stderr,
        )


def _kind(task: str | None, task_args: dict[str, Any] | None) -> tuple[str, str]:
    """What is on top of a network's backbone; published weights are classifiers'."""
    args = task_args or {}
    return task or "classify", args.get("decoder") or args.get("detector") or ""


def _find_weights(source: str) -> Path:
    path = Path(source)
    if (path / CONFIG).is_file():
        return path / WEIGHTS
    if not path.exists() and get_pretrained_cfg(source) is not None:
        raise UserError(
            f"init_from is a file or a run's directory; the published weights: --model {source} --pretrained"
        )
    return Path(load(path).source) if path.is_dir() else path
