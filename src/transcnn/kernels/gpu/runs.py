"""Where the kernels for GPUs run, and which of several ways to compute the same is the fastest there."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from ..parts import recorded

__all__ = ["HALVES", "fastest", "fits", "interpreted"]

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (*HALVES, torch.float32)
_winners: dict[Hashable, int] = {}
_able: dict[int | None, bool] = {}  # by the GPU's number
_log = logging.getLogger(__name__)


def interpreted() -> bool:
    """Whether Triton runs its kernels on the processor, which is how they are tested."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def fits(x: Tensor) -> bool:
    """Whether the kernels run on tensors like this one, which must be on the current GPU.

    Nothing that records operations sees them: what traces, compiles or exports is given PyTorch's own.
    """
    if torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return False
    here = x.device.index == torch.cuda.current_device() if x.device.type == "cuda" else interpreted()
    return here and not recorded() and x.dtype in DTYPES and x.numel() > 0 and _works(x.device.index)


def fastest(key: Hashable, make: Callable[[], Sequence[Callable[[], object]]]) -> int:
    """Which of the ways that ``make`` gives takes the least time on the current GPU, timed once for each ``key``.

    That costs some milliseconds (and a second where a kernel has to be compiled). A way that fails can't win. While a
    CUDA graph is recorded nothing can be timed: the last way, which has to be PyTorch's own, is taken then.
    """
    if interpreted():
        return 0
    key = (torch.cuda.current_device(), key)
    if key not in _winners:
        ways = make()
        if torch.cuda.is_current_stream_capturing():
            return len(ways) - 1
        times = [_milliseconds(way) for way in ways]
        _winners[key] = times.index(min(times))
    return _winners[key]


def _milliseconds(way: Callable[[], object], times: int = 5) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    try:
        for i in range(3 + times):
            if i == 3:
                start.record()
            way()
        end.record()
        torch.cuda.synchronize()
    except Exception:  # an old GPU, too little shared memory, a Triton that doesn't fit: another way always runs
        return float("inf")
    return start.elapsed_time(end)


def _works(device: int | None) -> bool:
    """Whether kernels run there; tried once, but not while a CUDA graph is recorded, which a trial would break."""
    if device not in _able:
        if not interpreted() and torch.cuda.is_current_stream_capturing():
            return False
        _able[device] = _tried(device)
    return _able[device]


def _tried(device: int | None) -> bool:
    """Whether Triton compiles and runs a kernel there, for which it wants a C compiler and a GPU that isn't too old."""
    if importlib.util.find_spec("triton") is None:
        return False
    if interpreted():
        return True
    try:
        from .norms import activate

        x = torch.ones(4, 16, device=f"cuda:{device}")
        return bool((activate(x, x[0], x[0], silu=False) == 2).all())
    except Exception as problem:  # whatever a driver, a compiler or Triton may say
        reason = (str(problem) or type(problem).__name__).splitlines()[0]
        _log.info("PyTorch's own operations run on the GPU, for Triton's kernels don't: %s", reason)
        return False
