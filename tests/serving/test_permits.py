"""Who may be used, by keys and by purposes; and the file of keys."""

from __future__ import annotations

import datetime
import hashlib
from pathlib import Path

import pytest

from flexctl.bundle import Rights
from flexctl.errors import UsageError
from flexctl.serving.permits import Key, Permits, Wish, read_keys
from flexctl.serving.refusing import Refused

EXPERTS = ("public", "code", "law", "sums")
RIGHTS = (
    Rights("code", None, ("research",), None),
    Rights("law", None, (), "2026-01-31"),
    Rights("sums", None, (), None),
)
TODAY = datetime.date(2026, 6, 1)


def digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


KEYS = (
    Key(name="all", sha256=digest("sk-all")),
    Key(name="some", sha256=digest("sk-some"), experts=("code", "sums")),
    Key(name="none", sha256=digest("sk-none"), experts=()),
)
PERMITS = Permits("m", EXPERTS, RIGHTS, KEYS)


@pytest.mark.parametrize(
    ("key", "wish", "reasons"),
    [
        (None, Wish(model="m"), {}),
        (KEYS[0], Wish(model="m"), {}),
        (KEYS[1], Wish(model="m"), {"law": "this key may not use it"}),
        (KEYS[2], Wish(model="m"), dict.fromkeys(EXPERTS[1:], "this key may not use it")),
        (
            KEYS[1],
            Wish(model="m-without-code", without=("sums",)),
            {
                "code": "the request leaves it out",
                "law": "this key may not use it",
                "sums": "the request leaves it out",
            },
        ),
        (
            KEYS[1],
            Wish(model="m", only=("sums",), purpose="commercial"),
            {
                "code": "it is for research, not for 'commercial'",
                "law": "its rights ended on 2026-01-31",
            },
        ),
        (
            None,
            Wish(model="m", only=("law",), without=("law",)),
            dict.fromkeys(EXPERTS[1:], "the request leaves it out"),
        ),
    ],
)
def test_whoever_is_left_out_for_any_reason_is(key: Key | None, wish: Wish, reasons: dict[str, str]) -> None:
    grant = PERMITS.grant(wish, key, TODAY)
    assert grant.reasons == reasons
    assert grant.selection.without == tuple(sorted(reasons))


@pytest.mark.parametrize(
    ("wish", "status", "says"),
    [
        (Wish(model="n"), 404, "model: 'n' is not served here; m is, and m-without-A+B leaves out A and B"),
        (Wish(model="m", without=("x",)), 400, "without: 'x' is not in m, which holds public, code, law, sums"),
        (Wish(model="m", only=("code", "law")), 403, "only: this key may not use 'law'"),
    ],
)
def test_refusals_name_what_there_is(wish: Wish, status: int, says: str) -> None:
    with pytest.raises(Refused) as caught:
        PERMITS.grant(wish, KEYS[1], TODAY)
    assert (caught.value.status, caught.value.message[: len(says)]) == (status, says)


@pytest.mark.parametrize("header", ["Bearer sk-some", "bearer  sk-some ", "BEARER sk-some"])
def test_a_key_is_known_by_its_hash(header: str) -> None:
    assert PERMITS.holder(header) == KEYS[1]


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer ", "sk-some", "Basic sk-some", "Bearer sk-some2", "Bearer " + digest("sk-all")],
)
def test_a_wrong_key_is_refused(header: str | None) -> None:
    with pytest.raises(Refused) as caught:
        PERMITS.holder(header)
    assert caught.value.status == 401
    assert caught.value.headers == {"WWW-Authenticate": "Bearer"}
    assert "sk-some" not in caught.value.message


def test_without_keys_everybody_may_ask() -> None:
    assert Permits("m", EXPERTS, RIGHTS, ()).holder(None) is None


def test_keys_are_read(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(f'[all]\nsha256 = "{digest("a")}"\n[some]\nsha256 = "{digest("b")}"\nexperts = ["law"]\n')
    assert read_keys(file, EXPERTS) == (
        Key(name="all", sha256=digest("a")),
        Key(name="some", sha256=digest("b"), experts=("law",)),
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", ": has no key"),
        ("a = 1", ": [a] must be a table with sha256"),
        ("[a]", ": [a]: sha256 must be the SHA-256 of the key, 64 of 0-9 and a-f"),
        ('[a]\nsha256 = "sk-secret"', ": [a]: sha256 must be the SHA-256 of the key, 64 of 0-9 and a-f"),
        ('[a]\nkey = "sk"', ": [a]: unknown key 'key'; known are sha256, experts"),
        (f'[a]\nsha256 = "{digest("a")}"\nexperts = "law"', ": [a]: experts must be a list of names"),
        (
            f'[a]\nsha256 = "{digest("a")}"\nexperts = ["public"]',
            ": [a]: experts names 'public'; closed experts of the",
        ),
        (
            f'[a]\nsha256 = "{digest("a")}"\nexperts = ["x"]',
            ": [a]: experts names 'x'; closed experts of the model are",
        ),
        (f'[a]\nsha256 = "{digest("a")}"\n[b]\nsha256 = "{digest("a")}"', ": sha256 of [a] and [b] is the same; every"),
        ("[a", ": not valid TOML"),
        ('["a\\n b"]', ": [a\\n b]: sha256 must be"),
    ],
)
def test_a_file_of_keys_that_is_wrong(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        read_keys(file, EXPERTS)
    assert caught.value.message.startswith(f"{file}{says}")
    assert "sk-secret" not in caught.value.message


def test_a_file_of_keys_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"keys\.toml: cannot be read"):
        read_keys(tmp_path / "keys.toml", EXPERTS)
