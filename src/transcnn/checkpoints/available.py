"""Memory that this machine has left, and images that would take more; no torch is needed."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError

__all__ = ["available_bytes", "check_inputs"]

BATCHES = 3  # of inputs that are there at once: one that is computed, and two that are read ahead


def check_inputs(input_size: Sequence[int], images: int, source: str) -> None:
    """See that batches of inputs (C, H, W) of float32 fit into memory, whatever the network takes.

    Raises:
        UserError: They don't.
    """
    needed, free = BATCHES * images * math.prod(input_size) * 4, available_bytes()
    if free is not None and needed > free:
        raise UserError(
            f"{source}: batches of {images} images of {input_size[2]}x{input_size[1]}, as it asks for, take "
            f"{needed / 2**30:.1f} GiB of memory or more, and {free / 2**30:.1f} GiB are free: "
            "smaller images or batches need less"
        )


def available_bytes() -> int | None:
    """Memory that is free on this machine, or in the container that this is; None where that isn't known."""
    if not sys.platform.startswith("linux"):
        return None
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit.isdecimal():
            found.append(int(limit) - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    except (OSError, ValueError, IndexError):
        pass
    return min(found, default=None)
