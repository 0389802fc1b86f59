"""Changing valid files as a careless disk or a hostile hand might: bytes, and values inside JSON."""

from __future__ import annotations

import json
import random
from typing import Any

__all__ = ["mutated"]

_BYTES = (
    b"",
    b"\x00",
    b"\xff" * 8,
    b"\xff\xff\xff\x7f\x00\x00\x00\x00",
    b"\x80",
    b"\xed\xa0\x80",
    b"{",
    b"[" * 2000,
    b'"',
    b"\\u0000",
    b"\\ud800",
    b"NaN",
    b"1e999",
    b"-1",
    b"9" * 5000,
    b"../",
    b"\n",
    b"\r\n",
    b",",
    b"\xef\xbb\xbf",
)
_VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    2**31,
    2**63,
    10**30,
    0.5,
    "",
    "a" * 3000,
    "../../etc/passwd",
    "/etc/passwd",
    "\x00",
    "\u202e",
    [],
    {},
    [[]],
    {"": {}},
    [1, "2", None],
)


def mutated(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """Return ``data`` with one to four changes; parts of ``others`` may come in."""
    for _ in range(rng.randint(1, 4)):
        data = rng.choice((_flipped, _cut, _put, _repeated, _spliced, _other_value, _other_value))(rng, data, others)
    return data


def _flipped(rng: random.Random, data: bytes, _others: list[bytes]) -> bytes:
    if not data:
        return data
    place = rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]


def _cut(rng: random.Random, data: bytes, _others: list[bytes]) -> bytes:
    first, last = sorted(rng.randint(0, len(data)) for _ in range(2))
    return data[:first] + data[last:] if rng.random() < 0.7 else data[:first]


def _put(rng: random.Random, data: bytes, _others: list[bytes]) -> bytes:
    place, put = rng.randint(0, len(data)), rng.choice(_BYTES)
    over = len(put) if rng.random() < 0.5 else 0
    return data[:place] + put + data[place + over :]


def _repeated(rng: random.Random, data: bytes, _others: list[bytes]) -> bytes:
    first, last = sorted(rng.randint(0, len(data)) for _ in range(2))
    return data[:last] + data[first:last] * rng.randint(1, 3) + data[last:]


def _spliced(rng: random.Random, data: bytes, others: list[bytes]) -> bytes:
    other = rng.choice(others)
    first, last = sorted(rng.randint(0, len(other)) for _ in range(2))
    place = rng.randint(0, len(data))
    return data[:place] + other[first:last] + data[place:]


def _other_value(rng: random.Random, data: bytes, _others: list[bytes]) -> bytes:
    """Change a value inside the JSON that a file is, or begins with behind its length as safetensors do."""
    for start, length in ((0, len(data)), (8, int.from_bytes(data[:8], "little"))):
        try:
            value = json.loads(data[start : start + length])
        except (ValueError, RecursionError, OverflowError):
            continue
        if not isinstance(value, dict):
            continue
        _change(rng, value)
        text = json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
        head = len(text).to_bytes(8, "little") if start else b""
        return head + text + data[start + length :]
    return _flipped(rng, data, _others)


def _change(rng: random.Random, value: Any) -> None:
    """Change, drop, or add one thing somewhere inside; a text that is JSON itself is gone into."""
    while isinstance(value, dict) and value:
        key = rng.choice(list(value))
        inner = value[key]
        if isinstance(inner, str) and inner.startswith("{") and rng.random() < 0.9:
            try:
                nested = json.loads(inner)
            except (ValueError, RecursionError):
                nested = None
            if isinstance(nested, dict):
                _change(rng, nested)
                value[key] = json.dumps(nested, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
                return
        if isinstance(inner, dict) and inner and rng.random() < 0.7:
            value = inner
            continue
        what = rng.random()
        if what < 0.2:
            del value[key]
        elif what < 0.3:
            value[rng.choice(("more", "__proto__", "../x", key * 2))] = rng.choice(_VALUES)
        else:
            value[key] = rng.choice(_VALUES)
        return
