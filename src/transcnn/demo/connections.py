"""Connections that send no request, or half of one, end: uvicorn itself waits for them as long as they stay open."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["limited_protocol"]


def limited_protocol(head_seconds: float, connections: int) -> type[H11Protocol]:
    """uvicorn's HTTP protocol with two bounds, as its ``Config.http_protocol_class``.

    Args:
        head_seconds: From a connection's start, or the end of its last answer, to the last byte of a request's head.
            What comes meanwhile, a byte now and then, doesn't make it longer.
        connections: Open at the same time; a further one is closed at once.
    """

    class Limited(H11Protocol):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._head_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > connections:
                transport.abort()
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            super().connection_lost(exc)

        def _watch(self) -> None:
            """Let the timer run while no request is being answered; it begins once, however often this is called."""
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop_timer()
            elif self._head_timer is None and not self.transport.is_closing():
                self._head_timer = self.loop.call_later(head_seconds, self.transport.abort)

        def _stop_timer(self) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

    return Limited
