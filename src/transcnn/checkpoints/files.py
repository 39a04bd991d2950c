"""Files put in place whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from ..errors import UserError, first_line

__all__ = ["atomic_write", "check_writable", "make_folder", "remove_stale_temporaries"]


def atomic_write(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` make a file under a temporary name, then put it in place: whole, or not at all.

    A pipe or a device (``/dev/stdout``, ``/dev/null``) is written to as it is: nothing may take its place.

    Raises:
        UserError: The disk is full or can't be written; what was there before is untouched.
    """
    try:
        if _is_device(path):
            write(path)
        else:
            _replace(path, write)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"can't write {path}: {reason}") from error


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())  # safetensors lets only its owner read what it writes
        os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)  # there only if something failed


def check_writable(path: Path, inputs: Iterable[str] = ()) -> None:
    """See that a file can be written, before the work that it is for; ``inputs`` are files that it may not be.

    Raises:
        UserError: It is a folder or one of ``inputs``, its folder doesn't exist, or nothing can be written there.
    """
    if path.is_dir():
        raise UserError(f"can't write {path}: it is a folder")
    if path.exists() and path.resolve() in {Path(name).resolve() for name in inputs}:
        raise UserError(f"can't write {path}: it is one of the inputs; give another name")
    if not path.parent.is_dir():
        raise UserError(f"can't write {path}: there is no folder {path.parent}")
    if _is_device(path):
        if not os.access(path, os.W_OK):
            raise UserError(f"can't write {path}: permission denied")
        return
    probe = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        probe.touch()
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            probe.unlink()


def make_folder(folder: Path, *names: str) -> None:
    """Make a folder and see that files of these names can be written there, before the work that they are for.

    Raises:
        UserError: They can't.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"can't write to {folder}: {error.strerror or error}") from error
    for name in names:
        check_writable(folder / name)


def remove_stale_temporaries(folder: Path) -> None:
    """Remove what a killed process left half written (see :func:`atomic_write`), where it can be removed."""
    for temporary in folder.glob(".*.tmp"):
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _is_device(path: Path) -> bool:
    """Whether there is something that is neither a file nor a folder, such as a pipe."""
    return path.exists() and not path.is_file() and not path.is_dir()


def _sync_folder(folder: Path) -> None:
    """Have a new name in a folder on disk too, where the system can do that."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
