"""Scores of a trained network on one split of a data set, and the files that hold them."""

from __future__ import annotations

import importlib.metadata
import math
import platform
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch

from ..checkpoints.files import atomic_write
from ..checkpoints.loading import Loaded
from ..data.sets.fault_tolerant import write_skipped
from ..data.sources.source import abbreviate
from ..distributed.processes import placement, rank, world
from ..distributed.runtime import choose_precision
from ..tasks import get_task
from ..tasks.base import Task
from ..text import json_text, printable
from .progress import EvalBar

__all__ = ["measure", "say_what_is_off", "versions", "write_results"]


def measure(
    loaded: Loaded,
    part: Any,
    *,
    batch_size: int,
    num_workers: int | None = None,
    precision: str = "32",
    accelerator: str = "auto",
    optimize: bool = True,
    limit: int | None = None,
    bar: bool = False,
) -> tuple[Task, dict[str, Any], Any]:
    """The task that counted, a model's scores on one split of a data set, and the split as the network saw it.

    They are ``Task.scores``, and ``seconds``, ``precision`` (Lightning's word), ``device`` and ``path``, which is
    ``optimized`` or ``plain``.

    With ``optimize`` a larger split is scored by the network as ``fast.optimize`` makes it. ``bar`` shows how far it
    is, where standard error is a terminal. ``num_workers`` processes read images, without it threads of this one.
    """
    task_args = loaded.info.get("task_args") or {}
    learner = get_task(loaded.task)(
        loaded.model, loaded.class_names, loaded.preprocessing, optimize=optimize, task_args=task_args
    )
    settings = {"batch_size": batch_size, "num_workers": num_workers, "rank": rank(), "world_size": world()}
    loader = learner.split_loader(part, loaded.preprocessing, task_args, **settings)
    trainer = L.Trainer(
        **placement(accelerator),
        callbacks=[EvalBar()] if bar else None,
        precision=choose_precision(precision, accelerator),  # pyright: ignore
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        limit_test_batches=limit,
    )
    began = time.monotonic()
    trainer.test(learner, loader, verbose=False)
    computed = {"precision": str(trainer.precision), "device": trainer.strategy.root_device.type}
    computed["path"] = learner.path
    scores = {**learner.test_scores, "seconds": time.monotonic() - began, **computed}
    return learner, scores, loader.dataset


def write_results(
    folder: Path,
    learner: Task,
    scores: dict[str, Any],
    part: Any,
    metrics: dict[str, Any],
    broken: list[tuple[str, str]],
    *,
    report: bool = True,
) -> None:
    """``metrics.json``, ``skipped.csv`` where files could not be read, and the report."""
    metrics["skipped"] = len(broken)
    metrics["versions"] = versions()
    text = json_text(_as_json(metrics), indent=2) + "\n"
    atomic_write(folder / "metrics.json", lambda path: path.write_text(text, encoding="utf-8"))
    (folder / "skipped.csv").unlink(missing_ok=True)  # of an earlier evaluation
    if broken:
        atomic_write(folder / "skipped.csv", lambda path: write_skipped(path, broken))
    if report:
        learner.write_report(folder, scores, part, metrics)


def _as_json(value: Any) -> Any:
    """The same with None for numbers that JSON hasn't: the loss of a network that has diverged is NaN."""
    if isinstance(value, dict):
        return {key: _as_json(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_as_json(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def say_what_is_off(learner: Task, scores: dict[str, Any], broken: list[tuple[str, str]], folder: Path | None) -> None:
    """A line on standard error for each thing that looks wrong about scores, and one for files that weren't read."""
    for warning in learner.warnings_about(scores):
        print(f"transcnn: {printable(warning)}", file=sys.stderr)
    if broken:
        files = f"{len(broken)} files" if len(broken) > 1 else "1 file"
        where = f" (see {folder / 'skipped.csv'})" if folder is not None else ""
        names = abbreviate([name for name, _ in broken])
        print(f"transcnn: {files} could not be read: {printable(names)}{printable(where)}", file=sys.stderr)


def versions() -> dict[str, str]:
    """What the figures were made with."""
    names = ("transcnn", "torch", "torchvision", "timm", "lightning")
    found = {name: importlib.metadata.version(name) for name in names}
    return {"python": platform.python_version(), **found, "device": _device()}


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return str(torch.cpu.get_capabilities().get("cpu_name", platform.machine()))
