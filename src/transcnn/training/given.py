"""What a run was asked for: settings as plain values, checked, kept with the run, and those of a run that goes on."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, is_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml

from ..checkpoints.bounded import registered
from ..checkpoints.files import remove_stale_temporaries
from ..checkpoints.header import check_settings, check_stored
from ..checkpoints.loading import read_info
from ..distributed.processes import attempt
from ..errors import UserError
from .checkpointing import LAST, PREVIOUS, newest_good, note
from .run_dir import made_by_this_launch

__all__ = ["as_yaml", "check", "find_resumed", "find_start", "plain", "resumed_settings"]

# What a resumed run may have otherwise than the run it goes on with; all else decides what is learnt.
FREE = {"data", "resume", "out", "epochs", "num_workers", "early_stop", "save_every", "accelerator", "quiet"}
FREE |= {"nonfinite", "max_nonfinite", "cuda_graphs"}
# And of these what the earlier run had says nothing: they are about here and now.
PRESENT = {"resume", "out", "devices", "num_nodes", "strategy", "cuda_graphs"}


def plain(value: Any) -> Any:
    """Dataclasses and tuples as what YAML and a checkpoint can hold."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def find_start(resume: str | None, out: str | None) -> Path | None:
    """The checkpoint that a run begins from, if there is one.

    It is what ``--resume`` names. Processes that torchrun has restarted go on from what their own run had written.
    """
    if resume:
        return find_resumed(resume)
    if not attempt() or out is None or not made_by_this_launch(Path(out)):
        return None
    return find_resumed(out) if any((Path(out) / name).is_file() for name in (LAST, PREVIOUS)) else None


def find_resumed(resume: str) -> Path:
    """The checkpoint that ``--resume`` means; of a run directory, the newest that is whole."""
    path = Path(resume)
    if path.is_file() and path.name != "last.ckpt":
        return path
    path, remark = newest_good(path.parent if path.is_file() else path)
    remove_stale_temporaries(path.parent)
    if remark:
        note(path.parent, remark)
        print(f"transcnn: {remark}", file=sys.stderr)
    return path


def resumed_settings(given: dict[str, Any], defaults: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """The settings of the run that goes on; of the given ones only those of ``FREE`` can change them."""
    info = read_info(checkpoint)
    saved = info.get("settings")
    if not saved:
        raise UserError(f"{checkpoint} was not written by transcnn train; to start from its weights use --init_from")
    check_stored(info, checkpoint)
    registered(info.get("model"), info.get("model_args") or {}, checkpoint)
    settings = check_settings(saved, defaults, checkpoint)
    for name, value in given.items():
        if value == defaults[name] or value == settings[name] or name in PRESENT:
            continue
        if name not in FREE:
            raise UserError(f"a resumed run keeps its settings: {name} is {settings[name]} there, got {value}")
        settings[name] = value
    return {**settings, **{name: given[name] for name in PRESENT}}


def check(s: SimpleNamespace, eval_metrics: tuple[str, ...], world: int = 1) -> None:
    """Raise UserError for what can't be meant; ``eval_metrics`` are the metrics that may choose the best epoch."""
    if s.eval_metric is not None and s.eval_metric not in eval_metrics:
        raise UserError(f"eval_metric of {s.task} must be one of {', '.join(eval_metrics)}, got {s.eval_metric}")
    for name, value, least in (
        ("epochs", s.epochs, 1),
        ("batch_size", s.batch_size, 1),
        ("img_size", s.img_size, 1),
        ("accumulate", s.optim["accumulate"], 1),
        ("early_stop", s.early_stop, 1),
        ("save_every", s.save_every, 1),
        ("limit_batches", s.limit_batches, 1),
        ("max_nonfinite", s.max_nonfinite, 1),
    ):
        if value is not None and value < least:
            raise UserError(f"{name} must be {least} or more, got {value}")
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
    for name in ("smoothing", "mix_prob"):
        if not 0 <= s.augment[name] <= 1:
            raise UserError(f"{name} must be from 0 to 1, got {s.augment[name]}")
    _check_sizes(s.augment.get("sizes") or [], s.augment.get("size_ends") or [])


def _check_sizes(sizes: list[int], ends: list[float]) -> None:
    if len(sizes) != len(ends):
        raise UserError(f"size_ends must have one entry for each of sizes, got {ends} for {sizes}")
    if any(size < 1 for size in sizes):
        raise UserError(f"sizes must be 1 or more, got {sizes}")
    if ends != sorted(set(ends)) or any(not 0 < end <= 1 for end in ends):
        raise UserError(f"size_ends must grow, from above 0 to at most 1, got {ends}")


def _check_cuda_graphs(s: SimpleNamespace, world: int) -> None:
    if s.task == "detect":
        raise UserError("cuda_graphs is for the tasks classify and segment, got detect")
    if world > 1:
        raise UserError(f"cuda_graphs is for one process, got {world}")
    if s.grad_checkpointing:
        raise UserError("cuda_graphs and grad_checkpointing exclude each other: give one of them")
    if s.accelerator not in ("auto", "gpu", "cuda") or not torch.cuda.is_available():
        raise UserError(f"cuda_graphs needs a CUDA GPU, got accelerator {s.accelerator}")


def as_yaml(s: SimpleNamespace) -> str:
    """The settings as ``config.yaml`` holds them, to be given to ``--config``."""
    return yaml.safe_dump(vars(s), sort_keys=False, allow_unicode=True)
