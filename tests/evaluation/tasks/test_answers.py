"""Scoring of generated answers."""

from __future__ import annotations

from fractions import Fraction

import pytest

from flexctl.evaluation.tasks.answers import edit_similarity, first_words, last_number, same_words


@pytest.mark.parametrize(
    ("found", "wanted", "same"),
    [
        ("The  Nile.", "nile", True),
        ("14 December, 1972", "14 december 1972", True),
        ("1,000", "1000", True),
        ("a theory", "theory", True),
        ("theory of everything", "theory", False),
        ("", "the", False),
        ("the", "The", True),
        ("?", "", False),
        ("+", "+", True),
        ("Lev\u2019s stadium", "Levs Stadium", True),
    ],
)
def test_short_answers_are_compared_by_their_words(found: str, wanted: str, same: bool) -> None:
    assert same_words(found, wanted) is same
    assert same_words(wanted, found) is same


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("2 + 3 = 5", 5),
        ("#### 1,234", 1234),
        ("so -3.50 dollars.", Fraction(-7, 2)),
        ("$18.", 18),
        ("half is .5", Fraction(1, 2)),
        ("none", None),
    ],
)
def test_the_last_number_counts(text: str, number: Fraction | int | None) -> None:
    assert last_number(text) == number


def test_first_words() -> None:
    assert first_words(" summer,  and then", 1) == "summer,"
    assert first_words("one", 3) == "one"


def test_edit_similarity_is_twice_the_shared_characters_over_all() -> None:
    assert edit_similarity("return x\n", "  return x") == 1.0
    assert edit_similarity("", "return x") == 0.0
    assert edit_similarity("abcd", "bcde") == pytest.approx(2 * 3 / 8)
