"""What comes from clients, within bounds: the name they ask for, and the bodies of their requests."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from starlette.requests import ClientDisconnect, Request
from starlette.types import Scope

from flexctl.serving.refusing import Refused

__all__ = ["LOCAL_NAMES", "check_host", "read_body"]

LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")
"""What a client on this machine calls it."""

_BODY_BYTES = 4 << 20
_BODY_S = 30.0


def check_host(scope: Scope, names: Sequence[str]) -> None:
    """Refuse a request to another name than a server of this machine alone has.

    A page of another site may have its name lead here; its requests bear that name.

    Args:
        scope: Of the request.
        names: Names in the Host header that are answered; empty is any.

    Raises:
        Refused: It asks for another name (403).
    """
    hosts = [value.decode("latin-1").lower() for name, value in scope["headers"] if name == b"host"]
    if names and not all(host.rsplit(":", 1)[0] in names or host in names for host in hosts):
        raise Refused(403, "this server answers on this machine alone: ask for it as localhost", code="wrong_host")


async def read_body(request: Request) -> bytes:
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
