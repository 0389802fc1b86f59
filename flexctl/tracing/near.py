"""Near matches: passages of a text that stand in an index with a few letters changed.

A near match is a passage of the text and one of a document whose normalised Levenshtein similarity is at least
LEAST_SIMILARITY. It grows from seeds: verbatim spans of SEED_BYTES or more, and of RARE_SEED_BYTES or more where they
stand in few places. Seeds that follow each other in the text and in one document, at nearly the same distance in both,
are one passage with whatever lies between them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import groupby

from flexctl.bundle.index import Index, Shard
from flexctl.errors import UsageError
from flexctl.runtime import Progress
from flexctl.tracing.spans import Span, log_probability, longest_spans, place_of

__all__ = ["LEAST_SIMILARITY", "RARE_SEED_BYTES", "SEED_BYTES", "near_spans", "require_rapidfuzz"]

LEAST_SIMILARITY = 0.9
"""As the extraction attack counts a hit: FlexOlmo, section 5.4."""

SEED_BYTES = 16
RARE_SEED_BYTES = 9
"""What an error in every tenth byte leaves of a text, which is as many as a near match has."""

_RARE_PLACES = 8
_SEED_PLACES = 64
_GAP_BYTES = 64
_SHIFT_BYTES = 32


@dataclass(frozen=True, slots=True)
class _Seed:
    """A verbatim span: where it is in the text and in a document of a shard."""

    shard: int
    document: int
    start: int
    stop: int
    place: int

    @property
    def end(self) -> int:
        """Byte of the shard after its last."""
        return self.place + self.stop - self.start


def require_rapidfuzz() -> None:
    """Refuse where rapidfuzz is not installed.

    Raises:
        UsageError: It is not.
    """
    if find_spec("rapidfuzz") is None:
        raise UsageError("near matches need rapidfuzz, which is not installed", hint="pip install 'flexctl[trace]'")


def near_spans(
    index: Index, text: str, exact: Sequence[Span], *, least_bytes: int, most_places: int, progress: Progress
) -> list[Span]:
    """Return passages of a text that stand in an index nearly, and are not inside a verbatim span; the rarest first.

    Args:
        index: Where to look.
        text: What to trace.
        exact: Its verbatim spans.
        least_bytes: Length of the shortest passage.
        most_places: Of each passage.
        progress: Moves on by the characters that were looked up.
    """
    data = text.encode()
    rarity = log_probability(index)
    found: list[Span] = []
    for chain in _chains(_seeds(index, data, progress)):
        span = _span(index, data, chain)
        if len(span.text.encode()) >= least_bytes and span.similarity >= LEAST_SIMILARITY:
            found.append(replace(span, log_probability=rarity(span.text.encode())))
    merged = [_together(list(same), most_places) for _, same in groupby(sorted(found, key=_range), key=_range)]
    longest = [span for span in merged if not any(_inside(span, other) for other in [*merged, *exact])]
    return sorted(longest, key=lambda span: (span.log_probability, span.start))


def _seeds(index: Index, data: bytes, progress: Progress) -> Iterator[_Seed]:
    for start, stop in longest_spans(index, data, RARE_SEED_BYTES, progress):
        if stop - start < SEED_BYTES and index.count(data[start:stop]) > _RARE_PLACES:
            continue
        left = _SEED_PLACES
        for number, shard in enumerate(index.shards):
            places = shard.places(shard.interval(data[start:stop]), left) if left else []
            left -= len(places)
            for place in places:
                yield _Seed(number, shard.document(place)[0], start, stop, place)


def _chains(seeds: Iterator[_Seed]) -> list[list[_Seed]]:
    """Return seeds of one document that continue each other; a chain of one seed is a verbatim span and left out."""
    chains: list[list[_Seed]] = []
    for _, inside in groupby(
        sorted(seeds, key=lambda seed: (seed.shard, seed.document, seed.start, seed.place)),
        key=lambda seed: (seed.shard, seed.document),
    ):
        here: list[list[_Seed]] = []
        for seed in inside:
            # Seeds come in the order of the text: a chain that ended too long ago has ended.
            chains += [chain for chain in here if not _reaches(chain[-1], seed)]
            here = [chain for chain in here if _reaches(chain[-1], seed)]
            chain = next((chain for chain in reversed(here) if _continues(chain[-1], seed)), None)
            if chain is None:
                here.append([seed])
            else:
                chain.append(seed)
        chains += here
    return [chain for chain in chains if len(chain) > 1]


def _reaches(last: _Seed, seed: _Seed) -> bool:
    return seed.start - last.stop <= _GAP_BYTES


def _continues(last: _Seed, seed: _Seed) -> bool:
    shift = (seed.place - seed.start) - (last.place - last.start)
    goes_on = seed.stop > last.stop and seed.end > last.end
    return goes_on and abs(shift) <= _SHIFT_BYTES


def _span(index: Index, data: bytes, chain: Sequence[_Seed]) -> Span:
    from rapidfuzz.distance import Levenshtein

    first, last = chain[0], chain[-1]
    shard: Shard = index.shards[first.shard]
    words = data[first.start : last.stop].decode()
    place = place_of(index, shard, first.place, last.end)
    begins = len(data[: first.start].decode())
    return Span(
        text=words,
        start=begins,
        stop=begins + len(words),
        count=1,
        log_probability=0.0,
        similarity=Levenshtein.normalized_similarity(words, place.text),
        places=(place,),
    )


def _together(same: Sequence[Span], most_places: int) -> Span:
    """Return one span for all that are the same passage of the text, the most similar place first."""
    ordered = sorted(same, key=lambda span: -span.similarity)
    places = tuple(place for span in ordered for place in span.places)
    return replace(ordered[0], count=len(places), places=places[:most_places])


def _range(span: Span) -> tuple[int, int]:
    return span.start, span.stop


def _inside(span: Span, other: Span) -> bool:
    return span is not other and other.start <= span.start and span.stop <= other.stop
