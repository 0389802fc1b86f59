"""Text in the dress of code: whose words it has, how long it is, and that it looks like code."""

from __future__ import annotations

import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexctl.text.dress import as_code

PROSE = (
    "The slowworm has been decreasing in numbers. Under the Wildlife and Countryside Act 1981, killing it is illegal. "
    "Anguis fragilis is a reptile of Europe, and is often taken for a snake. "
)
OWN_WORDS = {"def", "function", "class", "if", "for", "while", "then", "end", "return", "and", "or", "x"}


def words_of(text: str) -> set[str]:
    return {word.lower() for word in re.findall(r"[^\W\d_]+", text)}


def test_words_are_the_passage_s_and_so_is_the_length() -> None:
    found = as_code(PROSE, 1)
    # Names may be joined without a mark.
    joined = re.compile(f"({'|'.join(words_of(PROSE) | OWN_WORDS)})+")
    assert all(joined.fullmatch(word) for word in words_of(found))
    assert len(PROSE) <= len(found) + 1 < 3 * len(PROSE)


def test_it_follows_its_seed() -> None:
    assert as_code(PROSE, 1) == as_code(PROSE, 1) != as_code(PROSE, 2)


def test_it_looks_like_code() -> None:
    found = "\n".join(as_code(PROSE, seed) for seed in range(20))

    def share(text: str, marks: str) -> float:
        return sum(text.count(mark) for mark in marks) / len(text)

    assert share(found, string.punctuation) > 3 * share(PROSE, string.punctuation)
    lines = found.splitlines()
    assert any(line.startswith("        ") for line in lines)
    assert any(line.endswith("{") for line in lines)
    assert any("def " in line for line in lines)
    assert any(" = " in line for line in lines)
    assert any(line.lstrip().startswith(("#", "//", "--")) for line in lines)


def test_other_scripts_keep_their_words() -> None:
    assert "змея" in as_code("Змея. Ящерицы, не змеи.", 0).lower()


def test_a_script_without_spaces_gives_names_of_some_length_too() -> None:
    found = as_code("蛇に似たトカゲの一種であり尾を切り離すことができるとされているがその尾は元の長さには戻らない", 0)
    assert max(map(len, words_of(found))) <= 60


@given(st.text(max_size=300), st.integers(0, 10))
def test_any_text_gives_some_lines(text: str, seed: int) -> None:
    found = as_code(text, seed)
    assert found.strip()
    assert len(found) + 1 >= len(text)


@pytest.mark.parametrize("text", ["", "   ", "12 + 3 = 15", "...", "_"])
def test_text_without_words_has_a_stand_in(text: str) -> None:
    assert words_of(as_code(text, 3)) <= OWN_WORDS
