"""Run directories: made fresh, and found again by processes that were restarted.

A run directory holds ``config.yaml`` (every setting), ``data.json`` (what it learns from), ``metrics.csv`` (a row an
epoch), TensorBoard events, ``last.ckpt`` (to go on from; ``previous.ckpt`` and ``checksums.sha256`` go with it),
``best.safetensors`` (to use), ``metrics.json``, ``report/``, ``skipped.csv`` where files could not be read, and
``faults.log`` where something else went wrong.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import time
import weakref
from pathlib import Path

from ..distributed.processes import launch_name, restarts
from ..errors import UserError

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None

__all__ = ["LAUNCH", "RunLock", "made_by_this_launch", "new_run_dir"]

LAUNCH = ".launch"  # the file of a run directory that holds the name of the torchrun command that made it


class RunLock:
    """A run directory's lock, so that no two processes train in it. The system drops it when its process ends.

    It is a lock of the directory itself (flock), for which no file is needed. Where the system or the file system has
    none, nothing is locked.
    """

    def __init__(self) -> None:
        self._path: Path | None = None
        self._descriptor: int | None = None
        if hasattr(os, "register_at_fork"):  # the lock lives as long as a copy of the descriptor is open: loaders' too
            forget = weakref.WeakMethod(self._close)
            os.register_at_fork(after_in_child=lambda: (method := forget()) and method())

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def acquire(self, path: Path) -> None:
        """Lock a run directory, and release what was locked before.

        Raises:
            UserError: Another process, or another run of this one, holds it.
        """
        path = path.resolve()
        if fcntl is None or path == self._path:
            return
        self.release()
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError:
            return  # whether it can be used shows when it is
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise UserError(f"another process is training in the run directory {path}") from error
        except OSError:  # a network's file system may have no locks
            os.close(descriptor)
            return
        self._path, self._descriptor = path, descriptor

    def release(self) -> None:
        """Give the lock back."""
        self._close()

    def _close(self) -> None:
        descriptor, self._descriptor, self._path = self._descriptor, None, None
        if descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(descriptor)


def new_run_dir(out: str | os.PathLike[str] | None, model: str, data: str, lock: RunLock | None = None) -> Path:
    """Make a fresh run directory, ``runs/<date-time>-<model>-<data>`` unless ``out`` says otherwise, and lock it.

    Raises:
        UserError: ``out`` holds something already or another process uses it, it can't be made or written to, or what
            writes checkpoints would take it for an address.
    """
    name = "" if out is None else os.fspath(out)
    if re.search("::|://", name) or name.startswith("data:"):
        raise UserError(f"the run directory is a folder of this machine, not an address; got {name!r}")
    if not name.isascii() and name != name.encode(errors="replace").decode():
        raise UserError(f"the run directory's name must be UTF-8, for checkpoints in it to be written; got {name!a}")
    try:
        path = Path(out) if out is not None else _make_named(model, data)
        path.mkdir(parents=True, exist_ok=True)
        if lock is not None:
            lock.acquire(path)
        if path.is_dir() and any(path.iterdir()) and not (restarts() and made_by_this_launch(path)):
            raise UserError(f"the run directory {path} is not empty; give another --out, or go on with --resume {path}")
        probe = path / ".probe"
        try:
            probe.write_bytes(b"\0" * 4096)
        finally:
            probe.unlink(missing_ok=True)
        if launch_name():
            (path / LAUNCH).write_text(launch_name(), encoding="utf-8")
    except OSError as error:
        where = "runs" if out is None else out
        raise UserError(f"can't write to the run directory {where}: {error.strerror or error}") from error
    return path


def _make_named(model: str, data: str) -> Path:
    """A directory that this call made, under a name that no other run has, however many start in one second."""
    name = re.sub(r"[^\w.-]+", "-", f"{time.strftime('%Y%m%d-%H%M%S')}-{model}-{data}").strip("-")[:200]
    for i in itertools.count(1):
        path = Path("runs") / (name if i == 1 else f"{name}-{i}")
        with contextlib.suppress(FileExistsError):
            path.mkdir(parents=True)
            return path
    raise AssertionError("count has no end")


def made_by_this_launch(path: Path) -> bool:
    """Whether a run directory was made, before a restart, by the command that started this process."""
    try:
        return (path / LAUNCH).read_text(encoding="utf-8") == launch_name() != ""
    except (OSError, UnicodeDecodeError):
        return False
