"""Runs of neighbouring words as numbers: by them texts are compared, whatever their case and punctuation.

A word is a run of letters, digits and underscores, as Unicode has them, in lower case.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain, islice

from xxhash import xxh3_64_intdigest

__all__ = ["word_runs"]

_WORD = re.compile(r"\w+")
_AT_ONCE = 10_000


def word_runs(text: str, length: int) -> Iterator[int]:
    """Return a 64-bit hash of each run of ``length`` neighbouring words, in order; none where there are fewer.

    Args:
        text: As long as may be: some words are looked at at a time.
        length: At least 2.
    """
    return chain.from_iterable(_some_at_a_time(text, length))


def _some_at_a_time(text: str, length: int) -> Iterator[list[int]]:
    words = map(re.Match.group, _WORD.finditer(text.lower()))
    here: list[str] = []
    while some := list(islice(words, _AT_ONCE)):
        here = here[1 - length :] + some
        yield _hashes(here, length)


def _hashes(words: Sequence[str], length: int) -> list[int]:
    line = (" ".join(words) + " ").encode()
    places = [0, *accumulate(len(word) + 1 for word in line.split())]
    return [xxh3_64_intdigest(line[start:stop]) for start, stop in zip(places, places[length:], strict=False)]
