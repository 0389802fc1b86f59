"""What clients of OpenAI's protocol may ask for, read field by field.

A field that would change the answer and that this server does not know is refused, never ignored: a mask that is
misspelt must not be answered by all experts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from flexctl.bundle.names import shown
from flexctl.serving.permits import Wish
from flexctl.serving.refusing import Refused

__all__ = ["IGNORED", "Query", "read_chat", "read_completion", "read_object", "read_wish"]

_MOST_STOPS = 16
_MOST_LOGPROBS = 20
_MOST_CHOICES = 128
_COMPLETION_TOKENS = 16
"""The protocol's default length of a completion."""

IGNORED = ("metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user")
"""Fields that change no answer."""

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}
"""Fields that are known and not supported -> values that change no answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Query:
    """A request for answers.

    Attributes:
        wish: Who may answer.
        prompts: Texts or token ids to go on with; empty for a conversation.
        messages: The conversation; empty for prompts.
        n: Answers to each.
        max_new_tokens: Their length at most; None is as long as there is room.
        temperature: 0 takes the likeliest token.
        top_p: Tokens are drawn from the likeliest that have this share of the probability together.
        seed: Of what is drawn; None takes another one each time.
        stop: Texts at which an answer stops.
        top_logprobs: How many likely tokens are told with each token; None tells no log probability.
        echo: Whether the prompt is part of the answer.
        stream: Whether the answer comes piece by piece.
        tells_usage: Whether a stream ends with the number of tokens.
    """

    wish: Wish
    prompts: tuple[str | tuple[int, ...], ...] = ()
    messages: tuple[Mapping[str, str], ...] = ()
    n: int
    max_new_tokens: int | None
    temperature: float
    top_p: float
    seed: int | None
    stop: tuple[str, ...]
    top_logprobs: int | None
    echo: bool = False
    stream: bool
    tells_usage: bool

    @property
    def is_chat(self) -> bool:
        """Whether it is a conversation."""
        return bool(self.messages)


def read_completion(body: bytes) -> Query:
    """Return what the body of ``/v1/completions`` asks for.

    Raises:
        Refused: It is no JSON object, or a field is wrong or not known.
    """
    fields = _Fields(read_object(body))
    prompts = _prompts(fields)
    query = Query(
        prompts=prompts,
        max_new_tokens=_or_default(fields.integer("max_tokens", 0), _COMPLETION_TOKENS),
        top_logprobs=fields.integer("logprobs", 0, _MOST_LOGPROBS),
        echo=fields.flag("echo"),
        **_common(fields),
    )
    if not query.max_new_tokens and not query.echo:
        _refuse("max_tokens", "is 0, which only goes with echo")
    return query


def read_chat(body: bytes) -> Query:
    """Return what the body of ``/v1/chat/completions`` asks for.

    Raises:
        Refused: It is no JSON object, or a field is wrong or not known.
    """
    fields = _Fields(read_object(body))
    lengths = [fields.integer(name, 1) for name in ("max_completion_tokens", "max_tokens")]
    tells, top = fields.flag("logprobs"), fields.integer("top_logprobs", 0, _MOST_LOGPROBS)
    if top and not tells:
        _refuse("top_logprobs", "needs logprobs: true")
    return Query(
        messages=_messages(fields.take("messages")),
        max_new_tokens=next((length for length in lengths if length is not None), None),
        top_logprobs=(top or 0) if tells else None,
        **_common(fields),
    )


def read_wish(fields: Mapping[str, Any]) -> tuple[Wish, dict[str, Any]]:
    """Return whom a request wants, and its other fields as they are: another server is to read these.

    Args:
        fields: As from ``read_object``.

    Raises:
        Refused: One of the fields about experts is wrong.
    """
    found = _Fields(fields)
    return _wish(found), found.rest()


def read_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object that a body is.

    Raises:
        Refused: It is none.
    """
    try:
        fields = json.loads(body.decode("utf-8"), object_pairs_hook=_object, parse_constant=_no_constant)
    except RecursionError as error:
        raise Refused(400, "the body is nested too deeply") from error
    except ValueError as error:
        raise Refused(400, f"the body is not valid JSON: {shown(str(error))}") from error
    if not isinstance(fields, dict):
        raise Refused(400, "the body must be a JSON object")
    return fields


def _wish(fields: _Fields) -> Wish:
    model = fields.text("model")
    if model is None:
        _refuse("model", "is missing; GET /v1/models lists what is served")
    return Wish(
        model=model,
        without=fields.names("without") or (),
        only=fields.names("only"),
        purpose=fields.text("purpose"),
    )


def _common(fields: _Fields) -> dict[str, Any]:
    """Return the fields that both kinds of requests have; whatever is left then is refused."""
    wish = _wish(fields)
    stream, options = fields.flag("stream"), fields.take("stream_options")
    if options is not None and not stream:
        _refuse("stream_options", "needs stream: true")
    found = {
        "wish": wish,
        "n": _or_default(fields.integer("n", 1, _MOST_CHOICES), 1),
        "temperature": _or_default(fields.number("temperature", 0, 100), 1.0),
        "top_p": _or_default(fields.number("top_p", 0, 1), 1.0),
        "seed": fields.integer("seed", -(2**63), 2**63 - 1),
        "stop": _stops(fields.take("stop")),
        "stream": stream,
        "tells_usage": _tells_usage(options),
    }
    fields.end()
    return found


class _Fields:
    """The fields of a JSON object, each taken once; null is as if it were not there."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = dict(fields)

    def take(self, name: str) -> Any:
        return self._fields.pop(name, None)

    def text(self, name: str) -> str | None:
        value = self.take(name)
        if value is not None and (not isinstance(value, str) or not value.strip()):
            _refuse(name, f"is {shown(value)}; it must be text")
        return None if value is None else _sound(name, value)

    def flag(self, name: str) -> bool:
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            _refuse(name, f"is {shown(value)}; it must be true or false")
        return bool(value)

    def integer(self, name: str, least: int, most: int = 2**31) -> int | None:
        value = self.take(name)
        if value is not None and (type(value) is not int or not least <= value <= most):
            _refuse(name, f"is {shown(value)}; it must be a whole number from {least} to {most}")
        return value

    def number(self, name: str, least: float, most: float) -> float | None:
        value = self.take(name)
        if value is not None and (type(value) not in (int, float) or not least <= value <= most):
            _refuse(name, f"is {shown(value)}; it must be a number from {least} to {most}")
        return None if value is None else float(value)

    def names(self, name: str) -> tuple[str, ...] | None:
        value = self.take(name)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            _refuse(name, f"is {shown(value)}; it must be a list of experts' names")
        if not value:
            _refuse(name, "is empty; name closed experts, or leave the field out")
        return tuple(value)

    def rest(self) -> dict[str, Any]:
        """Return what nobody has taken."""
        return dict(self._fields)

    def end(self) -> None:
        """Refuse what nobody has taken."""
        for name, value in self._fields.items():
            if name in IGNORED or value is None or value in _NEUTRAL.get(name, ()):
                continue
            if name in _NEUTRAL:
                _refuse(name, f"is {shown(value)}, which this server does not support")
            _refuse(name, "is not a field that this server knows", where=shown(name))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a field stands there twice")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _refuse(param: str, problem: str, *, where: str | None = None) -> NoReturn:
    raise Refused(400, f"{where or param} {problem}", param=param)


def _or_default(value: Any, default: Any) -> Any:
    return default if value is None else value


def _sound(param: str, text: str) -> str:
    """Return text that can be written as UTF-8."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        _refuse(param, "has half a surrogate pair, which is no text")
    return text


def _stops(value: Any) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > _MOST_STOPS or not all(isinstance(s, str) and s for s in stops):
        _refuse("stop", f"must be text, or a list of at most {_MOST_STOPS} texts, none empty")
    return tuple(stops)


def _tells_usage(options: Any) -> bool:
    if options is None:
        return False
    if not isinstance(options, dict) or set(options) - {"include_usage", "include_obfuscation"}:
        _refuse("stream_options", f"is {shown(options)}; it may have include_usage")
    if type(options.get("include_usage", False)) is not bool:
        _refuse("stream_options", "must have true or false as include_usage")
    return bool(options.get("include_usage"))


def _prompts(fields: _Fields) -> tuple[str | tuple[int, ...], ...]:
    """Return the prompts: a text, token ids, or a list of either."""
    value = fields.take("prompt")
    if isinstance(value, str):
        return (_sound("prompt", value),)
    if isinstance(value, list) and value:
        if all(type(item) is int for item in value):
            return (tuple(value),)
        if all(isinstance(item, str) for item in value):
            return tuple(_sound("prompt", item) for item in value)
        if all(isinstance(item, list) and item and all(type(token) is int for token in item) for item in value):
            return tuple(tuple(item) for item in value)
    _refuse("prompt", "must be text, a list of token ids, or a list of either")


def _messages(value: Any) -> tuple[Mapping[str, str], ...]:
    if not isinstance(value, list) or not value:
        _refuse("messages", "must be a list of messages, each with role and content")
    return tuple(_message(f"messages.{i}", message) for i, message in enumerate(value))


def _message(where: str, message: Any) -> Mapping[str, str]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        _refuse("messages", "must have role and content", where=where)
    unknown = sorted(set(message) - {"role", "content", "name"})
    if unknown:
        _refuse("messages", f"has {shown(unknown[0])}, which this server does not support", where=where)
    found = {"role": _sound("messages", message["role"]), "content": _content(where, message.get("content"))}
    if message.get("name") is not None:
        if not isinstance(message["name"], str):
            _refuse("messages", "must be text", where=f"{where}.name")
        found["name"] = _sound("messages", message["name"])
    return found


def _content(where: str, content: Any) -> str:
    """Return a message's text: text, or a list of parts of it."""
    parts: Sequence[Any] = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        _refuse("messages", "must be text", where=f"{where}.content")
    for part in parts:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            _refuse("messages", "has a part that is not text", where=f"{where}.content")
    return _sound("messages", "".join(part["text"] for part in parts))
