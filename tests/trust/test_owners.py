"""Trust files: every field checked, and what a key may sign, when."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from signers import make_trust, refused_in_one_line

from flexctl.errors import UsageError
from flexctl.trust.owners import read_trust

KEY = 'key = "MCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE="\n'
GOOD = f'[[owners]]\nname = "Acme"\n{KEY}'
TODAY = datetime.date(2026, 6, 15)


@pytest.fixture(autouse=True)
def _stand_apart(in_empty_folder: Path) -> None:
    del in_empty_folder


def test_a_trust_file_is_read() -> None:
    more = 'bundles = ["law", "law-*"]\nvalid_from = 2026-01-01\nvalid_until = 2026-12-31\n'
    (owner,) = read_trust(make_trust(GOOD + more))
    assert (owner.name, owner.bundles, owner.ends) == ("Acme", ("law", "law-*"), "until 2026-12-31")
    assert read_trust(make_trust(GOOD))[0].ends == "without end"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "expected owners alone, each written"),
        ("owners = 3", "expected owners alone"),
        ("owners = [3]", r"owners\.0 is 3; expected a table"),
        (f"{GOOD}\n[other]\n", "expected owners alone"),
        (f"[[owners]]\n{KEY}", r"owners\.0\.name is None; expected text in quotes"),
        ('[[owners]]\nname = "Acme"\n', r"owners\.0\.key is None"),
        ('[[owners]]\nname = "Acme"\nkey = "AAAA"\n', r"owners\.0\.key is 'AAAA'; expected the line"),
        (
            GOOD + "valid-until = 2026-01-01\n",
            r"owners\.0: unknown key 'valid-until'; known are name, key, bundles, valid_from",
        ),
        (GOOD + 'revoked = "2026-01-01"\n', r"owners\.0\.revoked is '2026-01-01'; expected a date"),
        (GOOD + "valid_from = 2026-01-01T10:00:00\n", r"owners\.0\.valid_from is .*; expected a date"),
        (GOOD + 'bundles = "law"\n', r"owners\.0\.bundles is 'law'; expected a list"),
        (GOOD + GOOD, r"owners\.1\.key stands twice: one key is one owner's"),
        ("owners = [", "not valid TOML"),
        ("a = " + "[" * 5000, "not valid TOML"),
        ("a = " + "1" * 5000, "not valid TOML"),
    ],
)
def test_what_is_wrong_is_named(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=rf"^trust\.toml: {says}") as caught:
        read_trust(make_trust(text))
    assert "\n" not in caught.value.message


def test_files_that_are_none() -> None:
    with pytest.raises(UsageError, match=r"^none: no such file"):
        read_trust(Path("none"))
    Path("large").write_bytes(b"#" * 1_000_001)
    with pytest.raises(UsageError, match="too many for a trust file"):
        read_trust(Path("large"))
    Path("latin").write_bytes(b"# \xff\n")
    with pytest.raises(UsageError, match="latin: cannot be read"):
        read_trust(Path("latin"))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text() | st.text(alphabet='[]"=\n owners name key 2026-01-01').map(lambda text: GOOD + text))
def test_any_text_is_read_or_refused_in_one_line(text: str) -> None:
    Path("any.toml").write_text(text, encoding="utf-8", errors="replace")
    try:
        read_trust(Path("any.toml"))
    except UsageError as error:
        refused_in_one_line(error)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("", None),
        ("valid_from = 2026-06-15", None),
        ("valid_until = 2026-06-15", None),
        ("revoked = 2026-06-16", None),
        ('bundles = ["l?w"]', None),
        ("valid_from = 2026-06-16", "the key of Acme is valid from 2026-06-16 on"),
        ("valid_until = 2026-06-14", "the key of Acme was valid until 2026-06-14"),
        ("revoked = 2026-06-15", "the key of Acme is revoked since 2026-06-15"),
        ('bundles = ["news", "press"]', "Acme may sign news, press, not law"),
        ("bundles = []", "Acme may sign nothing, not law"),
    ],
)
def test_when_and_for_what_a_key_counts(line: str, says: str | None) -> None:
    (owner,) = read_trust(make_trust(GOOD + line))
    assert owner.objection("law", TODAY, TODAY) == says


def test_a_revoked_key_counts_for_nothing_whatever_day_is_claimed() -> None:
    (owner,) = read_trust(make_trust(GOOD + "revoked = 2026-06-01\nvalid_until = 2027-01-01\n"))
    assert owner.objection("law", datetime.date(2026, 1, 1), TODAY) == "the key of Acme is revoked since 2026-06-01"
    assert owner.ends == "until 2026-06-01"
