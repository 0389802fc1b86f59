"""Spans, against a search that tries everything."""

from __future__ import annotations

import tempfile
from pathlib import Path

from builders import make_index
from hypothesis import given, settings
from hypothesis import strategies as st

from flexctl.bundle.index import Index
from flexctl.runtime import SILENT
from flexctl.tracing.spans import Span, find_spans, segments


def trace(index: Index, text: str, least_bytes: int = 3, most_places: int = 100) -> list[Span]:
    with SILENT.progress("", 0, "") as bar:
        return find_spans(index, text, least_bytes=least_bytes, most_places=most_places, progress=bar)


def everywhere(words: str, documents: list[str]) -> list[tuple[int, int]]:
    """(document from 1, first byte) of each place where some words stand."""
    data = words.encode()
    return [
        (number, start)
        for number, document in enumerate(documents, start=1)
        for start in range(len(document.encode()))
        if document.encode().startswith(data, start)
    ]


def by_trying_all(text: str, documents: list[str], least_bytes: int) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """(start, stop) of each span that cannot be made longer -> its places."""
    there = {
        (start, stop)
        for start in range(len(text))
        for stop in range(start + 1, len(text) + 1)
        if any(text[start:stop] in document for document in documents)
    }
    maximal = {
        (start, stop) for start, stop in there if not any(a <= start and stop <= b for a, b in there - {(start, stop)})
    }
    return {
        (start, stop): everywhere(text[start:stop], documents)
        for start, stop in maximal
        if len(text[start:stop].encode()) >= least_bytes
    }


# Few letters, so that spans are found; of one, two, three and four bytes.
LETTERS = st.text(alphabet="ab \u00e9\u20ac\U0001f600", min_size=1, max_size=30)
DOCUMENTS = st.lists(LETTERS.filter(str.strip), min_size=1, max_size=6)


@settings(max_examples=40, deadline=None)
@given(DOCUMENTS, LETTERS, st.integers(1, 6), st.integers(1, 40))
def test_spans_are_those_of_a_search_that_tries_all(
    documents: list[str], text: str, least_bytes: int, shard_bytes: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        index = make_index(Path(folder), documents, shard_bytes=shard_bytes)
        found = trace(index, text, least_bytes)
    expected = by_trying_all(text, documents, least_bytes)
    assert {(span.start, span.stop): span.count for span in found} == {
        span: len(places) for span, places in expected.items()
    }
    for span in found:
        assert span.text == text[span.start : span.stop]
        places = [(place.record, place.start) for place in span.places]
        assert sorted(places) == sorted(expected[span.start, span.stop])
        for place in span.places:
            data = documents[place.record - 1].encode()
            assert data[place.start : place.stop].decode() == place.text == span.text
            assert (data[: place.start].decode(), data[place.stop :].decode()) == (place.before, place.after)
            assert place.file == "law.jsonl"


def test_rare_words_come_first(tmp_path: Path) -> None:
    common = ["the and of the and of the and of the"] * 50
    index = make_index(tmp_path, [*common, "a zeugma perplexes a quaestor"])
    found = trace(index, "the and of the and of the; zeugma perplexes", least_bytes=8)
    assert [span.text for span in found] == [" zeugma perplexes", "the and of the and of the"]
    assert found[0].log_probability < found[1].log_probability
    assert (found[0].count, found[1].count) == (1, 100)


def test_as_many_places_as_were_asked_for(tmp_path: Path) -> None:
    index = make_index(tmp_path, ["one and the same"] * 10, shard_bytes=40)
    assert len(index.shards) > 2
    (span,) = trace(index, "one and the same", most_places=4)
    assert (span.count, [place.record for place in span.places]) == (10, [1, 2, 3, 4])


def test_a_span_longer_than_is_compared_at_once(tmp_path: Path) -> None:
    long = "".join(f"{number} bottles, " for number in range(200))
    index = make_index(tmp_path, [long, "another"])
    (span,) = trace(index, f"> {long[5:]}<")
    assert span.text == long[5:]


def test_a_text_in_pieces() -> None:
    spans = [
        Span(text="cd", start=2, stop=4, count=1, log_probability=-2.0),
        Span(text="bc", start=1, stop=3, count=1, log_probability=-1.0),
    ]
    assert segments("abcdef", spans) == [("a", None), ("b", 1), ("cd", 0), ("ef", None)]
    assert segments("", []) == []
