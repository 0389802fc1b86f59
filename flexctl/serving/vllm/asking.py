"""What a request asks for, in the words that vLLM reads: the base model's name, a mask, and a salt of its own."""

from __future__ import annotations

import datetime
import json
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

from flexctl.bundle import model_name
from flexctl.bundle.names import shown
from flexctl.serving.permits import Grant, Key, Permits
from flexctl.serving.protocol import IGNORED, read_object, read_wish
from flexctl.serving.refusing import Refused
from flexctl.serving.vllm.masks import KEY, Served, mask_of, salt

__all__ = ["Asked", "read_asked"]

_WISHES = ("without", "only", "purpose")
_UNMASKABLE = ("kv_transfer_params", "prompt_embeds", "use_beam_search")
"""Fields by which vLLM answers in ways that carry no mask."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """One request.

    Attributes:
        grant: Who answers.
        body: What vLLM is to read.
    """

    grant: Grant
    body: bytes

    def model(self, served: Served) -> str:
        """Return the name of the model that answers: it says who is left out."""
        return model_name(served.name, self.grant.selection.without)

    def account(self, served: Served) -> dict[str, Any]:
        """Return who took part."""
        return self.grant.account(served.digest)


def read_asked(body: bytes, known: Container[str], served: Served, permits: Permits, key: Key | None) -> Asked:
    """Return what the body of a request asks for.

    Experts are named as for our own server, and may be so inside ``vllm_xargs``, as vLLM's clients are used to. A field
    that nobody knows is refused: it may be a misspelt mask.

    Args:
        body: JSON, as the client sent it.
        known: Fields that vLLM knows.
        served: The model.
        permits: Says who may answer.
        key: Whose key the request bears.

    Raises:
        Refused: It cannot be meant, or not be answered with a mask.
    """
    wish, rest = read_wish(_lifted(read_object(body)))
    grant = permits.grant(wish, key, datetime.date.today())
    for field in rest:
        if field not in known and field not in IGNORED:
            raise Refused(400, f"{shown(field)} is not a field that this server knows", param=field)
    for field in _UNMASKABLE:
        if rest.get(field):
            raise Refused(400, f"{field} cannot carry a mask of experts; leave it out", param=field)
    own = rest.get("cache_salt")
    if own is not None and not (isinstance(own, str) and own):
        raise Refused(400, "cache_salt must be text that is not empty", param="cache_salt")
    mask = mask_of(grant.selection.left_out)
    rest["model"] = served.name
    rest["vllm_xargs"] = {KEY: mask}
    rest["cache_salt"] = salt(served.digest, mask, own or "")
    return Asked(grant=grant, body=json.dumps(rest).encode())


def _lifted(fields: dict[str, Any]) -> dict[str, Any]:
    """Return a request that names experts beside its other fields, not inside ``vllm_xargs``."""
    inside = fields.get("vllm_xargs")
    if inside is None:
        return fields
    if not isinstance(inside, dict) or set(inside) - set(_WISHES):
        raise Refused(400, f"vllm_xargs must be an object of {', '.join(_WISHES)} alone", param="vllm_xargs")
    for name in inside:
        if fields.get(name) is not None:
            raise Refused(400, f"{name} stands there twice; leave it out of vllm_xargs", param=name)
    return {**fields, **inside, "vllm_xargs": None}
