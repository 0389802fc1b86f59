"""Canonical JSON and strict reading."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexctl.bundle.codec import canonical_json, decode, encode, parse_json, read_bytes
from flexctl.errors import BundleError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
).filter(lambda value: "\\ud" not in json.dumps(value))


@dataclass(frozen=True)
class Inner:
    share: float
    note: str | None


@dataclass(frozen=True)
class Outer:
    count: int
    exact: bool
    names: tuple[str, ...]
    inner: Inner | None
    table: Mapping[str, Inner]
    free: Any


@given(VALUES)
def test_reading_gives_back_what_was_written(value: Any) -> None:
    data = canonical_json(value)
    assert parse_json(data, "x") == value
    assert canonical_json(parse_json(data, "x")) == data


def test_canonical_json_is_sorted_dense_utf8() -> None:
    assert canonical_json({"b": 1, "a": [1.5, None], "Z": "\u00e9"}) == b'{"Z":"\xc3\xa9","a":[1.5,null],"b":1}'


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "\ud800"])
def test_what_json_cannot_hold_is_refused(value: object) -> None:
    with pytest.raises(BundleError, match="cannot hold"):
        canonical_json({"loss": value})


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'{"a":1,"a":2}', "'a' stands twice"),
        (b'{"a":NaN}', "NaN"),
        (b'{"a":-Infinity}', "Infinity"),
        (b'{"a":', "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a":' + b"1" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_hostile_json_is_refused_in_one_line(data: bytes, reason: str) -> None:
    with pytest.raises(BundleError, match=reason) as caught:
        parse_json(data, "some/file")
    assert caught.value.message.startswith("some/file")
    assert "\n" not in caught.value.message


def test_dataclasses_come_back() -> None:
    value = Outer(3, True, ("a", "b"), Inner(0.5, None), {"x": Inner(1, "y")}, {"any": [1]})
    assert decode(Outer, parse_json(canonical_json(encode(value)), "f"), "f") == value


GOOD = {"count": 3, "exact": True, "names": [], "inner": None, "table": {}, "free": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": "3"}, "f: count is '3'; expected a whole number"),
        ({"count": True}, "f: count is True; expected a whole number"),
        ({"exact": 1}, "f: exact is 1; expected true or false"),
        ({"names": "ab"}, "f: names is 'ab'; expected a list"),
        ({"names": [1]}, "f: names.0 is 1; expected text"),
        ({"inner": []}, r"f: inner is \[\]; expected an object"),
        ({"inner": {"share": "x", "note": None}}, "f: inner.share is 'x'; expected a number"),
        ({"table": {"k": {"share": 1}}}, "f: table.k.note is missing"),
        ({"more": 1}, "f: 'more' is no field"),
    ],
)
def test_a_wrong_field_is_named_with_its_value(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        decode(Outer, GOOD | change, "f")


def test_a_missing_field_is_named() -> None:
    with pytest.raises(BundleError, match="f: count is missing"):
        decode(Outer, {}, "f")


def test_missing_and_huge_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"none\.json: is missing"):
        read_bytes(tmp_path / "none.json")
    with (tmp_path / "huge.json").open("wb") as file:
        file.truncate(10**9)
    with pytest.raises(BundleError, match=r"huge\.json: has more than"):
        read_bytes(tmp_path / "huge.json")
