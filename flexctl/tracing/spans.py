"""The longest verbatim spans of a text that stand in an index: where, how often, the rarest first."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from flexctl.bundle.index import Index, Shard
from flexctl.runtime import Progress

__all__ = [
    "Place",
    "Span",
    "Traced",
    "copied",
    "find_spans",
    "log_probability",
    "longest_spans",
    "place_of",
    "segments",
]

Flags = np.ndarray[Any, np.dtype[np.float64]]

_REACH = 64
"""Bytes that are compared at first; more where all of them match."""
_SAID_EVERY = 256
_AROUND = 80
"""Bytes of a document before and after a span that a person is shown."""
_UNIT = re.compile(rb" ?(?:[A-Za-z0-9_\x80-\xfe]+|[^A-Za-z0-9_\s\x80-\xfe]+)|\s+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a span stands in the owner's text.

    Attributes:
        file: As the index was given it.
        record: The document's number in the file, from 1.
        start: First byte in the document, in UTF-8.
        stop: Byte after the last.
        before: What comes before it there.
        text: The span itself, as it stands there.
        after: What comes after it.
    """

    file: str
    record: int
    start: int
    stop: int
    before: str
    text: str
    after: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """A part of the text that was traced, and where it stands.

    Attributes:
        text: Its words.
        start: First character in the text.
        stop: Character after the last.
        count: How often it stands in the index; of a near match, in how many places it was found.
        log_probability: Of its units by themselves, natural logarithm: the lower, the rarer.
        similarity: 1 is verbatim.
        places: The first of these.
    """

    text: str
    start: int
    stop: int
    count: int
    log_probability: float
    similarity: float = 1.0
    places: tuple[Place, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Traced:
    """What of a text stands in one index.

    Attributes:
        name: Whose text it is.
        path: The index.
        digest: Its digest.
        documents: Documents in it.
        covered: Share of the text's characters that lie in a verbatim span.
        spans: Verbatim spans, the rarest first.
        near: Near matches that are in none of them, the rarest first.
    """

    name: str
    path: Path
    digest: str
    documents: int
    covered: float
    spans: tuple[Span, ...]
    near: tuple[Span, ...] = ()

    @property
    def all(self) -> tuple[Span, ...]:
        """Verbatim spans, and near matches behind them."""
        return self.spans + self.near


def segments(text: str, spans: Sequence[Span]) -> list[tuple[str, int | None]]:
    """Return a text in pieces, each with the number of the first of ``spans`` that it lies in; None is none of them."""
    numbers: list[int | None] = [None] * len(text)
    for number in reversed(range(len(spans))):
        span = spans[number]
        numbers[span.start : span.stop] = [number] * (span.stop - span.start)
    runs = groupby(range(len(text)), key=lambda place: numbers[place])
    return [("".join(text[place] for place in places), number) for number, places in runs]


def find_spans(index: Index, text: str, *, least_bytes: int, most_places: int, progress: Progress) -> list[Span]:
    """Return the maximal verbatim spans of a text: none of them can be made longer, and none lies inside another.

    They are ordered as OLMoTrace ranks them, by the product of the unigram probabilities of what they are made of, the
    smallest first: long spans of uncommon words. OLMoTrace keeps the first ceil(0.05 L) of them, L the number of
    tokens in the text; here all are kept, as an owner wants to know of each. Its unit is a token; here it is a word
    with the space before it, or a run of other characters, counted in the index itself.

    Args:
        index: Where to look.
        text: What to trace.
        least_bytes: Length of the shortest span of interest, in UTF-8.
        most_places: Of each span.
        progress: Moves on by the characters that were looked up.

    Source: Liu et al., "OLMoTrace: Tracing Language Model Outputs Back to Trillions of Training Tokens", 2025,
    section 3.
    """
    data = text.encode()
    rarity = log_probability(index)
    found = []
    for start, stop in longest_spans(index, data, least_bytes, progress):
        wanted = data[start:stop]
        words = wanted.decode()
        begins = len(data[:start].decode())
        found.append(
            Span(
                text=words,
                start=begins,
                stop=begins + len(words),
                count=index.count(wanted),
                log_probability=rarity(wanted),
                places=tuple(_places(index, wanted, most_places)),
            )
        )
    return sorted(found, key=lambda span: (span.log_probability, span.start))


def copied(indexes: Sequence[Index], texts: Sequence[Sequence[str]], least_bytes: int) -> Flags:
    """Return for which groups of texts one has a verbatim span of ``least_bytes``, 1 or 0 each, (groups,)."""

    def has_span(text: str) -> bool:
        return any(any(longest_spans(index, text.encode(), least_bytes)) for index in indexes)

    return np.array([float(any(map(has_span, group))) for group in texts])


def longest_spans(
    index: Index, data: bytes, least_bytes: int, progress: Progress | None = None
) -> Iterator[tuple[int, int]]:
    """Yield first byte and end of each maximal span, in order; both are between characters.

    Args:
        index: Where to look.
        data: What to trace, UTF-8.
        least_bytes: Length of the shortest one.
        progress: Moves on by the characters that were looked up.
    """
    ends = [0] * len(index.shards)
    furthest = 0
    begins = [place for place in range(len(data)) if _is_between(data, place)]
    for character, start in enumerate(begins, start=1):
        for number, shard in enumerate(index.shards):
            known = max(0, ends[number] - start)
            ends[number] = start + _longest(shard, data, start, known)
        stop = max(ends)
        while not _is_between(data, stop):
            stop -= 1
        if stop > furthest and stop - start >= least_bytes:
            yield start, stop
        furthest = max(furthest, stop)
        if progress and (character % _SAID_EVERY == 0 or character == len(begins)):
            progress.advance(character % _SAID_EVERY or _SAID_EVERY)


def log_probability(index: Index) -> Callable[[bytes], float]:
    """Return what gives the logarithm of the product of the unigram probabilities of the units in some bytes.

    A unit that stands nowhere in the index, as one cut from a word, counts as one that stands there once.
    """
    blanks = index.count(b" ") + index.count(b"\n")
    total = max(1, blanks)

    @cache
    def unigram(unit: bytes) -> float:
        return math.log(min(1.0, max(1, index.count(unit)) / total))

    return lambda data: sum(unigram(unit) for unit in _UNIT.findall(data))


def place_of(index: Index, shard: Shard, start: int, stop: int) -> Place:
    """Return where bytes ``start`` to before ``stop`` of a shard are, with what is around them."""
    first, end, source, record = shard.document(start)
    return Place(
        file=index.sources[source],
        record=record,
        start=start - first,
        stop=stop - first,
        before=shard.text[max(first, start - _AROUND) : start].decode(errors="ignore"),
        text=shard.text[start:stop].decode(errors="replace"),
        after=shard.text[stop : min(end, stop + _AROUND)].decode(errors="ignore"),
    )


def _places(index: Index, wanted: bytes, most: int) -> Iterator[Place]:
    for shard in index.shards:
        starts = shard.places(shard.interval(wanted), most) if most else []
        for start in starts:
            yield place_of(index, shard, start, start + len(wanted))
        most -= len(starts)


def _longest(shard: Shard, data: bytes, start: int, known: int) -> int:
    """Return the length of the longest beginning of ``data[start:]`` in a shard, which is at least ``known``."""
    reach = max(_REACH, 2 * known)
    while True:
        wanted = data[start : start + reach]
        length = shard.longest(wanted)
        if length < reach:
            return length
        reach *= 2


def _is_between(data: bytes, place: int) -> bool:
    """Return whether a place in UTF-8 is between two characters, or at an end."""
    return place >= len(data) or data[place] & 0xC0 != 0x80
