"""Words in a row that test text has, whatever their case and punctuation; each document is judged by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import write_jsonl

from flexctl.errors import UsageError
from flexctl.text import words
from flexctl.text.decontamination import Decontamination
from flexctl.text.words import word_runs

WORDS = [f"w{number}" for number in range(30)]


def of(tmp_path: Path, *texts: str) -> Decontamination:
    write_jsonl(tmp_path / "test.jsonl", list(texts))
    return Decontamination.read([tmp_path / "test.jsonl"], "text")


@pytest.mark.parametrize(
    ("text", "shares"),
    [
        (" ".join(WORDS), True),
        (" ".join(WORDS[4:17]), True),
        (" ".join(WORDS[4:16]), False),
        (" ".join(["before", *WORDS[17:], "after"]), True),
        (" ".join([*WORDS[:12], "but", *WORDS[12:24]]), False),
        ("-- ".join(WORDS[:13]).upper() + "!", True),
        ("\n\n".join(WORDS[:13]), True),
        ("".join(WORDS[:13]), False),
        ("", False),
    ],
)
def test_thirteen_words_in_a_row(tmp_path: Path, text: str, shares: bool) -> None:
    assert of(tmp_path, "too short", " ".join(WORDS)).shares(text) is shares


def test_letters_of_any_language_are_words(tmp_path: Path) -> None:
    greek = " ".join(["\u0391\u03b2\u03b3", *WORDS[:12]])
    assert of(tmp_path, greek).shares(greek.lower() + ".")


@pytest.mark.parametrize("length", [2, 3, 5, 13])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 12, 13, 14, 40])
def test_runs_do_not_depend_on_how_many_words_are_looked_at_at_once(
    monkeypatch: pytest.MonkeyPatch, count: int, length: int
) -> None:
    parts = [("a", "bb", "c_c", "\u00e9t\u00e9", "1")[number * number % 5] for number in range(count)]
    text = ", ".join(parts)
    expected = list(word_runs(text, length))
    assert len(expected) == max(0, len(parts) - length + 1)
    monkeypatch.setattr(words, "_AT_ONCE", 3)
    assert list(word_runs(text, length)) == expected


def test_the_digest_is_that_of_the_runs(tmp_path: Path) -> None:
    one = of(tmp_path, " ".join(WORDS), "short").digest
    assert of(tmp_path, "x", " ".join(WORDS).upper(), " ".join(WORDS)).digest == one
    assert of(tmp_path, " ".join(WORDS[1:])).digest != one
    assert Decontamination.read([], "text").digest is None
    assert not Decontamination().shares(" ".join(WORDS))


def test_test_text_that_finds_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"test\.jsonl has 13 words, so nothing would be found") as refused:
        of(tmp_path, " ".join(WORDS[:12]), "one")
    assert refused.value.field == "decontaminate"
    with pytest.raises(UsageError, match="nowhere does not exist") as refused:
        Decontamination.read([tmp_path / "nowhere"], "text")
    assert refused.value.field == "decontaminate"
