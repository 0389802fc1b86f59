"""Tables of text: rows as they are, a few in memory at a time, and what is not text refused in one line."""

from __future__ import annotations

import csv
import gzip
import io
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from flexctl.errors import UsageError
from flexctl.text.documents import read_documents, text_files
from flexctl.text.tables import read_csv, read_parquet

TEXTS = [
    "one, two",
    'he said "no"',
    "caf\u00e9\r\n two \u2028lines \U0001f600\n",
    "NA",
    "007",
    "null",
    " \t\n",
    "",
    "last",
]
KEPT = [text for text in TEXTS if text.strip()]


def csv_of(texts: list[str], separator: str = ",", field: str = "text") -> bytes:
    made = io.StringIO(newline="")
    writer = csv.writer(made, delimiter=separator)
    writer.writerow(["id", field, "more"])
    writer.writerows([number, text, ""] for number, text in enumerate(texts))
    return made.getvalue().encode()


def parquet_of(texts: list[str | None], field: str = "text", **settings: object) -> bytes:
    made = io.BytesIO()
    table = pa.table({"id": range(len(texts)), field: pa.array(texts, pa.string()), "more": [[1, 2]] * len(texts)})
    parquet.write_table(table, made, **settings)
    return made.getvalue()


def put(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def refused(path: Path, field: str = "text") -> UsageError:
    with pytest.raises(UsageError) as caught:
        list(read_documents([path], field))
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message
    return caught.value


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("a.csv", csv_of),
        ("a.TSV", lambda texts: csv_of(texts, "\t")),
        ("a.csv.gz", lambda texts: gzip.compress(csv_of(texts))),
        ("a.tsv.zst", lambda texts: zstandard.ZstdCompressor().compress(csv_of(texts, "\t"))),
        ("a.csv", lambda texts: b"\xef\xbb\xbf" + csv_of(texts)),
        ("a.parquet", parquet_of),
        ("a.parquet", lambda texts: parquet_of(texts, row_group_size=2, compression="zstd")),
        ("a.parquet", lambda texts: parquet_of([None, *texts, None])),
    ],
)
def test_every_table_gives_the_same_documents(tmp_path: Path, name: str, make: Callable[[list[str]], bytes]) -> None:
    path = put(tmp_path / name, make(TEXTS))
    assert list(read_documents([path])) == KEPT
    assert list(read_documents([tmp_path])) == KEPT


@given(texts=st.lists(st.text(st.characters(codec="utf-8"), max_size=20), max_size=80))
def test_tables_give_back_what_was_put_in(texts: list[str]) -> None:
    assert list(read_csv(io.BytesIO(csv_of(texts)), "x", "text")) == texts
    assert list(read_parquet(io.BytesIO(parquet_of(texts)), "x", "text")) == [text for text in texts if text]


def test_tables_lie_beside_other_text(tmp_path: Path) -> None:
    put(tmp_path / "b.csv", csv_of(["two"]))
    put(tmp_path / "c.parquet", parquet_of(["three", "four"]))
    put(tmp_path / "a.txt", b"one")
    put(tmp_path / "d.jsonl", b'{"text": "five"}\n')
    put(tmp_path / "e.arrow", b"binary")
    assert list(read_documents([tmp_path])) == ["one", "two", "three", "four", "five"]
    assert [file.name for file in text_files([tmp_path])] == ["a.txt", "b.csv", "c.parquet", "d.jsonl"]


def test_another_field(tmp_path: Path) -> None:
    put(tmp_path / "a.csv", csv_of(["one"], field="body"))
    put(tmp_path / "b.parquet", parquet_of(["two"], field="body"))
    put(tmp_path / "c.jsonl", b'{"body": "three", "text": 5}\n')
    assert list(read_documents([tmp_path], "body")) == ["one", "two", "three"]
    for name, kind in (("a.csv", "column"), ("b.parquet", "column")):
        error = refused(tmp_path / name)
        assert f"no {kind} 'text'; there are 'id', 'body', 'more'" in error.message
        assert error.hint == "name it by `text_field`"
    assert "line 1: no field 'title'; there are 'body', 'text'" in refused(tmp_path / "c.jsonl", "title").message


def test_dictionaries_and_large_strings_are_text(tmp_path: Path) -> None:
    for number, kind in enumerate((pa.large_string(), pa.dictionary(pa.int32(), pa.string()))):
        column = pa.array(["one", None, "two"], pa.string()).cast(kind)
        parquet.write_table(pa.table({"text": column}), tmp_path / f"{number}.parquet")
        assert list(read_documents([tmp_path / f"{number}.parquet"])) == ["one", "two"]


@pytest.mark.parametrize(
    ("column", "kind"),
    [([["a"], ["b"]], "list<"), ([1, 2], "int64"), ([{"a": "b"}], "struct<"), ([b"a"], "binary")],
)
def test_columns_without_text_are_refused(tmp_path: Path, column: list[object], kind: str) -> None:
    parquet.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    message = refused(tmp_path / "a.parquet").message
    assert f"column 'text' holds {kind}" in message
    assert "not text" in message


@pytest.mark.parametrize("cut", [0, 3, 40, 0.5, 0.99])
def test_a_parquet_file_that_was_cut_is_refused(tmp_path: Path, cut: float) -> None:
    whole = parquet_of(TEXTS * 50)
    size = int(cut * len(whole)) if isinstance(cut, float) else cut
    assert "cannot be read" in refused(put(tmp_path / "a.parquet", whole[:size])).message


def test_a_parquet_file_whose_text_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    plain = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    whole = bytearray(parquet_of(["plain text that is long enough"] * 5, **plain))
    at = whole.index(b"plain text")
    whole[at] = 0xFF
    assert "cannot be read: 'utf-8' codec" in refused(put(tmp_path / "a.parquet", bytes(whole))).message


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'text,n\n"open,1\nmore,2\n', "line 3: unexpected end of data"),
        (b'text,n\nfine,1\n"a "b" c",2\n', "line 3: "),
        (b"text\nhello, world\n", "line 2: 2 fields, where the first line names 1"),
        (b"text,n\nfine,1\nshort\n", "line 3: 1 fields, where the first line names 2"),
        (
            b"No names here, only text.\nAnd more, of it.\n",
            "no column 'text'; there are 'No names here', ' only text.'",
        ),
        (b"x" * 100 + b",y\n1,2\n", f"there are '{'x' * 37}...', 'y'"),
        (b"text\nfine\ncaf\xe9\n", "not UTF-8"),
    ],
)
def test_bad_csv_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    assert says in refused(put(tmp_path / "a.csv", content)).message


def test_many_columns_are_not_all_named(tmp_path: Path) -> None:
    names = ",".join(f"c{number}" for number in range(1000))
    message = refused(put(tmp_path / "a.csv", f"{names}\n".encode())).message
    assert message.endswith("'c11', ...")


def test_tables_without_rows_hold_no_documents(tmp_path: Path) -> None:
    for name, content in (
        ("a.csv", b""),
        ("b.csv", b"text,n\n"),
        ("c.csv", b"text\n\n\n"),
        ("d.parquet", parquet_of([])),
    ):
        with pytest.raises(UsageError, match=f"no document with text in .*{name}"):
            next(read_documents([put(tmp_path / name, content)]))


def test_a_cell_may_be_long(tmp_path: Path) -> None:
    long = "word, " * 100_000
    assert list(read_documents([put(tmp_path / "a.csv", csv_of([long]))])) == [long]


def test_memory_is_that_of_some_rows(tmp_path: Path) -> None:
    texts = [f"{number} " * 2000 for number in range(1000, 2000)]
    size = sum(map(len, texts))
    group = {"row_group_size": len(texts), "write_batch_size": 8, "compression": "none", "use_dictionary": False}
    for name, content in (("a.csv", csv_of(texts)), ("b.parquet", parquet_of(texts, **group))):
        path = put(tmp_path / name, content)
        list(read_documents([path]))
        held = pa.total_allocated_bytes()
        tracemalloc.start()
        most = count = 0
        for text in read_documents([path]):
            count += len(text)
            most = max(most, pa.total_allocated_bytes() - held)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count == size == 10_000_000
        assert most + peak < 3_000_000, name
