"""What stands before vLLM's own server, by its ``--middleware``: who may ask, and who answers.

Addresses whose answers carry no mask are not there.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import ClassVar

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flexctl.bundle import PUBLIC, open_merged, rights_of
from flexctl.errors import UsageError
from flexctl.serving.exchange import body_of, refusal_of
from flexctl.serving.hosts import LOCAL_NAMES, check_host
from flexctl.serving.listing import Listing
from flexctl.serving.permits import Permits, read_keys
from flexctl.serving.refusing import Refused
from flexctl.serving.vllm.asking import Asked, read_asked
from flexctl.serving.vllm.masks import Served, served

__all__ = ["Masks"]

_OPEN = ("/health", "/load", "/metrics", "/ping", "/version")
_ANSWERED = ("/v1/completions", "/v1/chat/completions")
_TOKENIZED = ("/tokenize", "/detokenize")
_MODELS = "/v1/models"


class Masks:
    """ASGI middleware; vLLM makes it.

    Args:
        app: vLLM's application.

    Attributes:
        requests: How many were answered or refused in this process.
    """

    requests: ClassVar[int] = 0

    def __init__(self, app: ASGIApp) -> None:
        model = served()
        if model is None:
            raise UsageError("only `flexctl serve` puts this before a server")
        merged = open_merged(Path(model.bundle))
        experts = (PUBLIC, *merged.names)
        keys = read_keys(Path(model.api_keys), experts) if model.api_keys else ()
        self._app, self._model = app, model
        self._permits = Permits(model.name, experts, rights_of(merged), keys)
        self._listing = Listing(self._permits, model.digest, explains=False, chat=None)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or let vLLM do so."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        else:
            Masks.requests += 1
            try:
                await self._answer(scope, receive, send)
            except Refused as refusal:
                await refusal_of(refusal)(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        check_host(scope, LOCAL_NAMES if self._model.is_local else ())
        request, path, is_read = Request(scope, receive), scope["path"], scope["method"] in ("GET", "HEAD", "OPTIONS")
        if (path in _OPEN and is_read) or scope["method"] == "OPTIONS":  # what a browser asks before it asks
            await self._app(scope, receive, send)
            return
        key = self._permits.holder(request.headers.get("authorization"))
        if path in _ANSWERED and scope["method"] == "POST":
            asked = read_asked(await body_of(request), _known(path), self._model, self._permits, key)
            told = {**scope, "headers": [*_without_length(scope["headers"]), _length(asked.body)]}
            await self._app(told, _Said(asked.body, receive), _Accounted(asked, self._model, send))
        elif path == _MODELS and is_read:
            await JSONResponse(self._listing.all())(scope, receive, send)
        elif path.startswith(f"{_MODELS}/") and is_read:
            await JSONResponse(self._listing.one(path.removeprefix(f"{_MODELS}/")))(scope, receive, send)
        elif path in _TOKENIZED or (path in _ANSWERED and is_read):
            await self._app(scope, receive, send)
        else:
            raise Refused(404, f"there is no such address here; what answers is {' and '.join(_ANSWERED)}")


@functools.cache
def _known(path: str) -> frozenset[str]:
    """Return the fields that vLLM knows in requests to an address."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    kind = ChatCompletionRequest if "chat" in path else CompletionRequest
    return frozenset(kind.model_fields)


class _Said:
    """A body that was read before, as the application hears it; then whatever the client does next."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Message:
        if self._body is None:
            return await self._receive()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}


class _Accounted:
    """Sends vLLM's answer on, under the name of the model that answers, and with the account of who did.

    A stream has the account where an answer ends. Nothing is parsed: inside JSON a text has no bare quotes and no
    line breaks, so what is looked for is never part of one.
    """

    def __init__(self, asked: Asked, model: Served, send: Send) -> None:
        self._send = send
        self._head: Message | None = None
        self._kept = b""
        account = json.dumps(asked.account(model), separators=(",", ":"))
        self._start = f'{{"flexctl":{account},'.encode()
        self._names = (
            f'"model":{json.dumps(model.name)}'.encode(),
            f'"model":{json.dumps(asked.model(model))}'.encode(),
        )

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            kind = dict(message["headers"]).get(b"content-type", b"")
            if message["status"] == 200 and kind.startswith(b"application/json"):
                self._head = message
                return
        elif message["type"] == "http.response.body" and self._head is not None:
            await self._whole(self._head, message)
            return
        elif message["type"] == "http.response.body":
            events = message.get("body", b"").split(b"\n\n")
            message = {**message, "body": b"\n\n".join(map(self._event, events))}
        await self._send(message)

    async def _whole(self, head: Message, message: Message) -> None:
        """Keep the parts of an answer that is no stream, and send it with the last."""
        self._kept += message.get("body", b"")
        if not message.get("more_body"):
            body = self._told(self._kept)
            await self._send({**head, "headers": [*_without_length(head["headers"]), _length(body)]})
            await self._send({"type": "http.response.body", "body": body})

    def _event(self, event: bytes) -> bytes:
        if not event.startswith(b'data: {"id":'):
            return event
        if b'"finish_reason":null' in event:
            return event.replace(*self._names, 1)
        return b"data: " + self._told(event.removeprefix(b"data: "))

    def _told(self, answer: bytes) -> bytes:
        return answer.replace(b"{", self._start, 1).replace(*self._names, 1)


def _without_length(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    return [(name, value) for name, value in headers if name not in (b"content-length", b"transfer-encoding")]


def _length(body: bytes) -> tuple[bytes, bytes]:
    return b"content-length", str(len(body)).encode()
