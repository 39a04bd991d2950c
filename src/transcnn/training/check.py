"""Settings that can't be meant, told before anything is built."""

from __future__ import annotations

import os

import torch

from ..errors import UserError
from ..settings import TrainSettings

__all__ = ["check"]


def check(s: TrainSettings, eval_metrics: tuple[str, ...], world: int = 1) -> None:
    """Raise UserError for what can't be meant; ``eval_metrics`` are the metrics that may choose the best epoch."""
    if s.eval_metric is not None and s.eval_metric not in eval_metrics:
        raise UserError(f"eval_metric of {s.task} must be one of {', '.join(eval_metrics)}, got {s.eval_metric}")
    for name, value, least in (
        ("epochs", s.epochs, 1),
        ("batch_size", s.batch_size, 1),
        ("img_size", s.img_size, 1),
        ("accumulate", s.optim.accumulate, 1),
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
        if not 0 <= (value := getattr(s.augment, name)) <= 1:
            raise UserError(f"{name} must be from 0 to 1, got {value}")
    _check_sizes(s.augment.sizes or [], s.augment.size_ends or [])


def _check_sizes(sizes: list[int], ends: list[float]) -> None:
    if len(sizes) != len(ends):
        raise UserError(f"size_ends must have one entry for each of sizes, got {ends} for {sizes}")
    if any(size < 1 for size in sizes):
        raise UserError(f"sizes must be 1 or more, got {sizes}")
    if ends != sorted(set(ends)) or any(not 0 < end <= 1 for end in ends):
        raise UserError(f"size_ends must grow, from above 0 to at most 1, got {ends}")


def _check_cuda_graphs(s: TrainSettings, world: int) -> None:
    if s.task == "detect":
        raise UserError("cuda_graphs is for the tasks classify and segment, got detect")
    if world > 1:
        raise UserError(f"cuda_graphs is for one process, got {world}")
    if s.grad_checkpointing:
        raise UserError("cuda_graphs and grad_checkpointing exclude each other: give one of them")
    if s.accelerator not in ("auto", "gpu", "cuda") or not torch.cuda.is_available():
        raise UserError(f"cuda_graphs needs a CUDA GPU, got accelerator {s.accelerator}")
