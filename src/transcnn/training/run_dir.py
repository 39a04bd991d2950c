"""Run directories: made fresh, and found again by processes that were restarted.

A run directory holds ``config.yaml`` (every setting), ``metrics.csv`` (a row an epoch), TensorBoard events,
``last.ckpt`` (to go on from; ``previous.ckpt`` and ``checksums.sha256`` go with it), ``best.safetensors`` (to use),
``metrics.json``, ``report/``, ``skipped.csv`` where files could not be read, and ``faults.log`` where something else
went wrong.
"""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

from ..distributed.processes import attempt, launch_name
from ..errors import UserError

__all__ = ["LAUNCH", "made_by_this_launch", "new_run_dir"]

LAUNCH = ".launch"  # the file of a run directory that holds the name of the torchrun command that made it


def new_run_dir(out: str | os.PathLike[str] | None, model: str, data: str) -> Path:
    """Make a fresh run directory, ``runs/<date-time>-<model>-<data>`` unless ``out`` says otherwise.

    Raises:
        UserError: ``out`` holds something already, or can't be made or written to.
    """
    if out is None:
        name = re.sub(r"[^\w.-]+", "-", f"{time.strftime('%Y%m%d-%H%M%S')}-{model}-{data}").strip("-")
        path = Path("runs") / name
        for i in range(2, 1000):
            if not path.exists():
                break
            path = Path("runs") / f"{name}-{i}"
    else:
        path = Path(out)
    try:
        if path.is_dir() and any(path.iterdir()) and not (attempt() and made_by_this_launch(path)):
            raise UserError(f"the run directory {path} is not empty; give another --out, or go on with --resume {path}")
        path.mkdir(parents=True, exist_ok=True)
        (path / ".probe").write_bytes(b"\0" * 4096)
        (path / ".probe").unlink()
        if launch_name():
            (path / LAUNCH).write_text(launch_name(), encoding="utf-8")
    except OSError as error:
        raise UserError(f"can't write to the run directory {path}: {error.strerror or error}") from error
    return path


def made_by_this_launch(path: Path) -> bool:
    """Whether a run directory is that of an earlier attempt of the torchrun command that started this process."""
    try:
        return (path / LAUNCH).read_text(encoding="utf-8") == launch_name() != ""
    except (OSError, UnicodeDecodeError):
        return False
