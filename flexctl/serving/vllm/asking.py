"""What a request to vLLM asks for: who may answer, and the body that vLLM is to read."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexctl.bundle import (
    PUBLIC,
    Selection,
    forbidden,
    left_out_of,
    model_name,
    open_merged,
    rights_of,
    select,
)
from flexctl.errors import UsageError
from flexctl.serving.vllm.masks import KEY, Served, mask_of, salt

__all__ = ["Asked", "Asking"]

_FIELDS = ("without", "only", "purpose")


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """One request.

    Attributes:
        model: The model's name, as the client said it.
        body: What vLLM reads: the base model's name, the mask, and a salt of its own for the cache.
        note: The field ``flexctl`` of the answer.
    """

    model: str
    body: dict[str, Any]
    note: dict[str, Any]


class Asking:
    """Reads requests to one served model.

    Args:
        model: What is served.
    """

    def __init__(self, model: Served) -> None:
        merged = open_merged(Path(model.bundle))
        self._model, self._rights = model, rights_of(merged)
        self.experts = (PUBLIC, *merged.names)

    def names(self) -> list[str]:
        """Return the names to list: all experts, and each single removal."""
        base = self._model.name
        return [base, *(model_name(base, [expert]) for expert in self.experts[1:])]

    def read(self, body: Mapping[str, Any]) -> Asked:
        """Return what a request asks for.

        Args:
            body: The JSON object that the client sent.

        Raises:
            UsageError: The model is not there (its field is ``model``), or another field cannot be meant.
        """
        told = dict(body)
        extra = told.pop("vllm_xargs", None)
        extra = {} if extra is None else extra
        if not isinstance(extra, dict) or KEY in extra:
            raise UsageError(f"it is an object without {KEY!r}", field="vllm_xargs")
        wishes = self._wishes(told, extra)
        name = told.get("model")
        if not isinstance(name, str):
            raise UsageError(f"name one, as {self._model.name!r}", field="model")
        selection, reasons = self._select(name, wishes)
        for field in ("use_beam_search", "prompt_embeds", "kv_transfer_params"):
            if told.get(field):
                raise UsageError("it cannot carry a mask of experts", hint="leave it out", field=field)
        own = told.get("cache_salt")
        if own is not None and not (isinstance(own, str) and own):
            raise UsageError("it is a text that is not empty", field="cache_salt")
        mask = mask_of(selection.left_out)
        told["model"] = self._model.name
        told["vllm_xargs"] = {**extra, KEY: mask}
        told["cache_salt"] = salt(self._model.digest, mask, own or "")
        return Asked(model=name, body=told, note=self._note(selection, reasons))

    def _wishes(self, told: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        """Take what is said about experts out of both places where a client can say it."""
        found: dict[str, Any] = {}
        for field in _FIELDS:
            said = [place.pop(field) for place in (told, extra) if field in place]
            if len(said) > 1:
                raise UsageError("it is said twice", hint="leave it out of vllm_xargs", field=field)
            found |= {field: value for value in said if value is not None}
        return found

    def _select(self, name: str, wishes: Mapping[str, Any]) -> tuple[Selection, dict[str, str]]:
        purpose = wishes.get("purpose")
        if purpose is not None and not (isinstance(purpose, str) and purpose.strip()):
            raise UsageError("it is one text, as 'commercial'", field="purpose")
        without = left_out_of(name, self._model.name, self.experts)
        if "without" in wishes:
            without += _named(wishes["without"], "without")
        only = _named(wishes["only"], "only") if "only" in wishes else None
        reasons = {} if purpose is None else forbidden(self._rights, purpose, datetime.date.today())
        selection = select(self.experts, self._model.name, without=without, only=only)
        return select(self.experts, self._model.name, without=(*selection.without, *reasons)), reasons

    def _note(self, selection: Selection, reasons: Mapping[str, str]) -> dict[str, Any]:
        used = [name for name in self.experts if name not in selection.without]
        return {
            "digest": self._model.digest,
            "experts": used,
            "without": list(selection.without),
            "reasons": dict(reasons),
        }


def _named(value: Any, field: str) -> tuple[str, ...]:
    """Return the experts that a request names: one name, or a list of names."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UsageError("it is a list of names of experts that is not empty", field=field)
    return tuple(names)
