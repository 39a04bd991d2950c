"""Files at a URL, each fetched whole when it is first needed and kept on this machine."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from ..errors import UserError, require
from .sources import line

__all__ = ["Remote"]

# Schemes of fsspec that only read files elsewhere; those that run programs or unpack archives are not asked.
SCHEMES = ["http", "https", "s3", "s3a", "gs", "gcs", "az", "abfs", "hf", "memory"]
TRIES, PAUSE = 4, 1.0  # fetching is tried so often, with pauses of 1, 2 and 4 seconds
LARGEST_MANIFEST = 64 << 20  # bytes


class Remote:
    """A folder at a URL, as fsspec reads it (http and https at once; s3 needs s3fs, gs gcsfs, and so on).

    Files are kept in ``$TRANSCNN_CACHE`` (by default ``~/.cache/transcnn``), where processes of one machine share
    them: each is fetched once, by whichever process needs it first, under a temporary name until it is whole and its
    SHA-256 is right. The cache grows to the size of what is read; removing it costs no more than fetching again.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        root = os.environ.get("TRANSCNN_CACHE") or os.path.join(
            os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "transcnn"
        )
        self.folder = Path(root) / hashlib.sha256(self.url.encode()).hexdigest()[:16]
        self.known: dict[str, tuple[int, str]] = {}

    @staticmethod
    def is_url(data: str) -> bool:
        """Whether this is a URL that is read here."""
        scheme = re.match(r"(\w+)://", data)
        return bool(scheme) and scheme.group(1).lower() in SCHEMES

    def expect(self, known: dict[str, tuple[int, str]]) -> None:
        """Say how many bytes each file has, and its SHA-256."""
        self.known = known

    def path(self, name: str) -> str:
        """The path of a file on this machine, after it was fetched if need be.

        The first file, before ``expect``, is the manifest: it is fetched anew each time.

        Raises:
            UserError: It can't be fetched or kept; a run that needs it ends, and can be resumed.
        """
        size, digest = self.known.get(name, (None, ""))
        path = self.folder / (f"{digest[:12]}-{name}" if digest else name)  # what changed there is another file here
        if digest and path.is_file():
            return str(path)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / f".{path.name}.lock"):
                if not digest or not path.is_file():
                    self._fetch(name, path, size, digest)
        except UserError:
            raise
        except OSError as error:
            raise UserError(f"can't keep {self.url}/{name} in {self.folder}: {error.strerror or error}") from error
        return str(path)

    def _fetch(self, name: str, path: Path, size: int | None, digest: str) -> None:
        url, temporary = f"{self.url}/{name}", path.with_name(f".{path.name}.tmp")
        try:
            for attempt in range(TRIES):
                try:
                    _copy(url, temporary, size, digest)
                    break
                except OSError as error:
                    if error.errno == errno.ENOSPC or attempt + 1 == TRIES or isinstance(error, FileNotFoundError):
                        raise
                    time.sleep(PAUSE * 2**attempt)
            os.replace(temporary, path)
        except OSError as error:
            raise UserError(f"can't fetch {url}: {line(error)}") from error
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def _copy(url: str, target: Path, size: int | None, digest: str) -> None:
    """Fetch a file; raises OSError, also where other bytes come than are expected."""
    fsspec: Any = require("fsspec", "data")
    limit = LARGEST_MANIFEST if size is None else size
    came, seen = 0, hashlib.sha256()
    try:
        with fsspec.open(url, "rb") as file, target.open("wb") as copy:
            while came <= limit and (block := file.read(1 << 20)):
                came += len(block)
                seen.update(block)
                copy.write(block)
    except (ImportError, ValueError) as error:  # a scheme whose library is not installed, or none at all
        raise UserError(f"can't fetch {url}: {line(error)}") from error
    except OSError:
        raise
    except Exception as error:  # each scheme's library has errors of its own
        raise OSError(line(error)) from error
    if came > limit or (size is not None and came < size):
        raise OSError(f"{came} bytes came, expected {'at most ' if size is None else ''}{limit}")
    if digest and seen.hexdigest() != digest:
        raise OSError("what came is damaged: its SHA-256 is not the manifest's")
