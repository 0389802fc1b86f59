"""Building: shards, what outlives a run that was stopped, and who may read it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from builders import make_index

from flexctl.bundle.index import open_index, shard_files
from flexctl.errors import UsageError
from flexctl.runtime import SILENT
from flexctl.text.documents import Record
from flexctl.tracing import building
from flexctl.tracing.building import Built, build_index

TEXTS = [f"document {number} of this text" for number in range(9)]


def build(folder: Path, texts: list[str], stop_after: int | None = None) -> Built:
    def records() -> Iterator[Record]:
        for number, text in enumerate(texts, start=1):
            if number == stop_after:
                raise KeyboardInterrupt
            yield Record(f"{number % 2}.txt", number, text)

    with SILENT.progress("", 0, "") as bar:
        return build_index(
            folder / "an.index",
            records(),
            name="law",
            shard_bytes=60,
            folder=folder / "work",
            overwrite=True,
            progress=bar,
        )


def test_suffixes_are_in_order_in_every_shard(tmp_path: Path) -> None:
    index = make_index(tmp_path, TEXTS, shard_bytes=60)
    assert index.manifest.shards == len(index.shards) == 3
    assert (index.manifest.documents, index.manifest.bytes) == (9, sum(map(len, TEXTS)))
    for number in range(3):
        text, suffixes = (tmp_path / "an.index" / name for name in shard_files(number)[:2])
        data = text.read_bytes()
        places = np.fromfile(suffixes, dtype="<i4").tolist()
        assert places == sorted(range(len(data)), key=lambda place: data[place:])


def test_a_run_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sorted_anew = []
    sort = building._Work._sort
    monkeypatch.setattr(building._Work, "_sort", lambda *all: (sorted_anew.append(all[0].shards), sort(*all))[1])
    whole = build(tmp_path / "whole", TEXTS)
    sorted_anew.clear()
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "stopped", TEXTS, stop_after=8)
    assert sorted_anew == [0, 1]
    assert not (tmp_path / "stopped" / "an.index").exists()
    done = build(tmp_path / "stopped", TEXTS)
    assert (sorted_anew, done.kept) == ([0, 1, 2], 2)
    assert done.manifest == whole.manifest


@pytest.mark.parametrize("name", [*shard_files(0), "0000.json"])
def test_what_an_earlier_run_left_is_not_believed(tmp_path: Path, name: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, TEXTS, stop_after=8)
    file = tmp_path / "work" / name
    file.write_bytes(file.read_bytes().replace(b"0", b"1") + b"\0")
    done = build(tmp_path, TEXTS)
    assert (done.kept, done.manifest) == (1, build(tmp_path / "whole", TEXTS).manifest)


def test_other_text_than_in_the_run_that_was_stopped(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, TEXTS, stop_after=8)
    done = build(tmp_path, ["changed", *TEXTS[1:]])
    assert done.kept == 0
    assert open_index(tmp_path / "an.index").count(b"changed") == 1


def test_nobody_else_may_read_it(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, TEXTS, stop_after=8)
    left = list((tmp_path / "work").iterdir())
    assert len(left) == 8
    build(tmp_path, TEXTS)
    written = list((tmp_path / "an.index").iterdir())
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in written)
    assert (tmp_path / "an.index").stat().st_mode & 0o777 == 0o700


def test_documents_that_no_shard_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "LARGEST_SHARD", 40)
    with pytest.raises(UsageError, match=r"1.txt: document 1 has 41 bytes; a shard holds 40"):
        build(tmp_path, ["a" * 41])
    made = build(tmp_path, ["a" * 30, "b" * 30])
    assert made.manifest.shards == 2
