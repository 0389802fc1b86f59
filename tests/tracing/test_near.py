"""Near matches: found where a few letters are changed, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest
from builders import make_index

from flexctl.bundle.index import Index
from flexctl.runtime import SILENT
from flexctl.tracing.near import near_spans
from flexctl.tracing.spans import Span, find_spans

OATH = "I swear by almighty God that the evidence I shall give shall be the truth, the whole truth and nothing but that"
OTHER = "A contract needs an offer, an acceptance of that offer, and something of value that changes hands between two"


def near(index: Index, text: str) -> list[Span]:
    with SILENT.progress("", 0, "") as bar:
        exact = find_spans(index, text, least_bytes=32, most_places=3, progress=bar)
        return near_spans(index, text, exact, least_bytes=32, most_places=3, progress=bar)


def test_a_few_letters_changed(tmp_path: Path) -> None:
    index = make_index(tmp_path, [OTHER, f"Say: {OATH}.", OTHER], shard_bytes=50)
    text = f"They said {OATH.replace('evidence', 'evidense').replace('swear by', 'swore by')}, all of them"
    (span,) = near(index, text)
    assert span.text.strip() == text[18 : text.index(", all")]
    assert 0.95 < span.similarity < 1
    (place,) = span.places
    assert (place.record, place.text.strip(), place.before) == (2, OATH[8:], "Say: I swear")
    assert span.count == 1


def with_errors(text: str, period: int) -> str:
    return "".join("#" if place % period == period - 1 else letter for place, letter in enumerate(text))


@pytest.mark.parametrize("period", [10, 11, 12, 15, 16, 17, 30])
def test_an_error_in_every_tenth_byte_is_near(tmp_path: Path, period: int) -> None:
    index = make_index(tmp_path, [OTHER, f"Say: {OATH}.", OTHER], shard_bytes=50)
    (span,) = near(index, with_errors(OATH, period))
    assert span.similarity >= 0.9
    assert span.text.count("#") >= len(OATH) // period - 2
    assert [place.record for place in span.places] == [2]


def test_an_error_in_every_ninth_byte_is_not(tmp_path: Path) -> None:
    index = make_index(tmp_path, [OTHER, OATH])
    assert near(index, with_errors(OATH, 9)) == []


def test_short_seeds_that_stand_in_many_places_are_passed_over(tmp_path: Path) -> None:
    """The stated limit: nine documents have the words, and errors leave no sixteen bytes of them."""
    few, many = make_index(tmp_path / "few", [OATH] * 8), make_index(tmp_path / "many", [OATH] * 9)
    assert len(near(few, with_errors(OATH, 12))) == 1
    assert near(many, with_errors(OATH, 12)) == []
    assert len(near(many, with_errors(OATH, 18))) == 1


def test_what_stands_there_word_for_word_is_not_near(tmp_path: Path) -> None:
    index = make_index(tmp_path, [OATH, OTHER])
    assert near(index, OATH) == []


def test_other_text_is_not_near(tmp_path: Path) -> None:
    index = make_index(tmp_path, [OATH])
    assert near(index, OTHER) == []
    halves = f"I swear by almighty God that {OTHER[:60]} nothing but that"
    assert near(index, halves) == []


def test_every_place_of_one_passage(tmp_path: Path) -> None:
    index = make_index(tmp_path, [OATH, OTHER, f"again: {OATH}"])
    (span,) = near(index, OATH.replace("evidence", "evidense"))
    assert span.count == 2
    assert {place.record for place in span.places} == {1, 3}
