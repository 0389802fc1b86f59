"""What is planted in an owner's text is searched for in all that commands leave: it stays where the owner put it.

Allowed are the folder that a run works in, and what holds text by its nature: an index, and the pages of ``trace-find``
and ``evaluate``. Searched are results, caches, what is printed, and what is left by commands that are killed or run out
of room.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from attacks.bench import Bench, Tried
from attacks.writers import PLANTED, WRITERS, Writer
from pyarrow import parquet

from flexctl.errors import FlexctlError
from flexctl.text.documents import read_documents

ALWAYS = ("train-expert", "select-proxy")
READS_TEXT = [
    pytest.param(name, marks=() if name in ALWAYS else pytest.mark.slow)
    for name, writer in WRITERS.items()
    if "IN/code" in writer.words or "IN/own" in writer.words
]


def found(place: Path, writer: Writer, tried: Tried) -> list[str]:
    """Return where what was planted is, and should not be."""
    at_home = (writer.keeps, *writer.shows)
    files = [path.relative_to(place.parent) for path in place.parent.rglob("*") if path.is_file()]
    holding = [path for path in files if PLANTED.encode() in (place.parent / path).read_bytes()]
    outside = [str(path) for path in holding if not any(_belongs(part, at_home) for part in path.parts)]
    printed = [] if "-" in writer.shows else [text for text in (tried.out, tried.err) if PLANTED in text]
    return outside + printed


def _belongs(part: str, at_home: tuple[str, ...]) -> bool:
    return any(name and (part == name or part.startswith(f".{name}.")) for name in at_home)


@pytest.mark.parametrize("name", READS_TEXT)
def test_it_is_found_nowhere_else(bench: Bench, name: str) -> None:
    writer = WRITERS[name]
    moments = bench.done(writer).tried.moments
    for fault, at in (("none", 0), ("kill", moments // 2), ("full", moments // 2)):
        place = bench.folder(writer)
        tried = bench.run(writer, place, fault=fault, at=at)
        assert found(place, writer, tried) == [], fault
        bench.discard(place)


def test_what_is_searched_for_would_be_found(bench: Bench) -> None:
    writer = WRITERS["trace-index"]
    place = bench.folder(writer)
    tried = bench.run(writer, place)
    assert found(place, writer, tried) == []
    (place / "law.index").rename(place / "elsewhere")
    assert "out/elsewhere/0000.text" in found(place, writer, tried)
    bench.discard(place)


def _table(value: object) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": [value]}), file)
    return file.getvalue()


BROKEN: dict[str, Callable[[], bytes]] = {
    "half.jsonl": lambda: f'{{"text": "{PLANTED}'.encode(),
    "list.jsonl": lambda: json.dumps({"text": [PLANTED]}).encode(),
    "object.jsonl": lambda: json.dumps({"text": {"name": PLANTED}}).encode(),
    "words.jsonl": lambda: json.dumps(PLANTED).encode(),
    "other.jsonl": lambda: json.dumps({"body": PLANTED}).encode(),
    "surrogate.jsonl": lambda: f'{{"text": "{PLANTED} \\ud800"}}'.encode(),
    "bytes.txt": lambda: f"{PLANTED} ".encode() + b"\xff",
    "cut.txt.gz": lambda: gzip.compress(PLANTED.encode() * 100)[:-9],
    "more.csv": lambda: f"text,id\n{PLANTED},1,{PLANTED}\n".encode(),
    "quote.csv": lambda: f'text,id\n"{PLANTED}'.encode(),
    "list.parquet": lambda: _table([PLANTED]),
    "cut.parquet": lambda: _table(PLANTED)[:-20],
}


@pytest.mark.parametrize("name", BROKEN)
def test_no_message_quotes_text(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(BROKEN[name]())
    with pytest.raises(FlexctlError) as caught:
        list(read_documents([tmp_path / name]))
    assert PLANTED not in f"{caught.value.message} {caught.value.hint}"
