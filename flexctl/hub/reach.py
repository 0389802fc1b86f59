"""The Hub as this machine has it: its address, whether it answers, where its files are cached."""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from pathlib import Path

__all__ = ["TIMEOUT_S", "cache_place", "endpoint", "reach"]

TIMEOUT_S = 3.0
"""How long ``reach`` waits."""


def endpoint() -> str:
    """Return the address of the Hub: HF_ENDPOINT, or the public one."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def cache_place() -> Path:
    """Return the folder where huggingface_hub keeps what it fetched."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def reach() -> str:
    """Ask the Hub for nothing, and return how that went: ``reachable``, or why not, in one line."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "not asked, as HF_HUB_OFFLINE is set"
    try:
        with urllib.request.urlopen(urllib.request.Request(endpoint(), method="HEAD"), timeout=TIMEOUT_S):
            return "reachable"
    except urllib.error.HTTPError as error:
        return "reachable" if error.code < 500 else f"not well: HTTP {error.code}"
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = str(getattr(error, "reason", error)) or type(error).__name__
        return f"not reachable: {reason.splitlines()[0]}"
