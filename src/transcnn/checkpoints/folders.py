"""Networks in timm's folders: ``config.json`` and ``model.safetensors``, from this machine or from the hub.

timm's own loader trusts ``config.json``, which can name files and addresses and any argument of a network. Here a
folder gives a network of timm's registry, arguments that shape it, the names of its classes, and how images are made.
"""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import timm
from torch import nn

from ..errors import UserError, first_line
from ..plain import check_plain
from ..plugging.build import build_model
from .arguments import DENSE, TASKS, check_plug, check_task_args, short
from .bounded import build_bounded, registered
from .header import MAX_CLASSES, check_class_names, check_data_config, refused
from .published import load_body, load_checkpoint

__all__ = ["CONFIG", "WEIGHTS", "from_pretrained", "stored_class_names"]

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
MAX_CONFIG = 16 << 20  # bytes of a config.json
# How images become input, where a folder doesn't say so; and what of its pretrained_cfg is heeded.
STANDARD = {
    "input_size": [3, 224, 224],
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "interpolation": "bicubic",
    "crop_pct": 0.875,
}
KEPT = (*STANDARD, "crop_mode", "fixed_input_size", "pixel_range")


def from_pretrained(source: str | os.PathLike[str], **kwargs: Any) -> nn.Module:
    """The network of a folder that :func:`save_pretrained` wrote, or of a repository on the hub, for evaluation.

    Its ``pretrained_cfg`` holds ``label_names`` and how images are made.

    Args:
        source: A folder, or ``user/name`` on the hub.
        kwargs: Changes for ``timm.create_model``, such as ``num_classes`` (a fresh head) or ``features_only``.

    Raises:
        UserError: Neither a folder nor a repository, or one without a network in timm's layout.
    """
    folder = _find(source)
    config = _read_config(folder)
    weights = folder / WEIGHTS
    make = partial(_make, config)
    model = build_bounded(make, weights)
    if kwargs:  # the caller's changes may make it larger than its weights
        model = make(**kwargs)
    if kwargs.get("features_only"):
        load_body(model, weights)
    else:
        load_checkpoint(model, weights, new_head="num_classes" in kwargs)
    return model.eval()


def _make(config: dict[str, Any], **kwargs: Any) -> nn.Module:
    """The network of a checked ``config.json``, with fresh weights."""
    stored = config.get("pretrained_cfg") or {}
    args = {"num_classes": _classes_of(config), **(config.get("model_args") or {})}
    name = config["architecture"]
    if "input_size" in stored:
        args.setdefault("in_chans", stored["input_size"][0])
        if getattr(timm.models.get_pretrained_cfg(name), "fixed_input_size", False) and "img_size" not in args:
            args["img_size"] = stored["input_size"][1:]
    model = build_model(name, config.get("plug"), **{**args, **kwargs})
    kept = {key: value for key, value in stored.items() if key in KEPT}
    names = config.get("label_names")
    if "num_classes" in kwargs and kwargs["num_classes"] != args["num_classes"]:
        names = None
    cfg: Any = getattr(model, "pretrained_cfg", {})
    told = {key: config.get(key) for key in ("task", "task_args")}
    for key, value in {**kept, "label_names": names, **told}.items():
        if value is not None:
            cfg[key] = tuple(value) if isinstance(value, list) else value
    return model


def _find(source: str | os.PathLike[str]) -> Path:
    if Path(source).is_dir():
        return Path(source)
    name = os.fspath(source)
    from huggingface_hub import snapshot_download  # takes time to import

    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS]))
    except Exception as error:  # the hub's own, and those of the network and the disk on the way from it
        reason = first_line(error)
        raise UserError(f"{name} is no folder, and the hub doesn't give it: {reason}") from error


def _read_config(folder: Path) -> dict[str, Any]:
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder} is no folder of save_pretrained: it holds no {name}")
    path = folder / CONFIG
    try:
        if path.stat().st_size > MAX_CONFIG:
            raise UserError(f"{path} has {path.stat().st_size:,} bytes, which no description of a network has")
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config["architecture"], str):
            raise TypeError("a network's name is a text")
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} doesn't name a network of timm") from error
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror or error}") from error
    with refused(path):
        _check_config(config)
    return {**config, "architecture": registered(config["architecture"], config.get("model_args") or {}, path)}


def _check_config(config: dict[str, Any]) -> None:
    """Raise ValueError or the like for what can't be meant, before anything is made of it."""
    check_plain(config, "config")
    stored = config.setdefault("pretrained_cfg", dict(config))  # of old, all stood outside
    if not isinstance(stored, dict):
        raise ValueError(f"pretrained_cfg must be names with values, got {short(stored)}")
    config["label_names"] = names = config.get("label_names") or stored.get("label_names")
    classes = _classes_of(config)
    if names is not None:
        check_class_names(names)
        if len(names) != classes:
            raise ValueError(f"{len(names)} label_names for {classes} classes")
    task, task_args = config.get("task") or "classify", config.get("task_args") or {}
    if task not in TASKS or task in DENSE:
        raise ValueError(f"there is no task {short(task)} for such a folder")
    if not isinstance(task_args, dict):
        raise ValueError(f"task_args must be names with values, got {short(task_args)}")
    check_task_args(task, task_args, classes)
    if config.get("plug") is not None:
        check_plug(config["plug"])
    stored.update({key: value for key, value in STANDARD.items() if stored.get(key) is None})
    check_data_config(stored)
    if not isinstance(stored.get("fixed_input_size", False), bool):
        raise ValueError(f"fixed_input_size must be true or false, got {short(stored['fixed_input_size'])}")
    args = config.get("model_args") or {}
    channels = stored["input_size"][0]
    if isinstance(args, dict) and args.get("in_chans", channels) != channels:
        raise ValueError(f"model_args: in_chans is {short(args['in_chans'])}, input_size has {channels} channels")


def _classes_of(config: dict[str, Any]) -> int:
    found = [config.get("num_classes"), config["pretrained_cfg"].get("num_classes")]
    classes = next((value for value in found if value is not None), 1000)
    if isinstance(classes, bool) or not isinstance(classes, int) or not 0 <= classes <= MAX_CLASSES:
        raise ValueError(f"num_classes must be from 0 to {MAX_CLASSES:,}, got {short(classes)}")
    return classes


def stored_class_names(folder: Path) -> list[str]:
    """The names of the classes of a folder's weights; none if it doesn't say."""
    return list(_read_config(folder)["label_names"] or ())
