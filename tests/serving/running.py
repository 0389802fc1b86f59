"""A real server on loopback, in a thread of this process, and what talks to it."""

from __future__ import annotations

import json
import re
import socket
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from flexctl.engine.serve import ServeConfig, ServeResult, serve
from flexctl.runtime import SilentReporter
from flexctl.serving import listening

_STARTUP = listening.Listener.startup


class Server:
    """One that runs."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.ready = threading.Event()
        self.address = ("", 0)
        self.result: ServeResult | None = None
        self.error: BaseException | None = None
        self.batcher: Any = None
        self.listener: Any = None

    def client(self, key: str = "none", **settings: Any) -> openai.OpenAI:
        host, port = self.address
        settings = {"max_retries": 0, "timeout": 60} | settings
        return openai.OpenAI(base_url=f"http://{host}:{port}/v1", api_key=key, **settings)

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=30)

    def raw(self, request: bytes) -> bytes:
        """Send bytes and return all that comes back until the server closes."""
        with self.connect() as found:
            found.sendall(request)
            return read_all(found)

    def post(self, path: str, body: bytes, **headers: str) -> tuple[int, Any]:
        given = {"Content-Type": "application/json", "Host": "localhost", "Connection": "close"}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        head = "".join(f"{name}: {value}\r\n" for name, value in given.items())
        answer = self.raw(f"POST {path} HTTP/1.1\r\n{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        return status_of(answer), json.loads(answer.split(b"\r\n\r\n", 1)[1])

    def get(self, path: str, host: str = "localhost") -> tuple[int, bytes]:
        answer = self.raw(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        return status_of(answer), answer.split(b"\r\n\r\n", 1)[1]


def read_all(found: socket.socket) -> bytes:
    answer = b""
    while piece := found.recv(65536):
        answer += piece
    return answer


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def _end(thread: threading.Thread, server: Server) -> None:
    """Stop a server as a signal does, and as a second one does where some client of a test still holds on to it."""
    for patience_s in (20, 60):
        if server.listener is not None:
            server.listener.finish()
        thread.join(patience_s)
        if not thread.is_alive():
            return
    assert thread.ident is not None
    raise AssertionError("".join(traceback.format_stack(sys._current_frames()[thread.ident])))


@contextmanager
def a_server(bundle: Path, **settings: Any) -> Iterator[Server]:
    """Serve a bundle while the block runs, and stop cleanly behind it."""
    server = Server()

    class Hearing(SilentReporter):
        def note(self, text: str) -> None:
            server.said.append(text)
            found = re.search(r"http://([^/]+):(\d+)/v1", text)
            if found:
                server.address = (found[1], int(found[2]))
                server.ready.set()

        def warn(self, text: str) -> None:
            server.said.append(f"warning: {text}")

    def work() -> None:
        try:
            config = ServeConfig(bundle=bundle, **({"port": 0, "threads": 1} | settings))
            server.result = serve(config, Hearing())
        except BaseException as error:
            server.error = error
        finally:
            server.ready.set()

    with pytest.MonkeyPatch.context() as patch:

        async def startup(listener: Any, sockets: Any = None) -> None:
            server.listener = listener
            server.batcher = listener._on_stop.__self__
            await _STARTUP(listener, sockets)

        patch.setattr(listening.Listener, "startup", startup)
        thread = threading.Thread(target=work)
        thread.start()
        try:
            assert server.ready.wait(60)
            if server.error is None:
                yield server
        finally:
            _end(thread, server)
    if server.error is not None:
        raise server.error
