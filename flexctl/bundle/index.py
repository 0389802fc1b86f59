"""An index of an owner's text: a directory on their own disk, in which any span of bytes is found at once.

Its text is in shards of a bounded size. A shard is three files: ``0000.text``, documents in UTF-8, each with the byte
0xFF behind it, which no UTF-8 has; ``0000.suffixes``, the suffix array of these bytes, int32; ``0000.documents``, for
each document its first byte in the shard, the number of its file in ``sources.json`` and its number in that file,
int64. All numbers are little-endian. An index holds the text itself, so its files are its owner's alone, mode 0600.
"""

from __future__ import annotations

import mmap
import stat
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from flexctl.bundle.codec import canonical_json, decode, digest_of_rest, parse_json, read_bytes
from flexctl.bundle.manifest import MANIFEST_FILE, SCHEMA_VERSION
from flexctl.bundle.names import check_expert_name, check_file_name, shown
from flexctl.errors import BundleError, UsageError

__all__ = [
    "END_OF_DOCUMENT",
    "LARGEST_SHARD",
    "SOURCES_FILE",
    "Index",
    "IndexManifest",
    "Shard",
    "index_manifest",
    "is_index",
    "open_index",
    "shard_files",
]

END_OF_DOCUMENT = b"\xff"
SOURCES_FILE = "sources.json"
LARGEST_SHARD = 2**31 - 1
"""Bytes: places in a shard are int32."""

_KIND = "index"
_PLACE_BYTES, _ROW = 4, ("<i8", 3)
_ROW_BYTES = 24

Places = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexManifest:
    """``flexctl.json`` of an index.

    Attributes:
        name: Whose text it is, a name as experts have it.
        digest: Of the canonical JSON of all other fields.
        documents: How many.
        bytes: Of their text, UTF-8.
        shards: How many.
        files: Every other file -> SHA-256 of its bytes.
    """

    schema_version: int = SCHEMA_VERSION
    kind: str = _KIND
    name: str
    digest: str
    documents: int
    bytes: int
    shards: int
    files: Mapping[str, str]


def shard_files(number: int) -> tuple[str, str, str]:
    """Return the names of a shard's files: text, suffixes, documents."""
    return f"{number:04}.text", f"{number:04}.suffixes", f"{number:04}.documents"


def index_manifest(
    *, name: str, documents: int, num_bytes: int, shards: int, files: Mapping[str, str]
) -> IndexManifest:
    """Return the manifest of an index, with its digest."""
    manifest = IndexManifest(name=name, digest="", documents=documents, bytes=num_bytes, shards=shards, files=files)
    return replace(manifest, digest=digest_of_rest(manifest))


def is_index(path: Path) -> bool:
    """Return whether the manifest in a directory says that it is an index; nothing else of it is believed."""
    try:
        value = parse_json(read_bytes(path / MANIFEST_FILE), str(path / MANIFEST_FILE)) if path.is_dir() else None
    except BundleError:
        return False
    return isinstance(value, dict) and value.get("kind") == _KIND


class Shard:
    """A part of an index, mapped into memory as it is needed.

    Args:
        folder: The index's.
        number: The shard's, from 0.

    Raises:
        BundleError: A file is missing, or its size does not fit the others.
    """

    def __init__(self, folder: Path, number: int) -> None:
        text, suffixes, documents = (folder / name for name in shard_files(number))
        self._where = folder / f"{number:04}"
        size, places, rows = (_size(path) for path in (text, suffixes, documents))
        if not 0 < size <= LARGEST_SHARD or places != size * _PLACE_BYTES:
            raise BundleError(f"{suffixes}: has {places} bytes; expected {_PLACE_BYTES} for each of {text.name}")
        if not rows or rows % _ROW_BYTES:
            raise BundleError(f"{documents}: has {rows} bytes; expected some documents of {_ROW_BYTES} bytes each")
        with text.open("rb") as file:
            self.text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._suffixes = np.memmap(suffixes, dtype="<i4", mode="r")
        self._documents = np.memmap(documents, dtype=_ROW[0], mode="r").reshape(-1, _ROW[1])
        starts = self._documents[:, 0]
        if starts[0] != 0 or starts[-1] >= size or (np.diff(starts) <= 0).any():
            raise BundleError(f"{documents}: documents do not follow one after the other")

    def __len__(self) -> int:
        return len(self._suffixes)

    @property
    def documents(self) -> int:
        """How many documents it has."""
        return len(self._documents)

    @property
    def last_source(self) -> int:
        """The highest number of a file; the numbers are not below 0."""
        sources = self._documents[:, 1]
        return int(sources.max()) if int(sources.min()) >= 0 else LARGEST_SHARD

    def longest(self, wanted: bytes) -> int:
        """Return the length of the longest beginning of ``wanted`` that stands in the text."""
        read = self._reader(len(wanted))
        place = bisect_left(range(len(self)), wanted, key=read)
        beside = (read(k) for k in (place - 1, place) if 0 <= k < len(self))
        return max(_common(wanted, found) for found in beside)

    def interval(self, wanted: bytes) -> tuple[int, int]:
        """Return the suffixes that begin with ``wanted``, from the first to before the last; as many as it occurs."""
        read, everything = self._reader(len(wanted)), range(len(self))
        first = bisect_left(everything, wanted, key=read)
        return first, bisect_right(everything, wanted, lo=first, key=read)

    def places(self, interval: tuple[int, int], most: int) -> list[int]:
        """Return where the suffixes of an interval begin in the text: the first ``most``, in order."""
        found = np.asarray(self._suffixes[slice(*interval)])
        first = np.partition(found, most - 1)[:most] if len(found) > most else found
        return [self._place(int(place)) for place in np.sort(first)]

    def document(self, place: int) -> tuple[int, int, int, int]:
        """Return first byte and end of the document around a byte, its file's number and its own number in it."""
        row = int(np.searchsorted(self._documents[:, 0], place, side="right")) - 1
        start, source, number = map(int, self._documents[row])
        stop = int(self._documents[row + 1, 0]) if row + 1 < self.documents else len(self)
        return start, stop - len(END_OF_DOCUMENT), source, number

    def _reader(self, length: int) -> Any:
        text, suffixes, place = self.text, self._suffixes, self._place

        def read(rank: int) -> bytes:
            start = place(int(suffixes[rank]))
            return text[start : start + length]

        return read

    def _place(self, place: int) -> int:
        if not 0 <= place < len(self):
            raise BundleError(f"{self._where}.suffixes: names byte {place} of a text of {len(self)}")
        return place


@dataclass(frozen=True, kw_only=True, eq=False)
class Index:
    """An opened index.

    Attributes:
        path: Its directory.
        manifest: What it says about itself.
        sources: The files that the text came from, by their number.
        shards: Its parts.
    """

    path: Path
    manifest: IndexManifest
    sources: tuple[str, ...]
    shards: tuple[Shard, ...]

    def count(self, wanted: bytes) -> int:
        """Return how often some bytes stand in the text; no bytes stand in it everywhere."""
        intervals = (shard.interval(wanted) for shard in self.shards)
        return sum(stop - start for start, stop in intervals)


def open_index(path: Path) -> Index:
    """Return the index in a directory; its manifest is checked, and that its files fit each other.

    Raises:
        UsageError: There is no such directory.
        BundleError: It is no index, or not a valid one.
    """
    if not path.is_dir():
        raise UsageError(f"{path}: no such directory", hint="flexctl trace-index makes an index")
    manifest = _read_manifest(path / MANIFEST_FILE)
    expected = {SOURCES_FILE, *(name for number in range(manifest.shards) for name in shard_files(number))}
    if set(manifest.files) != expected:
        raise BundleError(f"{path / MANIFEST_FILE}: files do not fit {manifest.shards} shards")
    sources: tuple[str, ...] = decode(
        tuple[str, ...], parse_json(read_bytes(path / SOURCES_FILE), str(path / SOURCES_FILE)), str(path / SOURCES_FILE)
    )
    shards = tuple(Shard(path, number) for number in range(manifest.shards))
    if any(shard.last_source >= len(sources) for shard in shards):
        raise BundleError(f"{path / SOURCES_FILE}: has {len(sources)} files; documents name others")
    if sum(shard.documents for shard in shards) != manifest.documents:
        raise BundleError(f"{path / MANIFEST_FILE}: documents is {manifest.documents}; the shards have another number")
    return Index(path=path, manifest=manifest, sources=sources, shards=shards)


def _read_manifest(file: Path) -> IndexManifest:
    data = read_bytes(file)
    value = parse_json(data, str(file))
    if not isinstance(value, dict) or value.get("kind") != _KIND:
        raise BundleError(f"{file}: is no index", hint="flexctl trace-index makes one")
    if value.get("schema_version") != SCHEMA_VERSION:
        found = shown(value.get("schema_version"))
        raise BundleError(f"{file}: schema_version is {found}; this flexctl reads {SCHEMA_VERSION}")
    manifest: IndexManifest = decode(IndexManifest, value, str(file))
    check_expert_name(manifest.name, f"{file}: name")
    for name in manifest.files:
        check_file_name(name, f"{file}: files")
    if canonical_json(value) != data:
        raise BundleError(f"{file}: is not canonical JSON (sorted keys, no spaces)")
    if digest_of_rest(manifest) != manifest.digest:
        raise BundleError(f"{file}: digest is {shown(manifest.digest)}, but its content has another")
    if not 0 < manifest.shards <= len(manifest.files):
        raise BundleError(f"{file}: shards is {manifest.shards}; expected some, with three files each")
    return manifest


def _size(path: Path) -> int:
    """Return the size of a file that lies in the index itself: no link leads out of it."""
    try:
        found = path.lstat()
    except OSError as error:
        raise BundleError(f"{path}: is missing") from error
    if not stat.S_ISREG(found.st_mode):
        raise BundleError(f"{path}: is no regular file")
    return found.st_size


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many bytes two texts begin with in common."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(first), len(second)))
