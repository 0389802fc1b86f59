"""Readers and mutated files: one line for what is wrong, never a traceback and never a hang.

The slow test tries 100,000 files and says how many it tried; FLEXCTL_FUZZ asks for another number.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from attacks.mutations import mutated
from attacks.readers import Reader, readers
from hypothesis import given, settings
from hypothesis import strategies as st

from flexctl.errors import FlexctlError
from flexctl.runtime import peak_rss_bytes

SECONDS = 5
MOST_GROWTH = 300_000_000
NAMES = (
    "expert",
    "low-rank expert",
    "anchor's manifest",
    "anchor's weights",
    "manifest",
    "proxy list",
    "flexctl.toml",
    "task file",
    "results",
    "signature",
    "trust file",
    "removal record",
    "index, flexctl.json",
    "index, sources.json",
    "index, 0000.text",
    "index, 0000.suffixes",
    "index, 0000.documents",
    "text, a.txt",
    "text, a.jsonl",
    "text, a.json",
    "text, a.csv",
    "text, a.tsv",
    "text, a.parquet",
    "text, a.jsonl.gz",
    "text, a.jsonl.zst",
)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reader]:
    found = readers(tmp_path_factory.mktemp("readers"))
    assert tuple(found) == NAMES
    return found


@contextmanager
def in_time(what: str) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise AssertionError(f"{what}: not read in {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def tried(name: str, reader: Reader, data: bytes) -> str:
    """Read mutated bytes and return what came of it; anything but a line for people is an error."""
    refused = None
    with in_time(name):
        try:
            reader(data)
        except FlexctlError as error:
            refused = error
    if refused is None:
        return "read"
    assert "\n" not in refused.message, refused.message  # other control characters are for the terminal to escape
    return type(refused).__name__


@pytest.mark.parametrize("name", NAMES)
def test_a_valid_file_is_read(table: dict[str, Reader], name: str) -> None:
    if name != "results":
        assert tried(name, table[name], table[name].valid) == "read"


@pytest.mark.parametrize("name", NAMES)
def test_changed_files_are_read_or_refused(table: dict[str, Reader], name: str) -> None:
    reader = table[name]
    others = [other.valid for other in table.values()]

    @settings(max_examples=15, deadline=None, derandomize=True)
    @given(st.integers(0, 2**32))
    def check(seed: int) -> None:
        tried(name, reader, mutated(random.Random(seed), reader.valid, others))

    check()
    reader.file.write_bytes(reader.valid)


@pytest.mark.slow
def test_a_hundred_thousand_changed_files(table: dict[str, Reader]) -> None:
    wanted = int(os.environ.get("FLEXCTL_FUZZ", "100000"))
    others = [reader.valid for reader in table.values()]
    rng, found, slowest = random.Random(0), Counter[str](), 0.0
    before = peak_rss_bytes()
    for number in range(wanted):
        name = NAMES[number % len(NAMES)]
        data = mutated(rng, table[name].valid, others)
        started = time.monotonic()
        try:
            found[tried(name, table[name], data)] += 1
        except Exception as error:
            place = Path(f"fuzz-{number}")
            place.write_bytes(data)
            raise AssertionError(f"{name}: {type(error).__name__}: {error}; the file is kept as {place}") from error
        slowest = max(slowest, time.monotonic() - started)
        table[name].file.write_bytes(table[name].valid)
    grown = peak_rss_bytes() - before
    print(f"{found.total()} files: {dict(found)}, the slowest {slowest:.2f} s, memory grew by {grown / 1e6:.0f} MB")
    assert found.total() == wanted
    assert grown < MOST_GROWTH
