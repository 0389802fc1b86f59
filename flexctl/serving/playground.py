"""The playground: one page at the server's own address, which asks the server as any other client does."""

from __future__ import annotations

from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from flexctl.shipped import template

__all__ = ["playground"]

_POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "connect-src": "'self'",
    "img-src": "data:",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    # No text becomes markup or code, whatever the script does with it.
    "require-trusted-types-for": "'script'",
    "trusted-types": "'none'",
}
_HEADERS = {
    "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in _POLICY.items()),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def playground() -> list[Route]:
    """Return the addresses of the page, its style and its script: files of ours, with nobody's words in them."""
    return [
        _file("/", _text("playground.html"), "text/html"),
        _file("/playground.css", template("pages.css") + _text("playground.css"), "text/css"),
        _file("/playground.js", _text("playground.js"), "text/javascript"),
    ]


def _file(path: str, text: str, kind: str) -> Route:
    async def answer(_request: Request) -> Response:
        return Response(text, media_type=kind, headers=_HEADERS)

    return Route(path, answer)


def _text(name: str) -> str:
    return (files("flexctl.serving") / name).read_text(encoding="utf-8")
