"""The web application: requests in, jobs to the scheduler, answers out, whole or piece by piece."""

from __future__ import annotations

import asyncio
import datetime
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flexctl.serving.asking import Service, prepare
from flexctl.serving.exchange import Coming, Stream, body_of, events_of, refusal_of, unless_gone
from flexctl.serving.hosts import check_host
from flexctl.serving.jobs import Busy, Event, Job
from flexctl.serving.listing import Listing
from flexctl.serving.playground import playground
from flexctl.serving.protocol import Query, read_chat, read_completion
from flexctl.serving.refusing import Refused

__all__ = ["make_app"]

_RETRY_AFTER_S = 1


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
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False  # else the client's Host header says where to
    return _Counted(app, service)


async def _refusal(_request: Request, error: Refused) -> Response:
    return refusal_of(error)


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
            check_host(scope, self._service.local_names)
            await self._app(scope, receive, watch)
        except Refused as refusal:
            await refusal_of(refusal)(scope, receive, watch)
        finally:
            known = scope["path"] in ("/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions")
            endpoint = scope["path"] if known else "other"
            self._service.metrics.answered(endpoint, status, time.monotonic() - started)


class _Endpoints:
    """What each address does."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._listing = Listing(
            service.permits, service.account.digest, service.account.explains, service.encoder.has_template
        )
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
        self._service.permits.holder(request.headers.get("authorization"))
        return JSONResponse(self._listing.all())

    async def model(self, request: Request) -> Response:
        """Say what one of the model's names means."""
        self._service.permits.holder(request.headers.get("authorization"))
        return JSONResponse(self._listing.one(request.path_params["model"]))

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
        return refusal_of(Refused(500, "the server failed at this request"))

    async def _answer(self, request: Request, read: Callable[[bytes], Query]) -> Response:
        service, started = self._service, time.monotonic()
        key = service.permits.holder(request.headers.get("authorization"))
        query = read(await body_of(request))
        grant = service.permits.grant(query.wish, key, datetime.date.today())
        service.metrics.left_out(grant.selection.without)
        loop, events = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Event]]()
        reply, asks = await loop.run_in_executor(self._encoding, prepare, service, query, grant)

        def deliver(index: int, event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, (index, event))

        job = Job(asks=asks, deadline=started + service.timeout_s, deliver=deliver)
        self._submit(job)
        come = Coming(service.metrics, reply, events, started)
        if query.stream:
            return Stream(events_of(come, query), job, service.batcher)
        try:
            await unless_gone(request, come.all())
        finally:
            service.batcher.cancel(job)
        return JSONResponse(reply.whole())

    def _submit(self, job: Job) -> None:
        try:
            self._service.batcher.submit(job)
        except Busy as busy:
            if not self._service.batcher.is_taking:
                raise Refused(503, "the server is stopping", code="stopping") from busy
            message = "all places are taken; try again"
            raise Refused(429, message, code="queue_full", retry_after_s=_RETRY_AFTER_S) from busy
