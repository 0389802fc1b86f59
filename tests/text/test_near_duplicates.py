"""Documents that are nearly the same as one before, counted by bands of MinHash, whatever their length."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from flexctl.text import near_duplicates as module
from flexctl.text.near_duplicates import NearDuplicates


def made_up(words: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [f"w{rng.randrange(10_000)}" for _ in range(words)]


def count(folder: Path, documents: list[str]) -> int:
    with NearDuplicates.within(folder) as near:
        for text in documents:
            near.add(text)
        return near.count()


def test_nearly_the_same_and_quite_others(tmp_path: Path) -> None:
    originals = [made_up(300, seed) for seed in range(40)]
    texts = [" ".join(words) for words in originals]
    assert count(tmp_path, texts) == 0
    changed = [" ".join([*words[:100], "one", "new", *words[102:]]).title() + "!" for words in originals]
    assert count(tmp_path, [*texts, *changed]) >= 38  # 0.96 of their runs are the same
    halves = [" ".join(words[:150] + made_up(150, 99 + seed)) for seed, words in enumerate(originals)]
    assert count(tmp_path, [*texts, *halves]) <= 4  # a third
    assert not list(tmp_path.iterdir())


def test_copies_and_documents_of_few_words(tmp_path: Path) -> None:
    assert count(tmp_path, ["a b", "a b", "a c", "...", "...", "!!!", "A b"]) == 2
    assert count(tmp_path, []) == 0


def test_long_documents_and_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are looked at some at a time."""
    words = made_up(900, 0)
    texts = [" ".join(words), " ".join([*words[:450], "new", *words[450:]]), *["x y z " + str(n) for n in range(30)]]
    expected = count(tmp_path, texts)
    assert expected == 1
    monkeypatch.setattr(module, "_AT_ONCE", 7)
    monkeypatch.setattr(module, "_BLOCK", 3)
    assert count(tmp_path, texts) == expected
