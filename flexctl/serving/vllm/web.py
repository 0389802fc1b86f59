"""What stands before vLLM's own server, by its ``--middleware``: names of models become masks, answers say who gave them.

vLLM is told the base model's name and the mask. Paths that cannot carry a mask are not answered at all.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from flexctl.errors import UsageError
from flexctl.serving.vllm.asking import Asked, Asking
from flexctl.serving.vllm.masks import served

__all__ = ["Masks"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_ANSWERED = ("/v1/completions", "/v1/chat/completions")
_PASSED = ("/tokenize", "/detokenize", "/ping")
_MOST_BYTES = 4 * 2**20
_EVENT = b"data: {"


class Masks:
    """ASGI middleware.

    Args:
        app: vLLM's application.
    """

    def __init__(self, app: App) -> None:
        model = served()
        if model is None:
            raise UsageError("only `flexctl serve` may use this middleware")
        self._app, self._model, self._asking = app, model, Asking(model)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or let vLLM do so."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["method"] == "POST":
            await self._post(scope, receive, send)
        elif scope["path"] == "/v1/models":
            await _say(send, 200, self._models())
        else:
            await self._app(scope, receive, send)

    async def _post(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if path in _PASSED:
            await self._app(scope, receive, send)
            return
        if path not in _ANSWERED:
            await _refuse(send, 404, f"{path} cannot carry a mask of experts; this server answers {' and '.join(_ANSWERED)}")
            return
        body = await _read(receive)
        if body is None:
            await _refuse(send, 413, f"the body has more than {_MOST_BYTES:,} bytes")
            return
        try:
            asked = self._asking.read(_object(body))
        except UsageError as error:
            status = 404 if error.field == "model" else 400
            await _refuse(send, status, error.message, error.field)
            return
        told = json.dumps(asked.body).encode()
        headers = [(name, value) for name, value in scope["headers"] if name not in (b"content-length", b"transfer-encoding")]
        scope = {**scope, "headers": [*headers, (b"content-length", str(len(told)).encode())]}
        await self._app(scope, _Said(told, receive), _Noted(asked, self._model.name, send))

    def _models(self) -> dict[str, Any]:
        digest = self._model.digest
        names = self._asking.names()
        return {
            "object": "list",
            "data": [{"id": name, "object": "model", "created": 0, "owned_by": "flexctl", "digest": digest} for name in names],
        }


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


class _Noted:
    """Sends vLLM's answer on, with who answered in it, under the name that was asked for."""

    def __init__(self, asked: Asked, base: str, send: Send) -> None:
        self._send = send
        self._head: Message | None = None
        self._kept = b""
        note = json.dumps(asked.note, separators=(",", ":"))
        self._note = f'{_EVENT.decode()}"flexctl":{note},'.encode()
        self._names = (f'"model":{json.dumps(base)}'.encode(), f'"model":{json.dumps(asked.model)}'.encode())

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            kind = dict(message["headers"]).get(b"content-type", b"")
            if message["status"] == 200 and kind.startswith(b"application/json"):
                self._head = message
                return
        elif message["type"] == "http.response.body":
            if self._head is not None:
                await self._whole(message)
                return
            message = {**message, "body": b"\n\n".join(map(self._event, message.get("body", b"").split(b"\n\n")))}
        await self._send(message)

    async def _whole(self, message: Message) -> None:
        """Keep the parts of an answer that is no stream, and send it with the last."""
        self._kept += message.get("body", b"")
        if message.get("more_body") or self._head is None:
            return
        body = self._event(b"data: " + self._kept).removeprefix(b"data: ")
        headers = [(name, value) for name, value in self._head["headers"] if name != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))
        await self._send({**self._head, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})

    def _event(self, event: bytes) -> bytes:
        """Return one event of a stream with the note in it. Inside JSON, a text has no bare quotes and no line breaks."""
        if not event.startswith(_EVENT) or event.startswith(b'data: {"error"'):
            return event
        return event.replace(_EVENT, self._note, 1).replace(*self._names, 1)


async def _read(receive: Receive) -> bytes | None:
    """Return a request's body; None where it is too long."""
    parts, size = [], 0
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > _MOST_BYTES:
            return None
        if not message.get("more_body"):
            return b"".join(parts)


def _object(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise UsageError("it is no JSON", field="body") from error
    if not isinstance(found, dict):
        raise UsageError("it is no JSON object", field="body")
    return found


async def _refuse(send: Send, status: int, message: str, field: str | None = None) -> None:
    kind = "NotFoundError" if status == 404 else "BadRequestError"
    await _say(send, status, {"error": {"message": message, "type": kind, "param": field, "code": status}})


async def _say(send: Send, status: int, content: dict[str, Any]) -> None:
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
