"""The names of a server that answers this machine alone."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.types import Scope

from flexctl.serving.refusing import Refused

__all__ = ["LOCAL_NAMES", "check_host"]

LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")
"""What a client on this machine calls it."""


def check_host(scope: Scope, names: Sequence[str]) -> None:
    """Refuse a request to another name than a server of this machine alone has.

    A page of another site may have its name lead here; its requests bear that name.

    Args:
        scope: Of the request.
        names: Names in the Host header that are answered, beside the address that it came to; empty is any.

    Raises:
        Refused: It asks for another name (403).
    """
    hosts = [value.decode("latin-1").lower() for name, value in scope["headers"] if name == b"host"]
    own = (scope.get("server") or LOCAL_NAMES)[0]
    known = (*names, own, f"[{own}]")
    if names and not all(host.rsplit(":", 1)[0] in known or host in known for host in hosts):
        raise Refused(403, f"this server answers on this machine alone: ask for it as {own}", code="wrong_host")
