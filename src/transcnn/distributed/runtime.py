"""The machine around a run: arithmetic, memory, and libraries that talk too much."""

from __future__ import annotations

import ctypes
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import UserError

__all__ = ["choose_precision", "keep_freed_memory", "quiet_libraries"]


def choose_precision(precision: str, accelerator: str = "auto") -> str:
    """Lightning's word for ``32``, ``bf16``, ``16`` or ``auto`` (bf16 where the processor has instructions for it)."""
    gpu = torch.cuda.is_available() and accelerator != "cpu"
    if precision == "auto":
        fast = torch.cuda.is_bf16_supported(including_emulation=False) if gpu else _cpu_has_bf16()
        precision = "bf16" if fast else "32"
    if precision == "16" and not gpu:
        raise UserError("precision 16 needs a GPU; on this machine use bf16 or 32")
    words = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}
    if precision not in words:
        raise UserError(f"precision must be one of auto, {', '.join(words)}, got {precision}")
    return words[precision]


def _cpu_has_bf16() -> bool:
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16") or has.get("bf16"))


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next step instead of giving it back to the system.

    A step allocates and frees the same large tensors each time. By default glibc maps those above 128 KiB to 32 MiB
    afresh and unmaps them when freed, and each page is then zeroed by the kernel at its first use again. Elsewhere
    than on Linux with glibc this does nothing.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from malloc.h
    mallopt(M_MMAP_THRESHOLD, 32 << 20)  # the largest value allowed
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep from the user what Lightning says about itself, and warnings that are no concern of theirs."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for message in (
                ".*does not have many workers.*",  # images in memory need none
                ".*number of training batches.*smaller than the logging interval.*",
                ".*LeafSpec.*",  # Lightning's own code
                ".*no `val_dataloader`.*",  # a dry run
                ".*sync_dist=True.*",  # scores are those of all processes already
                ".*Checkpoint directory.*exists and is not empty.*",
            ):
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
