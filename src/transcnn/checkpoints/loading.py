"""Run directories, and models loaded from whatever names one.

A run directory holds ``config.yaml`` (every setting), ``metrics.csv`` (a row an epoch), TensorBoard events,
``last.ckpt`` (to go on from; ``previous.ckpt`` and ``checksums.sha256`` go with it), ``best.safetensors`` (to use),
``metrics.json``, ``report/``, ``skipped.csv`` where files could not be read, and ``faults.log`` where something else
went wrong.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.data import resolve_data_config
from torch import nn

from ..data.names import distinct_names, imagenet_names
from ..data.paths import same_path
from ..dense.build import build_network
from ..errors import UserError
from ..plugging.build import build_model
from .arguments import short
from .bounded import build_bounded, registered
from .files import atomic_write
from .folders import CONFIG, from_pretrained
from .header import check_header, read_values
from .published import load_checkpoint, sizes_of, torch_load, why_unreadable

__all__ = ["Loaded", "class_names_of", "data_config_of", "hint_at_run", "load", "save_weights"]

RUN_WEIGHTS = ("best.safetensors", "last.ckpt")  # of a run directory, what is used first


@dataclass
class Loaded:
    """A model ready for use.

    Attributes:
        model: In evaluation mode.
        task: ``classify``, ``multilabel``, ``regress``, ``segment`` or ``detect``.
        class_names: In the order of the outputs; equal ones get their index, ``crane (134)`` and ``crane (517)``.
        preprocessing: timm's data config (``input_size``, ``mean``, ``std``, ``interpolation``, ``crop_pct``, ...).
        source: Where it was read from.
        info: All that was stored beside the weights.
    """

    model: nn.Module
    task: str
    class_names: list[str]
    preprocessing: dict[str, Any]
    source: str
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.class_names = distinct_names(self.class_names)

    def resize_input(self, img_size: int | None) -> None:
        """Have images resized to another side than the network was trained at; None leaves it."""
        if img_size is not None:
            if img_size < 1:
                raise UserError(f"img_size must be 1 or more, got {img_size}")
            self.preprocessing["input_size"] = [self.preprocessing["input_size"][0], img_size, img_size]

    def learnt_from(self, data: str | None) -> bool:
        """Whether ``data`` is what the run was given to train on, as far as its name says."""
        trained = self.info.get("settings") or {}
        return "data" in trained and same_path(data, trained["data"])

    def table_of(self, data: str | None) -> dict[str, Any]:
        """Which columns of a table are what (:class:`~transcnn.settings.Table`), as in training.

        The folder of its files, its splits and groups are those of the table that was learnt from alone.
        """
        table = dict((self.info.get("task_args") or {}).get("table") or {})
        kept = table if self.learnt_from(data) else ("target", "file_column", "separator")
        return {name: table[name] for name in kept if name in table}


def data_config_of(model: nn.Module, in_chans: int, img_size: int | None = None) -> dict[str, Any]:
    """How images become the model's input, in timm's words, with plain lists and numbers."""
    config = resolve_data_config({"img_size": img_size, "in_chans": in_chans}, model=model)
    size = tuple(config["input_size"])[1:]
    if in_chans != 3 and len(config["mean"]) != in_chans:  # figures of ImageNet say nothing about other channels
        config |= {"mean": (0.5,) * in_chans, "std": (0.25,) * in_chans}
    config["input_size"] = (in_chans, *size)
    if max(size) <= 64:  # cutting a margin off small images loses what they show
        config["crop_pct"] = 1.0
    return {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}


def save_weights(path: Path, weights: nn.Module | Mapping[str, torch.Tensor], info: dict[str, Any]) -> None:
    """Weights (a module's, or a state dict) and what is needed to use them (``info``, as JSON in the header)."""
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    header = {key: json.dumps(value) for key, value in info.items()}

    def write(temporary: Path) -> None:
        try:
            save_file(tensors, temporary, metadata=header)
        except SafetensorError as error:
            raise OSError(str(error)) from error

    atomic_write(path, write)


def load(source: str | os.PathLike[str], model: str | None = None) -> Loaded:
    """The model that a run directory, a .safetensors or .ckpt of ours, or the name of published weights stands for.

    A folder that ``save_pretrained`` wrote is one as well, and ``hf-hub:USER/NAME``, a repository on the hub.

    Args:
        source: One of these.
        model: The classifier that a file is for which doesn't say so itself, such as the authors' .pth files.

    Raises:
        UserError: There is no such thing, it is damaged, or its weights don't fit.
    """
    path = Path(source)
    if path.is_dir() and model is not None:
        raise UserError(f"model is for a file of weights that doesn't name its network; {path} does")
    if path.is_dir():
        if (path / CONFIG).is_file():
            return _load_pretrained(path)
        found = [path / name for name in RUN_WEIGHTS if (path / name).is_file()]
        if not found:
            wanted = " nor ".join(RUN_WEIGHTS)
            raise UserError(f"{path} is no run directory: it holds neither {wanted}{hint_at_run(path)}")
        path = found[0]
    if path.is_file():
        return _load_file(path, model)
    name = os.fspath(source)
    if model is not None:
        raise UserError(f"model is for a file of weights that doesn't name its network; got no such file: {name}")
    scheme, _, rest = name.partition(":")
    if scheme in ("hf-hub", "local-dir"):
        return _load_pretrained(rest)
    if os.sep in name or path.suffix in (".safetensors", ".ckpt", ".pth", ".pt"):
        raise UserError(f"no such file or directory: {name}")
    if not timm.is_model(name.split(".")[0]):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.7)
        hint = f"; near names of models: {', '.join(near)}" if near else ""
        raise UserError(f"there is no file or folder {name}, and no model of that name{hint}")
    return _load_published(name)


def read_info(path: Path) -> dict[str, Any]:
    """What was stored beside the weights of a file of ours; empty for files of others."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
            return read_values({key: value for key, value in metadata.items() if key != "format"})
        checkpoint = torch_load(path, mmap=True)
        info = checkpoint.get("transcnn", {}) if isinstance(checkpoint, dict) else {}
        return info if isinstance(info, dict) else {}
    except (json.JSONDecodeError, AttributeError):
        return {}
    except Exception as error:  # damaged files fail in many ways; torch's refusal of code has a long text
        raise UserError(f"can't read {path}: {why_unreadable(error)}") from error


def hint_at_run(folder: Path) -> str:
    """For the end of a message about a folder that is no run's: the newest run in it, if there is one."""
    runs = [file.parent for name in RUN_WEIGHTS for file in folder.glob(f"*/{name}")]
    newest = max(runs, key=lambda run: run.stat().st_mtime, default=None)
    return "" if newest is None else f"; did you mean {newest}?"


def _load_file(path: Path, model_name: str | None) -> Loaded:
    info = read_info(path)
    if not info.get("model"):
        if model_name is None:
            raise UserError(f"{path} doesn't say which model it is for; give its name, such as --model transcnn_tiny")
        return _load_bare(path, model_name)
    if model_name not in (None, info["model"]):
        raise UserError(f"{path} is for {short(info['model'])}, got model={model_name}")
    check_header(info, path)
    name = registered(info["model"], info.get("model_args") or {}, path)
    config = info["data_config"]
    names = info["class_names"]
    task = info.get("task", "classify")
    args = {"num_classes": len(names), "in_chans": config["input_size"][0], **(info.get("model_args") or {})}
    model = build_bounded(partial(build_network, task, name, info.get("task_args"), **args), path)
    load_checkpoint(model, path, new_head=False)
    return Loaded(model.eval(), task, names, config, str(path), info)


def _load_bare(path: Path, name: str) -> Loaded:
    """A classifier's weights that come without a header, as the authors publish theirs."""
    with torch.device("meta"):
        trial = build_model(name)
    classes, in_chans = sizes_of(trial, path)
    model = build_bounded(partial(build_model, name, num_classes=classes, in_chans=in_chans), path)
    model = load_checkpoint(model, path, new_head=False).eval()
    config = data_config_of(model, in_chans)
    return Loaded(model, "classify", class_names_of(model), config, str(path), {"model": name})


def _load_pretrained(source: str | os.PathLike[str]) -> Loaded:
    """A folder that ``save_pretrained`` wrote, or a repository on the hub."""
    model = from_pretrained(source)
    cfg: Any = model.pretrained_cfg
    config = data_config_of(model, int(model.in_chans))  # pyright: ignore
    if ends := cfg.get("pixel_range"):  # which timm's config knows nothing of
        config["pixel_range"] = [list(pair) if isinstance(pair, list | tuple) else pair for pair in ends]
    info = {"model": cfg["architecture"], "task_args": cfg.get("task_args") or {}}
    task = cfg.get("task") or "classify"
    return Loaded(model, task, class_names_of(model), config, os.fspath(source), info)


def _load_published(name: str) -> Loaded:
    model = build_model(name, pretrained=True).eval()
    config = data_config_of(model, int(getattr(model, "in_chans", 3)))
    return Loaded(model, "classify", class_names_of(model), config, name, {"model": name})


def class_names_of(model: nn.Module) -> list[str]:
    """The names of a classifier's outputs: those of its pretrained_cfg, else ImageNet's for 1000, else numbers."""
    classes = int(model.num_classes)  # pyright: ignore
    names: list[str] = list((getattr(model, "pretrained_cfg", None) or {}).get("label_names") or ())
    if len(names) == classes:
        return names
    return imagenet_names() if classes == 1000 else [str(i) for i in range(classes)]
