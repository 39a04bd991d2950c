"""What a request must be before the page sees it: for this host, from this page, and within bounds.

The page is served by gradio, which reflects any ``Origin``, checks no ``Host``, and keeps every upload for an hour.
Starlette's TrustedHostMiddleware knows names alone, no addresses and no ``Origin``; hence this one.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
import time
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..errors import UserError

__all__ = ["Guard", "Limits", "Names", "WithoutCors", "check_address", "stored_files", "sweep"]

# Parts of gradio that this page doesn't use: fetching for others, editing by a model, records of runs.
UNUSED = ("proxy=", "vibe-", "undo-vibe", "dev/", "monitoring", "profiling", "run-history", "runs", "process_recording")
# The browser itself refuses to load anything from elsewhere or to send anything elsewhere.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "connect-src 'self' data: blob:; frame-ancestors 'none'; form-action 'none'; base-uri 'self'"
)
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
]


@dataclass(frozen=True)
class Limits:
    """Bounds of what visitors send and leave behind.

    Attributes:
        file_bytes: Of one upload.
        stored_bytes, stored_files: Of all uploads and drawn images on disk; above, the oldest are deleted.
        seconds: That an upload may take.
        keep_seconds: That a file is kept.
        uploads: At the same time.
        sessions: Visitors whose last image is kept in memory; with more, the oldest is forgotten.
        head_seconds: That a connection may take to send a request's head.
        connections: At the same time.
    """

    file_bytes: int = 20 << 20
    stored_bytes: int = 200 << 20
    stored_files: int = 2000
    seconds: float = 60.0
    keep_seconds: float = 3600.0
    uploads: int = 8
    sessions: int = 64
    head_seconds: float = 20.0
    connections: int = 512


@dataclass(frozen=True)
class Names:
    """The names and addresses that the page may be asked for under.

    Attributes:
        own: Names and addresses of the machine, from the address that the page listens at.
        extra: Names given by the user, such as that of a proxy in front.
        any_address: Whether any numeric address is right: a page that listens at all of them. Rebinding needs a name.
    """

    own: frozenset[str]
    extra: frozenset[str] = frozenset()
    any_address: bool = False

    @classmethod
    def of(cls, host: str, extra: Iterable[str] = ()) -> Names:
        """For a page that listens at ``host``."""
        names = {host.lower().strip("[]")}
        address = _address(host)
        everywhere = address is not None and address.is_unspecified
        if everywhere or host.lower() == "localhost" or (address is not None and address.is_loopback):
            names |= {"localhost", "127.0.0.1", "::1"}
        if everywhere:
            names |= {socket.gethostname().lower(), f"{socket.gethostname().lower()}.local"}
        return cls(frozenset(names), frozenset(_host_of(name) for name in extra), everywhere)

    def knows(self, host: str) -> bool:
        """Whether a ``Host`` header is one of these."""
        name = _host_of(host)
        return name in self.own or name in self.extra or (self.any_address and _address(name) is not None)

    def same_page(self, origin: str, host: str) -> bool:
        """Whether an ``Origin`` header is the page's own, asked for under ``Host``."""
        try:
            page = urlsplit(origin)
        except ValueError:  # brackets that don't close
            return False
        if page.scheme not in ("http", "https"):
            return False
        return page.netloc.lower() == host.lower() or _host_of(page.netloc) in self.extra


class Guard:
    """ASGI middleware: refuses requests for other hosts, from other pages, and uploads beyond their bounds."""

    def __init__(self, app: Any, names: Names, limits: Limits, folder: Path, kept: Collection[Path] = ()) -> None:
        self.app, self.names, self.limits, self.folder, self.kept = app, names, limits, folder, kept
        self.running = 0  # uploads now

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, or answer it with one plain line."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # the page uses no web sockets

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *HEADERS]}
            await send(message)

        refusal = self._refusal(scope)
        if refusal is not None:
            await _answer(with_headers, *refusal)
        elif scope["method"] in ("GET", "HEAD"):
            await self.app(scope, receive, with_headers)
        else:
            await self._bounded(scope, receive, with_headers)

    def _refusal(self, scope: Any) -> tuple[int, str] | None:
        """Status and words, or None for a request that is all right."""
        headers = [(key.lower(), value.decode("latin-1")) for key, value in scope["headers"]]
        hosts = [value for key, value in headers if key == b"host"]
        if len(hosts) != 1 or not self.names.knows(hosts[0]):
            return 421, "This page is not served under that name. Whoever runs it can add one: --allowed_hosts NAME."
        values = dict(headers)
        origin, fetched = values.get(b"origin"), values.get(b"sec-fetch-site", "same-origin")
        if origin is not None and not self.names.same_page(origin, hosts[0]):
            return 403, "Requests from other pages are refused."
        if scope["method"] not in ("GET", "HEAD"):
            if scope["method"] != "POST":
                return 405, "Only GET, HEAD and POST are answered."
            if origin is None and fetched not in ("same-origin", "none"):
                return 403, "Requests from other pages are refused."
            length = values.get(b"content-length", "0")
            if not length.isdecimal() or int(length) > self._most(scope):
                return 413, f"Too large: at most {self.limits.file_bytes / 2**20:g} MB."
        path = scope["path"].removeprefix("/gradio_api").removeprefix("/")
        return (404, "Not found.") if path.startswith(UNUSED) else None

    def _most(self, scope: Any) -> int:
        """Bytes that a request may send: an image in base64 and the form around it."""
        return (self.limits.file_bytes * 4 // 3 if "/upload" not in scope["path"] else self.limits.file_bytes) + 65_536

    async def _bounded(self, scope: Any, receive: Any, send: Any) -> None:
        """A request with a body, within time and size; what it stores stays within the folder's bounds."""
        if self.running >= self.limits.uploads:
            await _answer(send, 503, "Too many uploads at once. Try again in a moment.")
            return
        self.running += 1
        end, left, over = time.monotonic() + self.limits.seconds, self._most(scope), (0, "")
        answered = finished = False

        async def bounded_receive() -> Any:
            nonlocal left, over, finished
            if finished:  # what comes after the body is the end of the connection; answers may take their time
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, end - time.monotonic()))
            except asyncio.TimeoutError:
                over = 408, f"The upload took more than {self.limits.seconds:g} seconds."
                return {"type": "http.disconnect"}
            left -= len(message.get("body", b""))
            finished = not message.get("more_body", False)
            if left < 0:
                over = 413, f"Too large: at most {self.limits.file_bytes / 2**20:g} MB."
                return {"type": "http.disconnect"}
            return message

        async def bounded_send(message: Any) -> None:
            nonlocal answered
            if not over[0]:
                answered = True
                await send(message)

        try:
            await self.app(scope, bounded_receive, bounded_send)
        except Exception:
            if not over[0]:  # else it is what gradio makes of a body that was cut off
                raise
        finally:
            self.running -= 1
            await asyncio.to_thread(sweep, self.folder, self.limits, self.kept)
        if over[0] and not answered:
            await _answer(send, *over)


class WithoutCors:
    """ASGI middleware outside of gradio's, which lets every other page in: no CORS header leaves."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, but for the browser's questions on behalf of other pages."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def without(message: Any) -> None:
            if message["type"] == "http.response.start":
                kept = [(k, v) for k, v in message.get("headers", ()) if not k.lower().startswith(b"access-control-")]
                message = {**message, "headers": kept}
            await send(message)

        if scope["method"] == "OPTIONS":
            await _answer(without, 403, "Requests from other pages are refused.")
        else:
            await self.app(scope, receive, without)


def stored_files(folder: Path) -> list[Path]:
    """All files below a folder."""
    return [Path(directory) / name for directory, _, names in os.walk(folder) for name in names]


def sweep(folder: Path, limits: Limits, kept: Collection[Path] = ()) -> None:
    """Delete files that are older than they may be, and the oldest ones above the bounds, but for those of ``kept``.

    gradio has a folder for each file: those that have been empty for as long as an upload may take go, too.
    """
    files = []
    for path in stored_files(folder):
        if path in kept:
            continue
        with suppress(OSError):  # deleted meanwhile
            status = path.lstat()
            files.append((status.st_ctime, status.st_size, path))  # a copy may have its original's mtime
    files.sort(key=lambda row: -row[0])
    total, oldest = 0, time.time() - limits.keep_seconds
    for number, (written, size, path) in enumerate(files, 1):
        total += size
        if written < oldest or number > limits.stored_files or total > limits.stored_bytes:
            path.unlink(missing_ok=True)
    for directory, folders, names in os.walk(folder, topdown=False):
        if not folders and not names and Path(directory) != folder:
            with suppress(OSError):  # filled or deleted meanwhile
                if os.lstat(directory).st_ctime < time.time() - limits.seconds:
                    os.rmdir(directory)


def check_address(host: str, port: int | None) -> None:
    """Raise UserError at once for an address that this machine can't listen at."""
    if not host.strip():
        raise UserError("host is empty; 127.0.0.1 is this machine alone, 0.0.0.0 the whole network")
    numeric = all(part.isdecimal() for part in host.split("."))
    if (numeric or ":" in host) and _address(host) is None:
        raise UserError(f"host {host!r} is no address; 127.0.0.1 is this machine alone, 0.0.0.0 the whole network")
    try:
        found = socket.getaddrinfo(host.strip("[]"), port or 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        with socket.socket(found[0][0], socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(found[0][4])
    except (OSError, UnicodeError) as error:
        if port and getattr(error, "errno", None) == 98:
            raise UserError(f"port {port} is taken at {host}; give another --port") from error
        raise UserError(f"can't listen at {host}{f':{port}' if port else ''}: {error}") from error


def _host_of(text: str) -> str:
    """The name or address of a ``Host`` header, without its port."""
    text = text.strip().lower()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.rpartition(":")[0] if text.count(":") == 1 else text


def _address(text: str) -> Any:
    try:
        return ipaddress.ip_address(text.strip("[]"))
    except ValueError:
        return None


async def _answer(send: Any, status: int, words: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": words.encode()})
