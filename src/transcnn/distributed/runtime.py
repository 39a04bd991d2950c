"""The machine around a run: arithmetic, memory, and libraries that talk too much."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from ..errors import UserError

__all__ = ["PRECISIONS", "choose_precision", "keep_freed_memory", "lasting_output", "quiet_libraries"]


PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}  # ours and Lightning's words


def check_accelerator(accelerator: str) -> None:
    """Raise UserError for an accelerator that there isn't, by its name or on this machine."""
    if accelerator not in ("auto", "cpu", "gpu", "cuda"):
        raise UserError(f"accelerator must be one of auto, cpu, gpu, got {accelerator}")
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError(f"accelerator is {accelerator}, but PyTorch sees no GPU here; give cpu or auto")


def choose_precision(precision: str, accelerator: str = "auto") -> str:
    """Lightning's word for ``32``, ``bf16``, ``16`` or ``auto`` (bf16 where the CPU has instructions for it)."""
    gpu = torch.cuda.is_available() and accelerator != "cpu"
    if precision == "auto":
        fast = torch.cuda.is_bf16_supported(including_emulation=False) if gpu else _cpu_has_bf16()
        precision = "bf16" if fast else "32"
    if precision == "16" and not gpu:
        raise UserError("precision 16 needs a GPU; on this machine use bf16 or 32")
    if precision not in PRECISIONS:
        raise UserError(f"precision must be one of auto, {', '.join(PRECISIONS)}, got {precision}")
    return PRECISIONS[precision]


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


class _Lasting:
    """A text stream whose output is dropped from the first time on that it can't be written."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._drop()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._drop()

    def _drop(self) -> None:
        """Have the file descriptor lead nowhere: what is left in buffers goes there, when the process ends too."""
        with suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextmanager
def lasting_output() -> Iterator[None]:
    """Let work go on where its output can't be written any more: a closed pipe or terminal, a full disk."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_Lasting, streams)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = streams
