"""Files at a URL, each fetched whole when it is first needed and kept on this machine."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from ...errors import UserError, require
from ...text import without_passwords
from .source import first_line

__all__ = ["Expected", "RemoteFolder", "translate_errors"]

MAX_TRIES, PAUSE = 4, 1.0  # downloads are tried so often, with pauses of 1, 2 and 4 seconds
MAX_MANIFEST_BYTES = 64 << 20  # bytes


class Expected(NamedTuple):
    """What is known of a file before it comes: its size, what changes when it does, and its SHA-256 if known."""

    size: int | None = None
    version: str = ""
    sha256: str = ""


class RemoteFolder:
    """A folder at a URL, as fsspec reads it (http and https at once; s3 needs s3fs, gs gcsfs, and so on).

    Files are kept in ``$TRANSCNN_CACHE`` (by default ``~/.cache/transcnn``), where processes of one machine share
    them: each is fetched once, by whichever process needs it first, under a temporary name until it is whole and its
    SHA-256, where it is known, is right. The cache grows to the size of what is read; removing it costs no more than
    fetching again.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.title = without_passwords(self.url)  # for messages
        root = os.environ.get("TRANSCNN_CACHE") or os.path.join(
            os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "transcnn"
        )
        self.folder = Path(root) / hashlib.sha256(self.url.encode()).hexdigest()[:16]
        self.known: dict[str, Expected] = {}

    def expect(self, known: dict[str, Expected]) -> None:
        """Say what is known of the files."""
        self.known = known

    def path(self, name: str) -> str:
        """The path of a file on this machine, after it was fetched if need be.

        What nothing is known of, such as a manifest, is fetched anew each time, as is what hasn't the right size.

        Raises:
            UserError: It can't be fetched or kept; a run that needs it ends, and can be resumed.
        """
        return self.cached(name, "", lambda target: self.fetch(name, target), self.known.get(name, Expected()).size)

    def cached(self, name: str, suffix: str, make: Callable[[Path], None], size: int | None = None) -> str:
        """The path of what is made of a file, once for all processes: ``make`` writes it to the path it gets.

        What is there already is taken, if it has ``size`` bytes.

        Raises:
            UserError: It can't be made or kept.
        """
        version = self.known.get(name, Expected()).version
        flat = name.replace("/", "-") + suffix
        path = self.folder / (f"{version[:12]}-{flat}" if version else flat)  # what changed there is another file here
        if version and _is_whole(path, size):
            return str(path)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / f".{path.name}.lock"):
                if not version or not _is_whole(path, size):
                    temporary = path.with_name(f".{path.name}.tmp")
                    try:
                        make(temporary)
                        with temporary.open("rb+") as file:
                            os.fsync(file.fileno())  # else a power cut may leave the name with half of the content
                        os.replace(temporary, path)
                    finally:
                        with suppress(OSError):
                            temporary.unlink(missing_ok=True)
        except UserError:
            raise
        except OSError as error:
            raise UserError(f"can't keep {self.title}/{name} in {self.folder}: {error.strerror or error}") from error
        return str(path)

    def fetch(self, name: str, target: Path) -> None:
        """Copy a file from there, whole and checked; tried several times."""
        size, _, digest = self.known.get(name, Expected())
        if size is not None and size > (free := shutil.disk_usage(target.parent).free):
            raise UserError(
                f"can't keep {self.title}/{name} in {target.parent}: it has {size:,} bytes, and {free:,} are free; "
                "TRANSCNN_CACHE names another folder"
            )
        self.retry(name, lambda: _download(f"{self.url}/{name}", target, size, digest))

    def retry(self, name: str, action: Callable[[], None]) -> None:
        """Do something with a file that is there, again after a while if it fails; UserError if it always does."""
        try:
            for attempt in range(MAX_TRIES):
                try:
                    action()
                    break
                except OSError as error:
                    if error.errno == errno.ENOSPC or attempt + 1 == MAX_TRIES or isinstance(error, FileNotFoundError):
                        raise
                    time.sleep(PAUSE * 2**attempt)
        except OSError as error:
            raise UserError(f"can't fetch {self.title}/{name}: {without_passwords(first_line(error))}") from error


@contextmanager
def translate_errors(url: str) -> Iterator[None]:
    """Turn what fsspec and its schemes raise into OSError, which is worth another try, or UserError, which isn't."""
    try:
        yield
    except (OSError, UserError):
        raise
    except (ImportError, ValueError) as error:  # a scheme whose library is not installed, or none at all
        raise UserError(without_passwords(f"can't fetch {url}: {first_line(error)}")) from error
    except Exception as error:  # each scheme's library has errors of its own
        raise OSError(first_line(error)) from error


def _is_whole(path: Path, size: int | None) -> bool:
    return path.is_file() and (size is None or path.stat().st_size == size)


def _download(url: str, target: Path, size: int | None, digest: str) -> None:
    """Fetch a file; raises OSError, also where other bytes come than are expected."""
    fsspec: Any = require("fsspec", "data")
    limit = MAX_MANIFEST_BYTES if size is None else size
    came, seen = 0, hashlib.sha256()
    with translate_errors(url), fsspec.open(url, "rb") as file, target.open("wb") as copy:
        while came <= limit and (block := file.read(1 << 20)):
            came += len(block)
            seen.update(block)
            copy.write(block)
    if came > limit or (size is not None and came < size):
        raise OSError(f"{came} bytes came, expected {'at most ' if size is None else ''}{limit}")
    if digest and seen.hexdigest() != digest:
        raise OSError("what came is damaged: its SHA-256 is not the manifest's")
