"""What a request's mask is called on its way through vLLM's processes, and the salt that keeps its cache apart.

frontend      asking.py   names of experts -> mask and salt, in the body that vLLM reads
frontend      plugin.py   a request without both is refused
worker        rows.py     mask -> what is added to router logits, a row a token
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass

__all__ = ["KEY", "VARIABLE", "Served", "is_salted", "mask_of", "masked", "salt", "served"]

VARIABLE = "FLEXCTL_SERVED_BY_VLLM"
"""The environment variable by which ``flexctl serve`` asks for the plugin, in every process of the server."""

KEY = "flexctl_mask"
"""Where vLLM's ``extra_args`` of a request hold its mask."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """The model that vLLM serves.

    Attributes:
        bundle: Directory of the merged model.
        name: What it is called when all experts answer.
        digest: Its digest.
        num_experts: How many experts it has, the public one included.
        api_keys: File of the keys that may ask; None lets anybody.
        is_local: Whether it listens for this machine alone.
    """

    bundle: str
    name: str
    digest: str
    num_experts: int
    api_keys: str | None = None
    is_local: bool = True

    def environment(self) -> dict[str, str]:
        """Return the variable that tells every process of it."""
        return {VARIABLE: json.dumps(asdict(self))}


def served() -> Served | None:
    """Return the model that this process is to serve with masks; None where nobody asked for them."""
    said = os.environ.get(VARIABLE)
    return Served(**json.loads(said)) if said else None


def mask_of(left_out: Iterable[int]) -> str:
    """Return the mask that leaves out experts of these indices, as a request carries it: ``1,3``; empty is nobody."""
    return ",".join(map(str, sorted(set(left_out))))


@functools.lru_cache(maxsize=4096)
def masked(mask: str) -> tuple[int, ...]:
    """Return the indices in a mask: the inverse of ``mask_of``."""
    return tuple(map(int, mask.split(","))) if mask else ()


def salt(digest: str, mask: str, own: str = "") -> str:
    """Return the salt of a request's prefix cache: requests share a block only if model, mask and ``own`` are the same.

    Args:
        digest: Of the model.
        mask: As from ``mask_of``.
        own: The salt that the client asked for.
    """
    return f"{_seal(digest, mask)}.{_short(own)}"


def is_salted(found: str | None, digest: str, mask: str) -> bool:
    """Return whether a request's salt is one of ``salt(digest, mask, ...)``."""
    return (found or "").startswith(f"{_seal(digest, mask)}.")


def _seal(digest: str, mask: str) -> str:
    return _short(f"{digest} {mask}")


def _short(text: str) -> str:
    """Return 128 bits of a text's hash: vLLM takes salts of up to 128 characters, without some."""
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()[:32]
