"""What a client hears when there is no answer: one line, in the form of OpenAI's errors. Never a traceback."""

from __future__ import annotations

from typing import Any

from flexctl.bundle.names import shown
from flexctl.errors import UsageError

__all__ = ["Refused", "refused"]

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Refused(Exception):
    """A request that is not answered.

    Args:
        status: Of HTTP.
        message: What is wrong and what there is, one line.
        param: The field that it is about.
        code: A word for programs.
        retry_after_s: When it is worth another try.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message, self.param, self.code = message, param, code
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> dict[str, Any]:
        """The error object."""
        # A client may have named the field, so it is as long as may be, and perhaps no text.
        param = None if self.param is None else shown(self.param)[1:-1]
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """What goes with it."""
        headers = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        # What is left of a body that was not read must not be taken for the next request.
        return headers | {"Connection": "close"} if self.status in (408, 413) else headers


def refused(error: UsageError) -> Refused:
    """Return how a request hears of a wrong setting: a model that is not there is 404, all else 400."""
    message = error.message if error.hint is None else f"{error.message}; {error.hint}"
    if error.field == "model":
        return Refused(404, message, param="model", code="model_not_found")
    return Refused(400, message, param=error.field)
