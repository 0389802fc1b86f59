"""Documents from files, here or on the Hub: the one reader of text that training, router rows and evaluation share."""

from __future__ import annotations

import gzip
import hashlib
import heapq
import io
import json
import os
import zlib
from codecs import BOM_UTF8
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

import zstandard

from flexctl import hub
from flexctl.errors import UsageError
from flexctl.text.tables import missing_field, read_csv, read_parquet

__all__ = [
    "PassageSampler",
    "Record",
    "pinned",
    "read_documents",
    "read_records",
    "refuse_among",
    "refuse_unreadable",
    "sample_documents",
    "sample_halves",
    "sample_passages",
    "size_bytes",
    "source_name",
    "text_files",
]

PASSAGE_CHARACTERS = 1000

_JSONL = (".jsonl", ".ndjson")
_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_PACKED = (".gz", ".zst")
_PACKED_BYTES = 512  # that unpack at once: zstandard makes up to 30,000 bytes of one
_MOST_TIMES = 100
_LEAST_UNPACKED = 1 << 26
_CHOSEN_FROM = 4096
_FORMATS = "give a folder, a text file, .jsonl, .csv, .parquet or hf://datasets/OWNER/NAME"
_BINARY = frozenset(
    """.7z .a .arrow .avi .bin .bmp .bz2 .class .db .dll .dylib .exe .gguf .gif .h5 .ico .jar .jpeg .jpg .mp3 .mp4 .npy
    .npz .o .pdf .pickle .pkl .png .pt .pth .pyc .safetensors .so .sqlite .st .tar .tiff .ttf .wav .webp .whl
    .woff .woff2 .xz .zip""".split()  # noqa: SIM905
)


@dataclass(frozen=True, slots=True)
class Record:
    """A document and where it stands: the file, here or on the Hub, and its number in it, from 1."""

    file: str
    number: int
    text: str


def text_files(paths: Iterable[Path], field: str = "data") -> list[Path | hub.DataFile]:
    """Return the files behind ``paths``, sorted by name within each folder; hidden and binary ones are left out.

    Args:
        paths: Files, folders and ``hf://datasets/...``.
        field: Of the Config that names them, for errors.

    Raises:
        UsageError: A path does not exist, or there is no text file behind it.
        FlexctlError: The Hub cannot be reached, or refuses.
    """
    return list(chain(*_by_path(paths, field)))


def _by_path(paths: Iterable[Path], field: str) -> list[list[Path | hub.DataFile]]:
    found = [_files_behind(path, field) for path in paths]
    if not any(found):
        raise UsageError(f"no text file in {', '.join(map(str, paths))}", field=field)
    return found


def _files_behind(path: Path, field: str) -> list[Path | hub.DataFile]:
    if hub.is_remote(path):
        return [*_files_on_the_hub(hub.parse_data(path))]
    if path.is_file():
        return [path]
    if path.is_dir():
        return [*_files_below(path)]
    if path.exists():
        raise UsageError(
            f"{path} is no regular file, and text is read more than once", hint="write it to a file first", field=field
        )
    raise UsageError(f"{path} does not exist", hint=_FORMATS, field=field)


def refuse_unreadable(paths: Sequence[Path], text_field: str, field: str = "data") -> None:
    """Refuse text that is not there or cannot be read, as far as each path's first document tells.

    For before any work, and for dry runs.

    Args:
        paths: Files, folders and ``hf://datasets/...``.
        text_field: The column or the field of a line that holds the text.
        field: Of the Config that names the paths, for errors.

    Raises:
        UsageError, FlexctlError: As ``text_files`` and ``read_records``.
    """
    firsts = [next(_records(files, set(paths), text_field), None) for files in _by_path(paths, field)]
    if not any(firsts):
        raise UsageError(_without_text(paths), field=field)


def refuse_among(place: Path, paths: Iterable[Path], field: str) -> None:
    """Refuse a place to write whose files would be read as text the next time.

    Args:
        place: What is to be written.
        paths: Files, folders and ``hf://datasets/...`` that are read.
        field: Of the Config that names the place.

    Raises:
        UsageError: It is one of ``paths`` or lies below one.
    """
    real = Path(os.path.realpath(place))
    for path in paths:
        if Path(os.path.realpath(path)) in (real, *real.parents):
            raise UsageError(f"{place} would be among the text of {path}", hint="choose another place", field=field)


def pinned(paths: Iterable[Path]) -> tuple[Path, ...]:
    """Return ``paths`` with data sets on the Hub at the commit they have now; there is text behind each.

    Whoever reads more than once does so from what this returns, and so reads the same every time.

    Raises:
        UsageError, FlexctlError: As ``text_files``.
    """
    return tuple(_pinned(path) for path in paths)


def _pinned(path: Path) -> Path:
    first = text_files([path])[0]
    if isinstance(first, Path):
        return path
    return Path(str(replace(first.address, revision=first.commit)))


def size_bytes(paths: Iterable[Path]) -> int:
    """Return the size of the files behind ``paths``, packed ones and tables as they are."""
    return sum(map(_size, text_files(paths)))


def _size(file: Path | hub.DataFile) -> int:
    return file.stat().st_size if isinstance(file, Path) else file.size


def source_name(path: Path) -> str:
    """Return what to call the text at ``path``: the name of its folder, file or data set, without endings."""
    name = hub.parse_data(path).repository.split("/")[1] if hub.is_remote(path) else path.resolve().name
    return name.split(".")[0]


def _files_on_the_hub(address: hub.DataAddress) -> list[hub.DataFile]:
    return [
        file
        for file in hub.data_files(address)
        if file.path == address.path or _is_text_name(PurePosixPath(file.path).relative_to(address.path or ""))
    ]


def _files_below(folder: Path) -> list[Path]:
    inside = sorted(folder.rglob("*"), key=lambda path: path.relative_to(folder).parts)
    return [path for path in inside if path.is_file() and _is_text_name(path.relative_to(folder))]


def _is_text_name(relative: PurePath) -> bool:
    hidden = any(part.startswith(".") for part in relative.parts)
    return not hidden and relative.suffix.lower() not in _BINARY


def read_documents(paths: Sequence[Path], text_field: str = "text") -> Iterator[str]:
    """Yield each document's text, as ``read_records`` does."""
    return (record.text for record in read_records(paths, text_field))


def read_records(paths: Sequence[Path], text_field: str = "text") -> Iterator[Record]:
    """Yield each document: a row of a table, a record of a .jsonl or .json file, or a whole file otherwise.

    A .json file that was found in a folder and has no such field, as a package.json, is a whole file too. Empty
    documents are left out, and counted. Memory holds one document, or a few rows, at a time; of a .json file that is
    one list, all of it.

    Args:
        paths: Folders, files, and ``hf://datasets/...``, which is fetched while it is read.
        text_field: The column or the field of a line that holds the text.

    Raises:
        UsageError: A file cannot be read, is not UTF-8, or a row or line has no such field with text; or, at the end,
            there was no document.
        FlexctlError: The Hub cannot be reached, or refuses.
    """
    is_empty = True
    for record in _records(text_files(paths), set(paths), text_field):
        is_empty = False
        yield record
    if is_empty:
        raise UsageError(_without_text(paths))


def _without_text(paths: Sequence[Path]) -> str:
    return f"no document with text in {', '.join(map(str, paths))}"


def _records(files: Iterable[Path | hub.DataFile], named: Collection[Path], text_field: str) -> Iterator[Record]:
    for file in files:
        must_be_records = isinstance(file, hub.DataFile) or file in named
        try:
            for number, text in enumerate(_read_file(file, text_field, must_be_records=must_be_records), start=1):
                if text and not text.isspace():
                    yield Record(str(file), number, text)
        except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
            raise UsageError(f"{file}: cannot be read: {error}") from error


def _read_file(file: Path | hub.DataFile, text_field: str, *, must_be_records: bool) -> Iterator[str]:
    name, kind = str(file), _kind(file)
    with _opened(file) as stream:
        if kind in _SEPARATORS:
            yield from read_csv(stream, name, text_field, separator=_SEPARATORS[kind])
        elif kind == ".parquet":
            yield from read_parquet(stream, name, text_field)
        elif kind in _JSONL:
            yield from _read_lines(stream, name, text_field)
        elif kind == ".json":
            yield from _read_json(stream, name, text_field, must_be_records=must_be_records)
        else:
            yield _decoded(name, stream.read())


def _kind(file: Path | hub.DataFile) -> str:
    """Return the ending that says how to read a file, without that of its packing."""
    suffixes = [suffix.lower() for suffix in PurePath(file.name).suffixes]
    return next((suffix for suffix in reversed(suffixes) if suffix not in _PACKED), "")


def _read_lines(lines: Iterable[bytes], name: str, text_field: str) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        where = f"{name}, line {number}"
        if decoded := _decoded(where, line).strip():
            yield _text_of(where, _parsed(where, decoded), text_field)


def _read_json(stream: io.BufferedIOBase, name: str, text_field: str, *, must_be_records: bool) -> Iterator[str]:
    """Yield the text of each record: one a line, or all of them in one list, or a single one over several lines.

    Where it need not be records, and the first is none with the field, the whole file is the text.
    """
    before, first = b"", stream.readline()
    while first.isspace():
        before, first = before + first, stream.readline()
    if _is_object(first) and (must_be_records or _has_field(first, text_field)):
        yield from _read_lines(chain([first], stream), name, text_field)
        return
    whole = _decoded(name, before + first + stream.read())
    if not must_be_records and not _has_field(whole, text_field):
        yield whole
    elif whole.strip():
        value = _parsed(name, whole)
        if isinstance(value, list):
            for number, record in enumerate(value, start=1):
                yield _text_of(f"{name}, record {number}", record, text_field)
        else:
            yield _text_of(name, value, text_field)


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _has_field(text: bytes | str, text_field: str) -> bool:
    """Return whether this is JSON whose record, or the first of a list, has a field; an empty list has no other."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    first = value[:1] if isinstance(value, list) else [value]
    return all(isinstance(record, dict) and text_field in record for record in first)


def _decoded(where: str, raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{where}: not UTF-8 at byte {error.start}", hint="convert it, or leave it out") from error


@contextmanager
def _opened(file: Path | hub.DataFile) -> Iterator[io.BufferedIOBase]:
    """Give the unpacked bytes: lines then end at newlines alone, and line ends stay as they are."""
    suffix = PurePath(file.name).suffix.lower()
    with file.open("rb") as packed:
        if suffix == ".gz":
            with gzip.open(packed) as inside, io.BufferedReader(_Bounded(inside, _size(file))) as unpacked:
                yield _after_mark(unpacked)
        elif suffix == ".zst":
            with io.BufferedReader(_Bounded(_Unzstd(packed), _size(file))) as unpacked:
                yield _after_mark(unpacked)
        else:
            yield _after_mark(packed)


def _after_mark(stream: Any) -> Any:
    """Return the stream after the byte order mark that some editors begin a file with."""
    if stream.peek(len(BOM_UTF8)).startswith(BOM_UTF8):
        stream.read(len(BOM_UTF8))
    return stream


class _Bounded(io.RawIOBase):
    """Unpacked bytes, up to far more than any text packs to: a small file cannot fill the memory."""

    def __init__(self, unpacked: Any, packed_bytes: int) -> None:
        self._unpacked = unpacked
        self._left = max(_LEAST_UNPACKED, _MOST_TIMES * packed_bytes)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._unpacked.read(len(buffer))
        self._left -= len(data)
        if self._left < 0:
            raise OSError(f"it unpacks to more than {_MOST_TIMES} times its size, as no text does")
        buffer[: len(data)] = data
        return len(data)


class _Unzstd(io.RawIOBase):
    """A .zst file's unpacked bytes, frame after frame; the library takes a file that was cut short for a whole one."""

    def __init__(self, packed: io.BufferedIOBase) -> None:
        self._file = packed
        self._frame: Any = None
        self._packed, self._unpacked = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._unpacked and self._unpack():
            pass
        count = min(len(buffer), len(self._unpacked))
        buffer[:count], self._unpacked = self._unpacked[:count], self._unpacked[count:]
        return count

    def _unpack(self) -> bool:
        packed = self._packed or self._file.read(_PACKED_BYTES)
        if not packed:
            if self._frame is not None:
                raise EOFError("it ends inside a zstandard frame")
            return False
        if self._frame is None:
            self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._packed, self._unpacked = b"", memoryview(self._frame.decompress(packed))
        if self._frame.eof:
            self._packed, self._frame = self._frame.unused_data, None
        return True


def _parsed(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: not JSON: {error}", hint="text that is no JSON belongs in a .txt file") from error


_KINDS = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
"""What a value of JSON is called, by its type in Python."""


def _text_of(where: str, record: Any, text_field: str) -> str:
    if not isinstance(record, dict):
        raise UsageError(f"{where}: no record with fields", hint=f'a record is {{"{text_field}": "..."}}')
    if text_field not in record:
        raise missing_field(where, text_field, record, "field")
    text = "" if record[text_field] is None else record[text_field]
    if not isinstance(text, str):
        # What it holds may be the owner's own words, and a message goes into logs.
        raise UsageError(f"{where}: {text_field!r} holds {_KINDS[type(text)]}, not text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{where}: {text_field!r} holds half a surrogate pair at character {error.start}") from error
    return text


class PassageSampler:
    """Chooses passages of about PASSAGE_CHARACTERS by a seeded hash of their text.

    Long documents give several passages, so that a handful of books is a sample as good as thousands of notes. Copies
    of a passage count as often as they come.

    Args:
        count: How many to choose at most.
        seed: Of the choice.
    """

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._seed, self._seen = count, seed, 0
        self._heap: list[tuple[int, int, str]] = []

    def add(self, document: str) -> None:
        """Let the choice have a document's passages."""
        if not self._count:
            return
        for passage in _passages([document]):
            entry = (-int.from_bytes(_rank(self._seed, passage), "big"), -self._seen, passage)
            (heapq.heappush if len(self._heap) < self._count else heapq.heappushpop)(self._heap, entry)
            self._seen += 1

    def chosen(self) -> list[str]:
        """Return what was chosen of all documents so far, by rank: the first of them are what fewer would be."""
        return [passage for _, _, passage in sorted(self._heap, reverse=True)]


def sample_passages(documents: Iterable[str], count: int, seed: int) -> list[str]:
    """Return what a ``PassageSampler`` chooses of all documents."""
    sampler = PassageSampler(count, seed)
    for document in documents:
        sampler.add(document)
    return sampler.chosen()


def sample_documents(documents: Iterable[str], count: int, seed: int) -> list[str]:
    """Return at most ``count`` documents, each text once, chosen and ordered by a seeded hash of it."""
    first: dict[bytes, str] = {}
    for text in documents:
        first[hashlib.sha256(f"{seed}\2{text}".encode()).digest()] = text
        if len(first) > 2 * count:
            first = dict(heapq.nsmallest(count, first.items()))
    return [text for _, text in heapq.nsmallest(count, first.items())]


def sample_halves(documents: Iterable[str], count: int, seed: int) -> tuple[list[str], list[str]]:
    """Return two samples of at most ``count`` different passages each, of about one size and with none in both.

    One is to make router rows from, the other to see how they do. Both are chosen as by ``sample_passages``.
    """
    kept: list[str] = []
    passages = _passages(documents)
    while some := set(islice(passages, _CHOSEN_FROM)):
        kept = heapq.nsmallest(2 * count, some.union(kept), key=partial(_rank, seed))
    half = len(kept) // 2
    return kept[:half], kept[half:]


def _passages(documents: Iterable[str]) -> Iterator[str]:
    for text in documents:
        for start in range(0, max(1, len(text) - PASSAGE_CHARACTERS // 2), PASSAGE_CHARACTERS):
            passage = text[start : start + PASSAGE_CHARACTERS]
            if passage.strip():
                yield passage


def _rank(seed: int, passage: str) -> bytes:
    return hashlib.sha256(f"{seed}\1{passage}".encode()).digest()
