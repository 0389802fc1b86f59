"""JSON, strictly: the canonical form that digests are taken of, and reading that believes nothing.

Laws: ``parse_json(canonical_json(x)) == x``; ``decode(type(x), encode(x)) == x``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexctl.bundle.names import shown
from flexctl.errors import BundleError
from flexctl.pointers import refuse_pointer

__all__ = [
    "OPTIONAL",
    "canonical_json",
    "decode",
    "digest_of_rest",
    "encode",
    "indented_json",
    "json_digest",
    "parse_json",
    "read_bytes",
]

OPTIONAL: Mapping[str, Any] = {"optional": True}
"""Metadata of a dataclass field that stands in the JSON only where it is not None: one that came later."""

MAX_JSON_BYTES = 100_000_000
_PLAIN = {str: "text", int: "a whole number", bool: "true or false"}


def canonical_json(value: Any) -> bytes:
    """Return ``value`` as the one text that it has: UTF-8, keys sorted by code point, no spaces, no NaN.

    Numbers are written as Python does: integers in full, floats as the shortest text that reads back the same.

    Raises:
        BundleError: A number is NaN or infinite, or a text is no valid Unicode.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return text.encode("utf-8")
    except ValueError as error:
        raise BundleError(f"a manifest cannot hold this: {error}") from error


def json_digest(value: Any) -> str:
    """Return ``sha256:`` and the hex SHA-256 of the canonical JSON of ``value``."""
    return "sha256:" + hashlib.sha256(canonical_json(value)).hexdigest()


def digest_of_rest(manifest: Any) -> str:
    """Return the digest that a manifest bears which is all there is: of its fields but ``digest``."""
    return json_digest({name: value for name, value in encode(manifest).items() if name != "digest"})


def indented_json(value: Any) -> bytes:
    """Return ``value`` as stock software writes its JSON files, with sorted keys and a final newline."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")


def parse_json(data: bytes, where: str) -> Any:
    """Return the value that ``data`` holds.

    Args:
        data: UTF-8 text.
        where: File, for the message.

    Raises:
        BundleError: It is not UTF-8, not JSON, nested too deeply, has a name twice in one object, or NaN.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise BundleError(f"{where}: {shown(name)} stands twice in one JSON object")
            found[name] = value
        return found

    def refuse_constant(name: str) -> Any:
        raise BundleError(f"{where}: holds {name}, which is not JSON")

    refuse_pointer(data, where)
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{where}: is not valid JSON ({shown(str(error))})") from error


def read_bytes(path: Path) -> bytes:
    """Return the whole of a small file of a bundle.

    Raises:
        BundleError: It is missing, cannot be read, or has more than 100 MB.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise BundleError(f"{path}: has more than {MAX_JSON_BYTES} bytes, too many for a file of this kind")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise BundleError(f"{path}: is missing") from error
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror})") from error


def encode(value: Any) -> Any:
    """Return dataclasses, mappings and tuples as the dictionaries and lists that JSON knows."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        named = ((field, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {field.name: encode(item) for field, item in named if item is not None or field.metadata != OPTIONAL}
    if isinstance(value, Mapping):
        return {name: encode(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    return value


def decode(kind: Any, value: Any, where: str, field: str = "") -> Any:
    """Return parsed JSON as a value of type ``kind``.

    Args:
        kind: A dataclass, str, int, float, bool, Any, tuple[X, ...], Mapping[str, X], or any of these | None.
        value: As from ``parse_json``.
        where: File, for the message.
        field: Dotted place inside the file, for the message.

    Raises:
        BundleError: A field is missing or unknown, or its value has another type.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        kinds = [argument for argument in arguments if argument is not type(None)]
        return None if value is None else decode(kinds[0], value, where, field)
    if origin is tuple and isinstance(value, list):
        return tuple(decode(arguments[0], item, where, f"{field}.{i}") for i, item in enumerate(value))
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _decode_fields(kind, value, where, field)
    if isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, dict):
        return {name: decode(arguments[1], item, where, _join(field, name)) for name, item in value.items()}
    if kind in _PLAIN and type(value) is kind:
        return value
    if kind is float and type(value) in (int, float):
        return value
    raise BundleError(f"{where}: {field or 'the manifest'} is {shown(value)}; expected {_expected(kind, origin)}")


def _decode_fields(kind: Any, value: dict[str, Any], where: str, field: str) -> Any:
    hints = typing.get_type_hints(kind)
    optional = {item.name for item in dataclasses.fields(kind) if item.metadata == OPTIONAL}
    for name in hints:
        if name not in value and name not in optional:
            raise BundleError(f"{where}: {_join(field, name)} is missing")
    for name in value:
        if name not in hints:
            raise BundleError(f"{where}: {_join(field, shown(name))} is no field that this version knows")
    return kind(**{name: decode(hints[name], item, where, _join(field, name)) for name, item in value.items()})


def _join(field: str, name: str) -> str:
    return f"{field}.{name}" if field else name


def _expected(kind: Any, origin: Any) -> str:
    if kind is float:
        return "a number"
    return _PLAIN.get(kind, "a list" if origin is tuple else "an object")
