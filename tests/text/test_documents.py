"""One reader of text: what is a document, what is left out, and one line of error that names file and line."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from flexctl.errors import UsageError
from flexctl.text import documents as documents_module
from flexctl.text.documents import (
    PASSAGE_CHARACTERS,
    pinned,
    read_documents,
    sample_halves,
    sample_passages,
    size_bytes,
    source_name,
    text_files,
)


def put(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines(*texts: str) -> str:
    return "".join(json.dumps({"text": text, "source": "here"}) + "\n" for text in texts)


def read(*paths: Path) -> list[str]:
    return list(read_documents(list(paths)))


def refused(path: Path) -> str:
    with pytest.raises(UsageError) as caught:
        read(path)
    assert "\n" not in caught.value.message
    assert str(path) in caught.value.message
    return caught.value.message


def test_folder_is_read_by_name_and_hidden_and_binary_files_are_not(tmp_path: Path) -> None:
    put(tmp_path / "b.txt", "second")
    put(tmp_path / "a.md", "first")
    put(tmp_path / "sub" / "c.py", "third")
    put(tmp_path / "sub" / "d.jsonl", lines("fourth", "fifth"))
    put(tmp_path / "no-ending", "zero")
    for name in (".hidden", ".git/config", "sub/.cache/x.txt", "x.PNG", "model.safetensors", "y.pyc", "z.st"):
        put(tmp_path / name, b"\xff\xfe not text")
    assert read(tmp_path) == ["first", "second", "zero", "third", "fourth", "fifth"]
    assert [path.name for path in text_files([tmp_path])] == ["a.md", "b.txt", "no-ending", "c.py", "d.jsonl"]


def test_paths_keep_the_order_given_and_a_named_file_is_read_whatever_it_is_called(tmp_path: Path) -> None:
    late, early = put(tmp_path / "z.txt", "late"), put(tmp_path / ".a.bin", "early")
    assert read(late, early) == ["late", "early"]


def test_a_hidden_folder_that_is_named_is_read(tmp_path: Path) -> None:
    put(tmp_path / ".text" / "a.txt", "inside")
    assert read(tmp_path / ".text") == ["inside"]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst", "a.jsonl", "a.jsonl.gz", "a.ndjson.ZST", "a.JSONL"])
def test_every_container_gives_the_same_text(tmp_path: Path, name: str) -> None:
    text = "caf\u00e9\r\nline two\rline three\n\u2028 still the same line \U0001f600\n\n"
    raw = (lines(text, text + "2") if "json" in name.lower() else text).encode()
    if name.lower().endswith(".gz"):
        raw = gzip.compress(raw)
    if name.lower().endswith(".zst"):
        raw = zstandard.ZstdCompressor().compress(raw)
    expected = [text, text + "2"] if "json" in name.lower() else [text]
    assert read(put(tmp_path / name, raw)) == expected


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_packed_files_in_several_frames_are_read_to_their_end(tmp_path: Path, ending: str) -> None:
    pack = gzip.compress if ending == "gz" else zstandard.ZstdCompressor().compress
    path = put(tmp_path / f"a.jsonl.{ending}", b"".join(pack(lines(text).encode()) for text in ("one", "two", "three")))
    assert read(path) == ["one", "two", "three"]


def test_jsonl_with_crlf_and_blank_lines(tmp_path: Path) -> None:
    assert read(put(tmp_path / "a.jsonl", '{"text": "one"}\r\n\r\n   \n{"text": "two"}')) == ["one", "two"]


MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.ZstdCompressor().compress])
@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.jsonl", "a.json", "a.csv", "a.tsv"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str, pack: Callable[[bytes], bytes]) -> None:
    contents = {".jsonl": lines("one"), ".json": lines("one"), ".csv": "text\none\n", ".tsv": "text\none\n"}
    ending = {gzip.compress: ".gz", bytes: ""}.get(pack, ".zst")
    raw = pack(MARK + contents.get(Path(name).suffix, "one").encode())
    assert read(put(tmp_path / (name + ending), raw)) == ["one"]


def test_a_mark_inside_a_text_stays(tmp_path: Path) -> None:
    assert read(put(tmp_path / "a.txt", MARK + b"a" + MARK)) == ["a\ufeff"]
    with pytest.raises(UsageError, match=r"no document with text in .*empty\.txt"):
        read(put(tmp_path / "empty.txt", MARK))


RECORDS = [{"text": "one\n", "id": 1}, {"text": "two", "id": 2}]


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(RECORDS),
        json.dumps(RECORDS, indent=2),
        "\n".join(map(json.dumps, RECORDS)),
        "\n\n" + "\r\n\r\n".join(map(json.dumps, RECORDS)) + "\n",
    ],
)
@pytest.mark.parametrize("name", ["a.json", "a.JSON.gz"])
def test_json_holds_records(tmp_path: Path, content: str, name: str) -> None:
    raw = gzip.compress(content.encode()) if name.endswith("gz") else content
    assert read(put(tmp_path / name, raw)) == ["one\n", "two"]


def test_a_single_record_in_json_is_a_document(tmp_path: Path) -> None:
    assert read(put(tmp_path / "a.json", json.dumps(RECORDS[0]))) == ["one\n"]
    assert read(put(tmp_path / "b.json", json.dumps(RECORDS[0], indent=2))) == ["one\n"]
    nothing = put(tmp_path / "c.json", ""), put(tmp_path / "d.json", "[]")
    with pytest.raises(UsageError, match=r"no document with text in .*c\.json, .*d\.json"):
        read(*nothing)
    assert read(*nothing, put(tmp_path / "e.json", json.dumps(RECORDS[0]))) == ["one\n"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("plain words", "not JSON"),
        ("3", "no record with fields"),
        ('["one", "two"]', "record 1: no record with fields"),
        ('[{"text": "one"}, {"body": "two"}]', "record 2: no field 'text'; there are 'body'"),
        (json.dumps({"name": "x", "version": 1}, indent=1), "no field 'text'; there are 'name', 'version'"),
        ('{"text": "one"}\n{"text": ', "line 2: not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[" * 100_000 + "]" * 100_000, "not JSON"),
    ],
)
def test_json_without_records_is_refused(tmp_path: Path, content: str, says: str) -> None:
    assert says in refused(put(tmp_path / "a.json", content))


@pytest.mark.parametrize(
    "content",
    [
        json.dumps({"name": "x", "version": 1}, indent=1),
        json.dumps({"name": "x", "version": 1}),
        '\n\n{"name": "x"}\n{"name": "y"}\n',
        '[{"body": "one"}, {"body": "two"}]',
        '["one", "two"]',
        "3",
        "// with comments\n{}",
        "[" * 100_000 + "]" * 100_000,
    ],
)
@pytest.mark.parametrize("name", ["package.json", "package.json.gz"])
def test_json_without_records_in_a_folder_is_text_like_any_other_file(tmp_path: Path, content: str, name: str) -> None:
    """A folder of code has such files. Whoever names one means its records."""
    raw = gzip.compress(content.encode()) if name.endswith("gz") else content
    file = put(tmp_path / "code" / name, raw)
    put(tmp_path / "code" / "z.py", "pass")
    assert read(tmp_path / "code") == [content, "pass"]
    refused(file)
    with pytest.raises(UsageError):
        read(tmp_path / "code", file)


def test_json_with_records_in_a_folder_holds_records(tmp_path: Path) -> None:
    put(tmp_path / "a.json", json.dumps(RECORDS))
    put(tmp_path / "b.json", "\n".join(map(json.dumps, RECORDS)))
    put(tmp_path / "c.json", json.dumps(RECORDS[0], indent=2))
    put(tmp_path / "d.json", "[]")
    assert read(tmp_path) == ["one\n", "two"] * 2 + ["one\n"]
    put(tmp_path / "e.json", '[{"text": "one"}, {"body": "two"}]')
    with pytest.raises(UsageError, match=r"e\.json, record 2: no field 'text'"):
        read(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "is no regular file, and text is read more than once" in refused(tmp_path / "pipe")


def test_documents_without_text_are_left_out(tmp_path: Path) -> None:
    put(tmp_path / "a.txt", " \n\t\n")
    put(tmp_path / "b.txt", "")
    put(tmp_path / "c.jsonl", lines("", "  ", "real") + '{"text": null}\n')
    assert read(tmp_path) == ["real"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"text": "unclosed', "line 2: not JSON"),
        ('["text"]', "line 2: no record with fields"),
        ('{"content": "x"}', "line 2: no field 'text'; there are 'content'"),
        ("{}", "line 2: no field 'text'; there are none"),
        ('{"text": 5}', "line 2: 'text' holds a number, not text"),
        ('{"text": ["x"]}', "line 2: 'text' holds a list, not text"),
        ('{"text": "half a pair: \\ud83d"}', "line 2: "),
        ("plain words", "line 2: not JSON"),
        ('{"text": ' + "[" * 100_000 + "]" * 100_000 + "}", "line 2: not JSON"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, says: str) -> None:
    assert says in refused(put(tmp_path / "a.jsonl", lines("fine") + line + "\n"))


def test_text_that_is_not_utf_8_is_named_with_its_byte(tmp_path: Path) -> None:
    assert "not UTF-8 at byte 3" in refused(put(tmp_path / "a.txt", b"abc\xff\xfe"))
    assert "not UTF-8" in refused(put(tmp_path / "a.jsonl", b'{"text": "\xff"}\n'))


@pytest.mark.parametrize("ending", ["txt.gz", "jsonl.gz", "txt.zst", "jsonl.zst"])
def test_packed_files_that_are_broken_are_refused(tmp_path: Path, ending: str) -> None:
    pack = gzip.compress if ending.endswith("gz") else zstandard.ZstdCompressor().compress
    whole = pack(lines(*(f"document {i * i} of many" for i in range(400))).encode())
    assert len(whole) > 200
    refused(put(tmp_path / f"not-packed.{ending}", b"plain text"))
    refused(put(tmp_path / f"cut.{ending}", whole[: len(whole) // 2]))
    middle = len(whole) // 2
    refused(put(tmp_path / f"garbled.{ending}", whole[:middle] + bytes(64) + whole[middle + 64 :]))


def test_size_and_name_of_what_is_named(tmp_path: Path) -> None:
    put(tmp_path / "law.texts" / "a.txt", "12345")
    put(tmp_path / "law.texts" / "b.csv", "text\n1\n")
    assert size_bytes([tmp_path / "law.texts", tmp_path / "law.texts" / "a.txt"]) == 5 + 7 + 5
    assert source_name(tmp_path / "law.texts") == source_name(tmp_path / "law.texts" / ".") == "law"
    assert source_name(Path("hf://datasets/acme/notes.v2@main:en:test")) == "notes"
    assert pinned([tmp_path]) == (tmp_path,)


def test_paths_without_text_are_refused(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "nowhere")
    put(tmp_path / "empty" / ".hidden", "x")
    assert "no text file" in refused(tmp_path / "empty")


def test_passages_of_long_documents_cover_them() -> None:
    text = "".join(chr(ord("a") + i % 26) for i in range(5 * PASSAGE_CHARACTERS + 700))
    passages = sample_passages([text], 100, seed=0)
    assert len(passages) == 6
    assert sum(map(len, passages)) == len(text)
    assert all(passage in text for passage in passages)


def test_short_documents_are_one_passage_each() -> None:
    assert sorted(sample_passages(["a", "b" * 1400, "  "], 100, seed=0)) == ["a", "b" * 1000]


documents = st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=20, unique=True)


@given(texts=documents, count=st.integers(1, 25), seed=st.integers(0, 5), shuffle=st.randoms())
def test_passages_are_a_seeded_sample_whatever_the_order(texts: list[str], count: int, seed: int, shuffle) -> None:
    found = sample_passages(texts, count, seed)
    shuffled = list(texts)
    shuffle.shuffle(shuffled)
    assert sample_passages(shuffled, count, seed) == found
    assert len(found) == min(count, sum(bool(text.strip()) for text in texts))
    assert sample_passages(texts, count + 3, seed)[: len(found)] == found


def test_other_seeds_give_other_samples() -> None:
    texts = [f"document {i}" for i in range(100)]
    assert set(sample_passages(texts, 10, seed=0)) != set(sample_passages(texts, 10, seed=1))


@pytest.mark.parametrize("count", [2, 3, 40])
def test_halves_share_no_passage_and_are_the_sample(count: int) -> None:
    texts = [f"text {i}" for i in range(9)]
    first, second = sample_halves(texts, count, seed=1)
    assert not set(first) & set(second)
    assert [*first, *second] == sample_passages(texts, 2 * count, seed=1)
    assert len(first) == min(count, 4) <= len(second)


@pytest.mark.parametrize("chosen_from", [3, 4096])
def test_copies_of_a_passage_are_in_one_half_once(monkeypatch: pytest.MonkeyPatch, chosen_from: int) -> None:
    monkeypatch.setattr(documents_module, "_CHOSEN_FROM", chosen_from)
    texts = ["the same"] * 50 + [f"text {i}" for i in range(9)] + ["the same"] * 50
    first, second = sample_halves(texts, 3, seed=1)
    assert [*first, *second] == sample_passages(set(texts), 6, seed=1)
    assert sample_halves(["the same"] * 9, 3, seed=1) == ([], ["the same"])
