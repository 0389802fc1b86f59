"""One request and its answer on the wire: the body read within bounds, events as they come, hang-ups heard."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import suppress
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from flexctl.serving.batching import Batcher
from flexctl.serving.jobs import Done, Event, Failed, Job, Prompt, Token
from flexctl.serving.metrics import Metrics
from flexctl.serving.protocol import Query
from flexctl.serving.refusing import Refused
from flexctl.serving.replies import Reply

__all__ = ["Coming", "Stream", "body_of", "events_of", "refusal_of", "unless_gone"]

_BODY_BYTES = 4 << 20
_BODY_S = 30.0

_FAILURES = {
    "timeout": (504, "the answer took longer than this server allows", "timeout"),
    "stopping": (503, "the server is stopping", "stopping"),
    "error": (500, "the model could not compute this answer", "model_error"),
}


class Coming:
    """What comes of a job, added to its reply in the order in which it comes."""

    def __init__(
        self, metrics: Metrics, reply: Reply, events: asyncio.Queue[tuple[int, Event]], started: float
    ) -> None:
        self.reply = reply
        self._metrics = metrics
        self._events = events
        self._started: float | None = started

    async def next(self) -> tuple[int, Event]:
        """Return the next event and whose it is.

        Raises:
            Refused: The job failed.
        """
        index, event = await self._events.get()
        choice = self.reply.choices[index]
        if isinstance(event, Failed):
            status, message, code = _FAILURES[event.reason]
            raise Refused(status, message, code=code)
        if isinstance(event, Prompt):
            choice.prompt_scored = event.scored
        elif isinstance(event, Token):
            choice.add(event)
            if self._started is not None:
                self._metrics.began(time.monotonic() - self._started)
                self._started = None
        else:
            choice.done = event
        return index, event

    @property
    def is_over(self) -> bool:
        """Whether all answers are done."""
        return all(choice.done for choice in self.reply.choices)

    async def all(self) -> None:
        """Wait for all of it."""
        while not self.is_over:
            await self.next()


async def body_of(request: Request) -> bytes:
    """Return a request's body.

    Raises:
        Refused: Something is asked outside it (400), it is not JSON (415), too large (413), or does not come (408).
    """
    if request.url.query:
        # Nobody would read it, and it may name experts that are to be left out.
        raise Refused(400, "this address reads nothing behind '?'; say it in the body")
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # A page of another site can send other kinds without asking this server first.
        raise Refused(415, "send the header Content-Type: application/json")
    try:
        return await asyncio.wait_for(_read(request), _BODY_S)
    except asyncio.TimeoutError as error:
        raise Refused(408, f"the body did not come within {_BODY_S:.0f} s") from error
    except ClientDisconnect as error:
        raise Refused(400, "the body did not come to its end") from error


async def _read(request: Request) -> bytes:
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > _BODY_BYTES:
            raise Refused(413, f"the body has more than {_BODY_BYTES} bytes")
    return bytes(body)


def refusal_of(refusal: Refused) -> Response:
    """Return what a client hears of a refusal."""
    return JSONResponse(refusal.body, refusal.status, refusal.headers)


async def unless_gone(request: Request, work: Awaitable[None]) -> None:
    """Wait for ``work`` as long as the client does.

    Raises:
        Refused: The client hung up.
    """
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_hang_up(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Refused(499, "the client hung up")
        await working
    finally:
        for task in (working, gone):
            task.cancel()
            with suppress(asyncio.CancelledError, Refused):
                await task


async def _hang_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Stream(StreamingResponse):
    """A streamed answer; however it ends, its job ends with it."""

    def __init__(self, content: AsyncIterator[str], job: Job, batcher: Batcher) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._job, self._batcher = job, batcher

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._batcher.cancel(self._job)


async def events_of(come: Coming, query: Query) -> AsyncIterator[str]:
    """Yield an answer as server-sent events; one that fails in between ends with an error object."""
    reply, opened = come.reply, set[int]()
    try:
        while not come.is_over:
            index, event = await come.next()
            if index not in opened:
                opened.add(index)
                opening = reply.opening(index)
                if opening is not None:
                    yield _sse(opening)
            if isinstance(event, Token):
                yield _sse(reply.piece(index, event))
            elif isinstance(event, Done):
                yield _sse(reply.closing(index))
        if query.tells_usage:
            yield _sse(reply.usage())
        yield "data: [DONE]\n\n"
    except Refused as refusal:
        yield _sse(refusal.body)


def _sse(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, allow_nan=False, separators=(',', ':'))}\n\n"
