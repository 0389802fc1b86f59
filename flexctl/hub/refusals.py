"""What huggingface_hub raises, as one line with a hint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flexctl.errors import FlexctlError, UsageError
from flexctl.hub.address import Address, DataAddress

__all__ = ["explained"]


@contextmanager
def explained(address: Address | DataAddress) -> Iterator[None]:
    """Turn what huggingface_hub raises in the block into a FlexctlError that names the address.

    The new error's cause is the Hub's answer where there is one. Errors of this machine's own, as a full disk, pass.
    """
    from huggingface_hub import errors

    # The network library's own root, whose name changes with huggingface_hub's version.
    network: Any = errors.HfHubHTTPError.__bases__[0]
    try:
        yield
    except (network, OSError, ValueError, RuntimeError) as error:
        chain = list(_chain(error))
        answer = next((cause for cause in chain if isinstance(cause, errors.HfHubHTTPError)), None)
        if answer is not None:
            raise _refusal(answer, address) from answer
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
            raise
        raise _failure(chain, address) from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _failure(chain: list[BaseException], address: Address | DataAddress) -> FlexctlError:
    """Return what it means that no answer came."""
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    if isinstance(chain[0], HFValidationError):
        return UsageError(f"{address.repository!r} is no name of a repository on the Hub")
    alone_in_cache = len(chain) == 1 and isinstance(chain[0], LocalEntryNotFoundError)
    if alone_in_cache or any(isinstance(cause, OfflineModeIsEnabled) for cause in chain):
        return FlexctlError(
            f"{address}: HF_HUB_OFFLINE is set, and the cache does not have all of it", hint="unset HF_HUB_OFFLINE"
        )
    reason = _one_line(next((str(cause) for cause in reversed(chain) if str(cause)), type(chain[0]).__name__))
    return FlexctlError(f"{address}: the connection to the Hub failed: {reason}", hint=_again(address))


def _refusal(error: Any, address: Address | DataAddress) -> FlexctlError:
    """Return what the Hub's refusal means."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    status = error.response.status_code
    said = _one_line(error.server_message or "")
    said = f": {said}" if said else ""
    log_in = "hf auth login, or set HF_TOKEN"
    if isinstance(error, GatedRepoError):
        hint = f"ask for access on the page of {address.repository}, then {log_in}"
        return FlexctlError(f"{address}: its owner grants access one by one ({status})", hint=hint)
    if isinstance(error, RepositoryNotFoundError):
        return UsageError(f"{address}: no such repository, or a private one that is not yours ({status})", hint=log_in)
    if isinstance(error, RevisionNotFoundError):
        return UsageError(f"{address}: no such revision ({status})")
    if status == 401:
        return FlexctlError(f"{address}: the Hub wants a valid token (401){said}", hint=log_in)
    if status == 403:
        owner, act = address.repository.split("/")[0], "read" if isinstance(address, DataAddress) else "write to"
        hint = f"use a token that may {act} {owner}"
        return FlexctlError(f"{address}: the token may not do this (403){said}", hint=hint)
    if status in (409, 412):
        return FlexctlError(f"{address}: was changed meanwhile ({status}){said}", hint="run the command again")
    if status == 429:
        wait = error.response.headers.get("Retry-After")
        when = f"in {wait} s" if wait and wait.isdigit() else "in some minutes"
        return FlexctlError(f"{address}: the Hub limits requests (429){said}", hint=_again(address, when))
    if status >= 500:
        return FlexctlError(f"{address}: the Hub is in trouble ({status}){said}", hint=_again(address, "later"))
    return FlexctlError(f"{address}: the Hub refused ({status}){said}")


def _again(address: Address | DataAddress, when: str = "") -> str:
    """Return the hint to try again; text is read from the Hub anew, a bundle's files stay in the cache."""
    hint = f"run it again {when}".rstrip()
    return hint if isinstance(address, DataAddress) else f"{hint}; what arrived is kept"


def _one_line(text: str) -> str:
    """Return what somebody else said as one short line, without the token."""
    from huggingface_hub import get_token

    token = get_token()
    line = " ".join(text.split())
    return (line.replace(token, "(token)") if token else line)[:300]
