"""Documents from files: the one reader of text that training, router rows and evaluation share."""

from __future__ import annotations

import gzip
import hashlib
import heapq
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import zstandard

from flexctl.errors import UsageError

__all__ = ["read_documents", "sample_halves", "sample_passages", "text_files"]

PASSAGE_CHARACTERS = 1000

_JSONL = (".jsonl", ".ndjson")
_PACKED = (".gz", ".zst")
_READ_BYTES = 65_536
_BINARY = frozenset(
    """.7z .a .avi .bin .bmp .bz2 .class .db .dll .dylib .exe .gguf .gif .h5 .ico .jar .jpeg .jpg .mp3 .mp4 .npy .npz
    .o .parquet .pdf .pickle .pkl .png .pt .pth .pyc .safetensors .so .sqlite .st .tar .tiff .ttf .wav .webp .whl
    .woff .woff2 .xz .zip""".split()  # noqa: SIM905
)


def text_files(paths: Iterable[Path]) -> list[Path]:
    """Return the files behind ``paths``, sorted by name within each folder; hidden and binary ones are left out.

    Raises:
        UsageError: A path does not exist, or there is no text file behind it.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_file():
            found.append(path)
        elif path.is_dir():
            found += _files_below(path)
        else:
            raise UsageError(f"--data: {path} does not exist", hint="give a folder of text, a text file or a .jsonl")
    if not found:
        raise UsageError(f"--data: no text file in {', '.join(map(str, paths))}")
    return found


def _files_below(folder: Path) -> list[Path]:
    inside = sorted(folder.rglob("*"), key=lambda path: path.relative_to(folder).parts)
    return [path for path in inside if path.is_file() and _is_text_name(path.relative_to(folder))]


def _is_text_name(relative: Path) -> bool:
    hidden = any(part.startswith(".") for part in relative.parts)
    return not hidden and relative.suffix.lower() not in _BINARY


def read_documents(paths: Sequence[Path]) -> Iterator[str]:
    """Yield each document's text: a line of a .jsonl file, or a whole file otherwise.

    Empty documents are left out. Memory holds one document at a time.

    Raises:
        UsageError: A file cannot be read, is not UTF-8, or a line is no ``{"text": ...}``.
    """
    for path in text_files(paths):
        try:
            yield from _read_file(path)
        except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
            raise UsageError(f"{path}: cannot be read: {error}") from error


def _read_file(path: Path) -> Iterator[str]:
    inner = Path(path.stem) if path.suffix.lower() in _PACKED else path
    with _open(path) as stream:
        if inner.suffix.lower() in _JSONL:
            for number, line in enumerate(stream, start=1):
                where = f"{path}, line {number}"
                if decoded := _decoded(where, line).strip():
                    yield from _kept(_text_of(where, decoded))
        else:
            yield from _kept(_decoded(str(path), stream.read()))


def _decoded(where: str, raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{where}: not UTF-8 at byte {error.start}", hint="convert it, or leave it out of --data"
        ) from error


def _kept(text: str) -> Iterator[str]:
    if text.strip():
        yield text


def _open(path: Path) -> io.BufferedIOBase:
    """Return the unpacked bytes: lines then end at newlines alone, and line ends stay as they are."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.open(path, "rb")
    if suffix == ".zst":
        return io.BufferedReader(_Unzstd(path))
    return path.open("rb")


class _Unzstd(io.RawIOBase):
    """A .zst file's unpacked bytes, frame after frame; the library takes a file that was cut short for a whole one."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._frame: Any = None
        self._packed, self._unpacked = b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._unpacked and self._unpack():
            pass
        count = min(len(buffer), len(self._unpacked))
        buffer[:count], self._unpacked = self._unpacked[:count], self._unpacked[count:]
        return count

    def _unpack(self) -> bool:
        packed = self._packed or self._file.read(_READ_BYTES)
        if not packed:
            if self._frame is not None:
                raise EOFError("it ends inside a zstandard frame")
            return False
        if self._frame is None:
            self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._packed, self._unpacked = b"", self._frame.decompress(packed)
        if self._frame.eof:
            self._packed, self._frame = self._frame.unused_data, None
        return True

    def close(self) -> None:
        self._file.close()
        super().close()


def _text_of(where: str, line: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UsageError(f"{where}: not JSON: {error}") from error
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise UsageError(f'{where}: no "text" field with a string', hint='a line is {"text": "..."}')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f'{where}: "text" holds half a surrogate pair at character {error.start}') from error
    return text


def sample_passages(documents: Iterable[str], count: int, seed: int) -> list[str]:
    """Return at most ``count`` passages of about PASSAGE_CHARACTERS, chosen and ordered by a seeded hash of their text.

    Long documents give several passages, so that a handful of books is a sample as good as thousands of notes.
    """

    def rank(text: str) -> bytes:
        return hashlib.sha256(f"{seed}\1{text}".encode()).digest()

    passages = (
        text[start : start + PASSAGE_CHARACTERS]
        for text in documents
        for start in range(0, max(1, len(text) - PASSAGE_CHARACTERS // 2), PASSAGE_CHARACTERS)
    )
    return heapq.nsmallest(count, (passage for passage in passages if passage.strip()), key=rank)


def sample_halves(documents: Iterable[str], count: int, seed: int) -> tuple[list[str], list[str]]:
    """Return two samples of at most ``count`` passages each, of about one size and with none in both.

    One is to make router rows from, the other to see how they do.
    """
    passages = sample_passages(documents, 2 * count, seed)
    half = len(passages) // 2
    return passages[:half], passages[half:]
