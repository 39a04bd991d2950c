"""Memory that this machine has left, and images that would take more; no torch is needed."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

from ..errors import UserError

__all__ = ["SMALL", "available_bytes", "check_inputs", "check_resizable", "input_shape"]

SMALL = 4 << 20  # pixels of a batch up to which a pass or a step isn't estimated: it fits, and shall start at once
BATCHES = 3  # of inputs that are there at once: one that is computed, and two that are read ahead


def input_shape(loaded: Any) -> tuple[int, int, int]:
    """Channels, height and width of what a network has images resized to; of one pixel where they keep their size."""
    channels, height, width = loaded.preprocessing["input_size"]
    args = loaded.info.get("task_args") or {}
    if loaded.task == "detect":
        height = width = min(args.get("short_side", 1), args.get("long_side", 1))
    elif loaded.task == "segment":
        height = width = args.get("resize") or 1
    return channels, height, width


def check_resizable(loaded: Any, img_size: int | None) -> None:
    """Raise UserError for a size given to a network whose images are not resized to one."""
    instead = {
        "segment": "images keep their size, or have a short side of --resize, a setting of train",
        "detect": "images are resized as --short_side and --long_side of train say",
    }
    if img_size is not None and loaded.task in instead:
        raise UserError(
            f"img_size has no effect on {loaded.source}, which is for the task {loaded.task}: {instead[loaded.task]}"
        )


def check_inputs(loaded: Any, images: int) -> None:
    """See that batches of inputs of float32 fit into memory, whatever the network itself takes.

    Raises:
        UserError: They don't.
    """
    shape = input_shape(loaded)
    needed, free = BATCHES * images * math.prod(shape) * 4, available_bytes()
    if free is not None and needed > free:
        raise UserError(
            f"{loaded.source}: batches of {images} images of {shape[2]}x{shape[1]}, as it asks for, take "
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
