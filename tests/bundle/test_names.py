"""Names that become file names."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexctl.bundle.names import check_anchor_name, check_expert_name, check_file_name, shown, slug
from flexctl.errors import BundleError, UsageError

TRICKS = ["", ".", "..", "../x", "a/b", "/etc/passwd", "a\\b", "a\0b", "a\nb", "-a", ".hidden", "a b", "\u00e9"]


@pytest.mark.parametrize("name", [*TRICKS, "Code", "public", "_a", "x" * 64, "a.b"])
def test_expert_names_that_are_refused(name: str) -> None:
    with pytest.raises(BundleError, match=r"^f: name is ") as caught:
        check_expert_name(name, "f: name")
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("name", ["a", "0", "law-2_b", "x" * 63])
def test_expert_names_that_are_taken(name: str) -> None:
    assert check_expert_name(name, "f") == name


@pytest.mark.parametrize("name", TRICKS)
def test_path_tricks_are_refused_everywhere(name: str) -> None:
    with pytest.raises(BundleError):
        check_file_name(name, "f")
    with pytest.raises(BundleError):
        check_anchor_name(name, "f")


def test_stock_names_are_taken() -> None:
    assert check_anchor_name("SmolLM2-135M", "f")
    assert check_file_name("model-00001-of-00002.safetensors", "f")


@given(st.text())
def test_a_slug_is_a_name_or_an_error(text: str) -> None:
    try:
        name = slug(text)
    except UsageError:
        return
    assert check_expert_name(name, "f") == name
    assert slug(name) == name


@pytest.mark.parametrize(
    ("text", "name"), [("Law Texts (2024)", "law-texts-2024"), ("Caf\u00e9", "cafe"), ("--x__", "x"), ("a.b", "a-b")]
)
def test_slugs(text: str, name: str) -> None:
    assert slug(text) == name


@given(st.text())
def test_shown_values_are_short_and_on_one_line(text: str) -> None:
    assert re.fullmatch(r"[ -~]{1,80}", shown(text))
