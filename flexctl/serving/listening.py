"""The web server: uvicorn, with bounds on what a client may cost before and beside its requests."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from flexctl.errors import FlexctlError, UsageError
from flexctl.runtime import handling
from flexctl.serving.refusing import Refused

__all__ = ["Listener", "bind", "listener"]

_HEAD_BYTES = 16_384
"""Most of a request before its body."""

_HEAD_S = 10.0
"""How long a client may take for it."""

_READ_S = 30.0
"""How long a client may leave unread what was sent to it."""

_KEEP_ALIVE_S = 5
_GRACE_S = 30
_MOST_CONNECTIONS = 900
"""Below the thousand files that a process usually may have open."""

_NOWHERE = logging.NullHandler()


class _Protocol(H11Protocol):
    """Uvicorn's, which does not wait for ever for a request to come nor for an answer to be read."""

    _head: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head = self.loop.call_later(_HEAD_S, transport.abort)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._cancel()
        elif self._head is None:
            self._head = self.loop.call_later(_HEAD_S, self.transport.abort)

    def send_400_response(self, _: str) -> None:
        """Say that this is no HTTP, unless an answer was already given."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(Refused(400, "this is not a valid HTTP request").body).encode()
            headers = [
                ("Content-Type", "application/json"),
                ("Content-Length", str(len(body))),
                ("Connection", "close"),
            ]
            begin = h11.Response(status_code=400, headers=headers, reason="Bad Request")
            for event in (begin, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel()
        self.resume_writing()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(_READ_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _cancel(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None


class Listener(uvicorn.Server):
    """Serves until the first signal, then finishes what is running; a second signal stops at once.

    Args:
        config: Of uvicorn.
        on_ready: Called once clients are served.
        on_stop: Called at the first signal.
    """

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None], on_stop: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready, self._on_stop = on_ready, on_stop

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start serving, and say so."""
        await super().startup(sockets)
        self._on_ready()

    def finish(self) -> None:
        """Stop once what is running is finished; called again, at once."""
        self.force_exit = self.should_exit
        self.should_exit = True
        self._on_stop()

    def leave(self, _done: object = None) -> None:
        """Stop once what is running is finished, as there is nobody any more who could answer."""
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Hear a signal."""
        del sig, frame
        self.finish()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Hear signals inside the ``with`` statement. They are not raised again behind it: the command has a result."""
        with handling(self.handle_exit, signal.SIGINT, signal.SIGTERM):
            yield


def bind(host: str, port: int) -> socket.socket:
    """Return a socket at an address that nobody else has; nobody is answered there yet.

    Raises:
        UsageError: There is no such address here.
        FlexctlError: Somebody else has it, or it may not be taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise UsageError(f"{host!r} is no address of this machine", hint="use 127.0.0.1", field="host") from error
    found = socket.socket(family, kind, protocol)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind(address)
        # From here on another server at the same address is refused, and clients wait until the model is there.
        found.listen(128)
    except OSError as error:
        found.close()
        hint = "take another with `port`, or 0 for any that is free"
        raise FlexctlError(f"{host}:{port} cannot be taken: {error.strerror}", hint=hint) from error
    return found


def listener(app: Any, on_ready: Callable[[], None], on_stop: Callable[[], None]) -> Listener:
    """Return what serves an application.

    Args:
        app: The application.
        on_ready: Called once clients are served.
        on_stop: Called when it is told to stop.
    """
    # It logs clients' addresses and, where something breaks, what broke with it.
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).addHandler(_NOWHERE)
        logging.getLogger(name).propagate = False
    # It warns of clients that hang up while an answer is sent to them.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    config = uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        h11_max_incomplete_event_size=_HEAD_BYTES,
        limit_concurrency=_MOST_CONNECTIONS,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_GRACE_S,
    )
    return Listener(config, on_ready, on_stop)
