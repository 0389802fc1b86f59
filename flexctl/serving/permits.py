"""Who may be used: the model's name, the request, its key and its purpose each leave out whom they leave out."""

from __future__ import annotations

import datetime
import hashlib
import hmac
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexctl import workspace
from flexctl.bundle import PUBLIC, Rights, Selection, forbidden, left_out_of, select
from flexctl.bundle.names import shown
from flexctl.errors import UsageError
from flexctl.serving.refusing import Refused, refused

__all__ = ["Grant", "Key", "Permits", "Wish", "read_keys"]

_SHA256 = re.compile(r"[0-9a-f]{64}")
_KEY_FIELDS = ("sha256", "experts")


@dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """An API key.

    Attributes:
        name: Whose it is.
        sha256: Of the key itself, bare hex.
        experts: Closed experts that it may use; None is all.
    """

    name: str
    sha256: str
    experts: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Wish:
    """Whom a request wants, and what for.

    Attributes:
        model: The served model's name, perhaps with who is left out.
        without: Closed experts that may not answer.
        only: The closed experts that may; None is all.
        purpose: What the answer is for; None is no purpose in particular.
    """

    model: str
    without: tuple[str, ...] = ()
    only: tuple[str, ...] | None = None
    purpose: str | None = None


@dataclass(frozen=True, slots=True)
class Grant:
    """Who answers a request.

    Attributes:
        selection: Who may.
        reasons: Closed expert that is left out -> why.
    """

    selection: Selection
    reasons: Mapping[str, str]

    def account(self, digest: str) -> dict[str, Any]:
        """Return who took part, as an answer says it: what a log needs to prove it.

        Args:
            digest: Of the served bundle.
        """
        selection = self.selection
        return {
            "digest": digest,
            "experts": [name for name in selection.experts if name not in selection.without],
            "without": list(selection.without),
            "reasons": dict(self.reasons),
        }


def read_keys(file: Path, experts: Sequence[str]) -> tuple[Key, ...]:
    """Return the API keys of a file: a TOML table a key, with the ``sha256`` of the key and perhaps its ``experts``.

    Args:
        file: The file.
        experts: All experts of the served model, the public one first.

    Raises:
        UsageError: It cannot be read, has no key, or a key is not right.
    """
    tables = workspace.read_toml(file)
    keys = tuple(_key(f"{file}: [{shown(name)[1:-1]}]", name, tables[name], experts) for name in tables)
    if not keys:
        raise UsageError(f"{file}: has no key", hint="write a table [NAME] with sha256 for each")
    for key in keys:
        twins = [other.name for other in keys if other.sha256 == key.sha256]
        if len(twins) > 1:
            raise UsageError(f"{file}: sha256 of [{twins[0]}] and [{twins[1]}] is the same; every key is one's own")
    return keys


def _key(where: str, name: str, fields: Any, experts: Sequence[str]) -> Key:
    if not isinstance(fields, dict):
        raise UsageError(f"{where} must be a table with sha256", hint="write a table [NAME] with sha256 for each key")
    unknown = sorted(set(fields) - set(_KEY_FIELDS))
    if unknown:
        raise UsageError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(_KEY_FIELDS)}")
    sha256, allowed = fields.get("sha256"), fields.get("experts")
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise UsageError(f"{where}: sha256 must be the SHA-256 of the key, 64 of 0-9 and a-f")
    if allowed is None:
        return Key(name=name, sha256=sha256)
    if not isinstance(allowed, list) or not all(isinstance(expert, str) for expert in allowed):
        raise UsageError(f"{where}: experts must be a list of names")
    for expert in allowed:
        if expert == PUBLIC or expert not in experts:
            there = ", ".join(experts[1:]) or "none"
            raise UsageError(f"{where}: experts names {expert!r}; closed experts of the model are {there}")
    return Key(name=name, sha256=sha256, experts=tuple(allowed))


class Permits:
    """Says who may answer what.

    Args:
        name: Of the served model, with all its experts.
        experts: All of them, the public one first.
        rights: What their owners allow.
        keys: Who may ask; none lets anybody.
    """

    def __init__(self, name: str, experts: Sequence[str], rights: Sequence[Rights], keys: Sequence[Key]) -> None:
        self.name, self.experts, self.rights = name, tuple(experts), tuple(rights)
        self._keys = tuple(keys)

    def holder(self, authorization: str | None) -> Key | None:
        """Return whose key a request bears; None where none is needed.

        Args:
            authorization: The header, ``Bearer KEY``.

        Raises:
            Refused: It is missing or wrong (401).
        """
        if not self._keys:
            return None
        scheme, _, secret = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not secret.strip():
            raise Refused(
                401, "an API key is needed: send the header Authorization: Bearer KEY", code="missing_api_key"
            )
        found = hashlib.sha256(secret.strip().encode("utf-8", "surrogateescape")).hexdigest()
        # Every key is compared in full: how long it takes tells nothing about any.
        fitting = [key for key in self._keys if hmac.compare_digest(key.sha256, found)]
        if not fitting:
            raise Refused(401, "the API key is not known here", code="invalid_api_key")
        return fitting[0]

    def grant(self, wish: Wish, key: Key | None, today: datetime.date) -> Grant:
        """Return who answers a request.

        Raises:
            Refused: It names a model or an expert that is not there (404, 400), or by ``only`` one that its key may not
                use (403).
        """
        try:
            named = left_out_of(wish.model, self.name, self.experts)
            asked = select(self.experts, self.name, without=(*named, *wish.without), only=wish.only)
        except UsageError as error:
            raise refused(error) from error
        barred = [] if key is None or key.experts is None else [e for e in self.experts[1:] if e not in key.experts]
        for expert in wish.only or ():
            if expert in barred:
                raise Refused(403, f"only: this key may not use {expert!r}", param="only", code="expert_not_allowed")
        reasons = dict.fromkeys(asked.without, "the request leaves it out")
        reasons |= dict.fromkeys(barred, "this key may not use it")
        if wish.purpose is not None:
            reasons |= forbidden(self.rights, wish.purpose, today)
        return Grant(select(self.experts, self.name, without=tuple(reasons)), dict(sorted(reasons.items())))
