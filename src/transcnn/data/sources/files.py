"""Files below a folder, or in a tar that is read where it lies, by their relative names."""

from __future__ import annotations

import os
import re
import tarfile
from pathlib import Path
from typing import Protocol

from ...errors import UserError
from ..images import BrokenImage, read_slice
from ..listing import folder_identity
from .source import first_line

__all__ = ["Files", "dense_layout", "open_files"]


class Files(Protocol):
    """Read-only files by relative names with forward slashes."""

    name: str  # of the whole, for run directories

    def names(self, folder: str = "") -> list[str]:
        """All files below ``folder``, sorted; hidden ones are left out."""
        ...

    def size(self, name: str) -> int:
        """A file's size in bytes; -1 where it can't be told."""
        ...

    def read(self, name: str) -> bytes:
        """One file; raises :class:`~transcnn.data.images.BrokenImage` where that can't be."""
        ...


def open_files(data: str | os.PathLike[str]) -> Files:
    """The files of a folder or of an uncompressed tar.

    Raises:
        UserError: Neither, or a tar that can't be read.
    """
    path = Path(data)
    if path.is_dir():
        return FolderFiles(path)
    if path.is_file() and path.name.lower().endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip")):
        raise UserError(f"{os.fspath(data)!r} is compressed, which can't be read in any order: unpack it first")
    if path.is_file() and path.suffix.lower() == ".tar":
        return TarFiles(path)
    kind = "is neither a folder nor a tar" if path.exists() else "does not exist"
    raise UserError(f"{os.fspath(data)!r} {kind}")


def dense_layout(data: str) -> str | None:
    """``detect`` or ``segment`` if a folder or tar on this machine is laid out for that task; else None."""
    try:
        names = [name.lower() for name in open_files(data).names()]
    except (UserError, OSError, ValueError):
        return None
    if any(re.search(r"(^|/)annotations/.*\.(json|xml)$", name) for name in names):
        return "detect"
    if any(re.fullmatch(r"([^/]+/)?[^/]+\.ya?ml", name) for name in names) and any(
        re.search(r"(^|/)labels/.*\.txt$", name) for name in names
    ):
        return "detect"
    both = all(any(re.search(rf"(^|/){folder}/", name) for name in names) for folder in ("images", "labels"))
    return "segment" if both else None


class FolderFiles:
    """Files below a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.name = root.resolve().name or "data"

    def names(self, folder: str = "") -> list[str]:
        """All files below ``folder``, sorted; hidden ones are left out."""
        found = []
        listed = {folder_identity(path) for path in self.root.resolve().parents}
        for path, folders, files in os.walk(self.root / folder, followlinks=True):
            identity = folder_identity(path)
            if identity in listed:  # a link that leads back, or to a folder that came already
                folders.clear()
                continue
            listed.add(identity)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            here = Path(path).relative_to(self.root)
            found += [(here / name).as_posix() for name in files if not name.startswith(".")]
        return sorted(found)

    def size(self, name: str) -> int:
        """A file's size in bytes; -1 where it can't be told."""
        try:
            return (self.root / name).stat().st_size
        except OSError:
            return -1

    def read(self, name: str) -> bytes:
        """One file."""
        path = self.root / name
        try:
            if path.is_file():
                return path.read_bytes()
            reason = "is not a regular file" if path.exists() else "no such file"
        except OSError as error:
            reason = error.strerror or str(error)
        raise BrokenImage(reason)


class TarFiles:
    """Files in a tar; each is read where it lies, so that any order costs the same."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.stem
        try:
            with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
                end = os.fstat(file.fileno()).st_size
                members = [member for member in tar if member.isreg() and 0 <= member.size <= end]
        except (tarfile.TarError, OSError, ValueError, OverflowError, MemoryError) as error:
            raise UserError(f"{os.fspath(path)!r} is no tar that can be read: {first_line(error)}") from error
        self.members = {os.path.normpath(m.name).replace(os.sep, "/"): (m.offset_data, m.size) for m in members}
        roots = {name.partition("/")[0] for name in self.members}
        only = roots.pop() if len(roots) == 1 else ""  # everything lies in one folder: that is the data set
        if only and only not in self.members:
            self.members = {name[len(only) + 1 :]: member for name, member in self.members.items()}

    def names(self, folder: str = "") -> list[str]:
        """All files below ``folder``, sorted; hidden ones are left out."""
        start = f"{folder.rstrip('/')}/" if folder else ""
        return sorted(
            name
            for name in self.members
            if name.startswith(start) and not any(word.startswith(".") for word in name.split("/"))
        )

    def size(self, name: str) -> int:
        """A file's size in bytes; -1 where it can't be told."""
        return self.members.get(name, (0, -1))[1]

    def read(self, name: str) -> bytes:
        """One file."""
        if name not in self.members:
            raise BrokenImage("no such file")
        return read_slice(self.path, *self.members[name])
