"""The web application: requests in, jobs to the scheduler, answers out, whole or piece by piece."""

from __future__ import annotations

import asyncio
import datetime
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flexctl.bundle import left_out_of, model_name
from flexctl.errors import UsageError
from flexctl.runtime import Reporter
from flexctl.serving.batching import Batcher
from flexctl.serving.jobs import Ask, Busy, Done, Event, Failed, Job, Prompt, Token
from flexctl.serving.metrics import Metrics
from flexctl.serving.permits import Grant, Key, Permits
from flexctl.serving.playground import playground
from flexctl.serving.protocol import Query, read_chat, read_completion
from flexctl.serving.refusing import Refused, refused
from flexctl.serving.replies import Account, Reply
from flexctl.serving.sampling import Sampling

__all__ = ["Encoder", "Service", "make_app"]

_BODY_BYTES = 4 << 20
_BODY_S = 30.0
_RETRY_AFTER_S = 1

_FAILURES = {
    "timeout": (504, "the answer took longer than this server allows", "timeout"),
    "stopping": (503, "the server is stopping", "stopping"),
    "error": (500, "the model could not compute this answer", "model_error"),
}


class Encoder(Protocol):
    """Turns texts and conversations into token ids and back."""

    @property
    def has_template(self) -> bool:
        """Whether there is a chat template."""

    def encode(self, text: str) -> Sequence[int]:
        """Return a text's token ids."""

    def frame(self, messages: Sequence[Any]) -> Sequence[int]:
        """Return a conversation's token ids, up to the next answer."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of token ids."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Service:
    """What is served, and within which bounds.

    Attributes:
        batcher: Answers.
        encoder: Of the model.
        permits: Who may ask, and who answers.
        account: What every answer says of the model.
        metrics: Counts.
        context: The most tokens that prompt and answer may have.
        vocab_size: Of the model.
        max_new_tokens: Length of an answer at most.
        places: How many answers run or wait at most.
        timeout_s: How long an answer may take.
        reporter: Hears of what broke.
        local_names: Names in the Host header that are answered; empty is any.
        has_page: Whether the playground is at the server's own address.
    """

    batcher: Batcher
    encoder: Encoder
    permits: Permits
    account: Account
    metrics: Metrics
    context: int
    vocab_size: int
    max_new_tokens: int
    places: int
    timeout_s: float
    reporter: Reporter
    local_names: tuple[str, ...] = ()
    has_page: bool = False


def make_app(service: Service) -> ASGIApp:
    """Return the application that serves a model."""
    endpoints = _Endpoints(service)
    routes = [
        Route("/health", endpoints.health),
        Route("/metrics", endpoints.metrics),
        Route("/v1/models", endpoints.models),
        Route("/v1/models/{model:path}", endpoints.model),
        Route("/v1/completions", endpoints.completions, methods=["POST"]),
        Route("/v1/chat/completions", endpoints.chat, methods=["POST"]),
        *(playground() if service.has_page else ()),
    ]
    handlers: dict[Any, Callable[..., Awaitable[Response]]] = {
        Refused: _refusal,
        HTTPException: _no_route,
        Exception: endpoints.broken,
    }
    return _Counted(Starlette(routes=routes, exception_handlers=handlers), service)


async def _refusal(_request: Request, error: Refused) -> Response:
    return JSONResponse(error.body, error.status, error.headers)


async def _no_route(_request: Request, error: HTTPException) -> Response:
    said = {404: "there is no such address here", 405: "this address takes no such method"}
    refusal = Refused(error.status_code, said.get(error.status_code, error.detail))
    return JSONResponse(refusal.body, refusal.status, dict(error.headers or {}))


class _Counted:
    """Counts requests, and answers only those to a name of this machine where the server is this machine's own.

    A page of another site may have its name lead here; its requests bear that name.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.monotonic()
        status = 499  # as web servers write of clients that hung up

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if self._is_ours(scope):
                await self._app(scope, receive, watch)
            else:
                await _refusal_of_name(scope, receive, watch)
        finally:
            known = scope["path"] in ("/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions")
            endpoint = scope["path"] if known else "other"
            self._service.metrics.answered(endpoint, status, time.monotonic() - started)

    def _is_ours(self, scope: Scope) -> bool:
        names = self._service.local_names
        hosts = [value.decode("latin-1").lower() for name, value in scope["headers"] if name == b"host"]
        return not names or all(host.rsplit(":", 1)[0] in names or host in names for host in hosts)


async def _refusal_of_name(scope: Scope, receive: Receive, send: Send) -> None:
    refusal = Refused(403, "this server answers on this machine alone: ask for it as localhost", code="wrong_host")
    await JSONResponse(refusal.body, refusal.status)(scope, receive, send)


class _Endpoints:
    """What each address does."""

    def __init__(self, service: Service) -> None:
        self._service = service
        # One thread beside the scheduler's: texts are cut into tokens without holding up who is under way.
        self._encoding = ThreadPoolExecutor(1, thread_name_prefix="encode")

    async def health(self, _request: Request) -> Response:
        """Say whether answers are given."""
        if self._service.batcher.is_taking:
            return JSONResponse({"status": "ok"})
        raise Refused(503, "the server is stopping", code="stopping")

    async def metrics(self, _request: Request) -> Response:
        """Say what was counted."""
        batcher = self._service.batcher
        now = {
            "running": ("gauge", batcher.running),
            "waiting": ("gauge", batcher.waiting),
            "prompt_tokens_total": ("counter", batcher.prompt_tokens),
            "new_tokens_total": ("counter", batcher.new_tokens),
            "forward_passes_total": ("counter", batcher.passes),
        }
        text = self._service.metrics.text(now)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def models(self, request: Request) -> Response:
        """List the model's names: with all, and with each closed expert left out."""
        permits = self._service.permits
        permits.holder(request.headers.get("authorization"))
        removals = [(), *((name,) for name in permits.experts[1:])]
        return JSONResponse({"object": "list", "data": [self._model(without) for without in removals]})

    async def model(self, request: Request) -> Response:
        """Say what one of the model's names means."""
        permits = self._service.permits
        permits.holder(request.headers.get("authorization"))
        try:
            without = left_out_of(request.path_params["model"], permits.name, permits.experts)
        except UsageError as error:
            raise refused(error) from error
        return JSONResponse(self._model(without))

    def _model(self, without: tuple[str, ...]) -> dict[str, Any]:
        permits = self._service.permits
        about = {
            "digest": self._service.account.digest,
            "experts": [name for name in permits.experts if name not in without],
            "without": list(without),
            "rights": {entry.name: entry._asdict() for entry in permits.rights if entry.name not in without},
            "form": f"{permits.name}-without-A+B leaves out A and B",
            "explains": self._service.account.explains,
            "chat": self._service.encoder.has_template,
        }
        name = model_name(permits.name, without)
        return {"id": name, "object": "model", "created": 0, "owned_by": "flexctl", "flexctl": about}

    async def completions(self, request: Request) -> Response:
        """Go on with texts."""
        return await self._answer(request, read_completion)

    async def chat(self, request: Request) -> Response:
        """Go on with a conversation."""
        return await self._answer(request, read_chat)

    async def broken(self, request: Request, error: Exception) -> Response:
        """Say that something broke, and to the operator what kind of thing; the request's text stays out of it."""
        place = error.__traceback__
        while place is not None and place.tb_next is not None:
            place = place.tb_next
        where = f"{place.tb_frame.f_code.co_filename}:{place.tb_lineno}" if place else "nowhere"
        self._service.reporter.warn(f"{request.url.path}: unexpected {type(error).__name__} at {where}")
        return JSONResponse(Refused(500, "the server failed at this request").body, 500)

    async def _answer(self, request: Request, read: Callable[[bytes], Query]) -> Response:
        service, started = self._service, time.monotonic()
        key = service.permits.holder(request.headers.get("authorization"))
        query = read(await _body(request))
        reply, asks = await self._prepare(query, key)
        loop, events = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Event]]()

        def deliver(index: int, event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, (index, event))

        job = Job(asks=asks, deadline=started + service.timeout_s, deliver=deliver)
        try:
            service.batcher.submit(job)
        except Busy as busy:
            if not service.batcher.is_taking:
                raise Refused(503, "the server is stopping", code="stopping") from busy
            raise Refused(
                429, "all places are taken; try again", code="queue_full", retry_after_s=_RETRY_AFTER_S
            ) from busy
        come = _Coming(service, reply, events, started)
        if query.stream:
            return _Stream(_stream(come, query), job, service.batcher)
        try:
            await _unless_gone(request, come.all())
        finally:
            service.batcher.cancel(job)
        return JSONResponse(reply.whole())

    async def _prepare(self, query: Query, key: Key | None) -> tuple[Reply, tuple[Ask, ...]]:
        """Return an empty reply to a query, and what to ask of the scheduler for it."""
        service = self._service
        grant = service.permits.grant(query.wish, key, datetime.date.today())
        if query.is_chat and not service.encoder.has_template:
            message = "this model has no chat template, so it holds no conversations; use /v1/completions"
            raise Refused(400, message, code="no_chat_template")
        loop = asyncio.get_running_loop()
        prompts = await loop.run_in_executor(self._encoding, self._prompts, query)
        asks, answers = self._asks(query, grant, [tokens for tokens, _ in prompts]), len(prompts) * query.n
        if answers > service.places:
            raise Refused(
                400, f"{answers} answers are more than the {service.places} that this server holds", param="n"
            )
        service.metrics.left_out(grant.selection.without)
        each = [prompt for prompt in prompts for _ in range(query.n)]
        return Reply(query, grant, service.account, each, sum(len(tokens) for tokens, _ in prompts)), asks

    def _prompts(self, query: Query) -> list[tuple[tuple[int, ...], str]]:
        """Return each prompt's token ids, and its text where it is echoed."""
        encoder = self._service.encoder
        if query.is_chat:
            try:
                return [(tuple(encoder.frame(query.messages)), "")]
            except UsageError as error:
                raise refused(error) from error
        found = []
        for prompt in query.prompts:
            tokens = tuple(encoder.encode(prompt)) if isinstance(prompt, str) else prompt
            if any(not 0 <= token < self._service.vocab_size for token in tokens):
                raise Refused(400, f"prompt has a token beyond 0 to {self._service.vocab_size - 1}", param="prompt")
            text = prompt if isinstance(prompt, str) else encoder.decode(tokens) if query.echo else ""
            found.append((tokens, text))
        return found

    def _asks(self, query: Query, grant: Grant, prompts: Sequence[tuple[int, ...]]) -> tuple[Ask, ...]:
        first_seed = secrets.randbits(48) if query.seed is None else query.seed
        return tuple(
            Ask(
                tokens=tokens,
                left_out=grant.selection.left_out,
                max_new_tokens=self._length(query, len(tokens)),
                sampling=Sampling(
                    temperature=query.temperature,
                    top_p=query.top_p,
                    seed=first_seed + choice,
                    top_logprobs=query.top_logprobs,
                ),
                stop=query.stop,
                scores_prompt=query.echo and query.top_logprobs is not None,
            )
            for tokens in prompts
            for choice in range(query.n)
        )

    def _length(self, query: Query, prompt_tokens: int) -> int:
        """Return how long an answer to a prompt may become.

        Raises:
            Refused: The prompt has no token, or leaves no room for what is asked.
        """
        service, param = self._service, "messages" if query.is_chat else "prompt"
        if not prompt_tokens:
            raise Refused(400, "prompt has no token", param=param)
        wanted, room = query.max_new_tokens, service.context - prompt_tokens
        if wanted is not None and wanted > service.max_new_tokens:
            message = f"max_tokens is {wanted}; this server gives at most {service.max_new_tokens}"
            raise Refused(400, message, param="max_tokens")
        if room < (1 if wanted is None else wanted):
            message = (
                f"{param} has {prompt_tokens} tokens and the answer may have {wanted or 1}; together this model takes "
                f"{service.context}"
            )
            raise Refused(400, message, param=param, code="context_length_exceeded")
        return min(room, service.max_new_tokens) if wanted is None else wanted


class _Coming:
    """What comes of a job, added to its reply in the order in which it comes."""

    def __init__(
        self, service: Service, reply: Reply, events: asyncio.Queue[tuple[int, Event]], started: float
    ) -> None:
        self.reply = reply
        self._metrics = service.metrics
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


async def _body(request: Request) -> bytes:
    """Return a request's body.

    Raises:
        Refused: It is not JSON (415), too large (413), or does not come (408).
    """
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


async def _unless_gone(request: Request, work: Awaitable[None]) -> None:
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


class _Stream(StreamingResponse):
    """A streamed answer; however it ends, its job ends with it."""

    def __init__(self, content: AsyncIterator[str], job: Job, batcher: Batcher) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._job, self._batcher = job, batcher

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._batcher.cancel(self._job)


async def _stream(come: _Coming, query: Query) -> AsyncIterator[str]:
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
