"""Building an index: documents into shards, each sorted in memory, one at a time.

The suffix array is libdivsufsort's, by pydivsufsort: over bytes, so that no tokenizer decides what is found. What was
sorted is kept beside the target until all is done. A run that was killed and started again reads the text anew, which
is quick, and sorts none of the shards whose text is as it was.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from flexctl.bundle.codec import canonical_json, encode, parse_json, read_bytes
from flexctl.bundle.hashing import hash_file
from flexctl.bundle.index import (
    END_OF_DOCUMENT,
    LARGEST_SHARD,
    SOURCES_FILE,
    IndexManifest,
    index_manifest,
    shard_files,
)
from flexctl.bundle.manifest import MANIFEST_FILE
from flexctl.bundle.store import new_directory, own_file
from flexctl.errors import BundleError, UsageError
from flexctl.runtime import Progress
from flexctl.text.documents import Record

__all__ = ["Built", "build_index", "require_divsufsort"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Built:
    """What was built.

    Attributes:
        manifest: Of the index.
        kept: Shards that an earlier run had sorted.
    """

    manifest: IndexManifest
    kept: int


def require_divsufsort() -> None:
    """Refuse where pydivsufsort is not installed.

    Raises:
        UsageError: It is not.
    """
    if find_spec("pydivsufsort") is None:
        raise UsageError("an index needs pydivsufsort, which is not installed", hint="pip install 'flexctl[trace]'")


def build_index(
    target: Path,
    records: Iterable[Record],
    *,
    name: str,
    shard_bytes: int,
    folder: Path,
    overwrite: bool,
    progress: Progress,
) -> Built:
    """Write the index of some documents.

    Args:
        target: The directory to make.
        records: The documents, one at least; memory holds those of one shard.
        name: Whose they are.
        shard_bytes: A shard ends with the document that fills it.
        folder: Where shards are until all are done; those of an earlier run are there.
        overwrite: Whether an index that is there may be replaced.
        progress: Moves on by the bytes of text that are sorted.

    Raises:
        UsageError: A document is too long for a shard, or the target may not be written.
    """
    work = _Work(folder, progress)
    for record in records:
        work.add(record)
        if work.filled >= shard_bytes:
            work.end_shard()
    if work.filled:
        work.end_shard()
    return Built(manifest=work.finish(target, name=name, overwrite=overwrite), kept=work.kept)


@dataclass(kw_only=True, slots=True)
class _Open:
    """The shard that documents are going into."""

    text: bytearray = field(default_factory=bytearray)
    rows: array[int] = field(default_factory=lambda: array("q"))


class _Work:
    """An index on its way: finished shards in a folder, one open in memory."""

    def __init__(self, folder: Path, progress: Progress) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder, self._progress = folder, progress
        self._sources: dict[str, int] = {}
        self._open = _Open()
        self._files: dict[str, str] = {}
        self._documents = self._bytes = self.shards = self.kept = 0

    @property
    def filled(self) -> int:
        """Bytes in the open shard."""
        return len(self._open.text)

    def add(self, record: Record) -> None:
        """Put a document into the open shard; one that no longer fits ends it first."""
        data = record.text.encode()
        if len(data) >= LARGEST_SHARD:
            raise UsageError(
                f"{record.file}: document {record.number} has {len(data)} bytes; a shard holds {LARGEST_SHARD}",
                hint="divide it",
                field="data",
            )
        if self.filled + len(data) >= LARGEST_SHARD:
            self.end_shard()
        source = self._sources.setdefault(record.file, len(self._sources))
        self._open.rows.extend((self.filled, source, record.number))
        self._open.text += data + END_OF_DOCUMENT
        self._documents += 1
        self._bytes += len(data)

    def end_shard(self) -> None:
        """Sort and write the open shard, unless an earlier run has done it, and open the next."""
        names = shard_files(self.shards)
        rows = np.frombuffer(self._open.rows, dtype=np.int64).astype("<i8")
        text = np.frombuffer(self._open.text, dtype=np.uint8)
        identity = hashlib.sha256(text.data)
        identity.update(rows.data)
        hashes = self._earlier(identity.hexdigest(), names)
        if hashes is None:
            hashes = self._sort(text, rows, names)
            with _anew(self._note) as file:
                file.write(canonical_json({"identity": identity.hexdigest(), "files": hashes}))
        else:
            self.kept += 1
        self._progress.advance(len(text))
        self._files |= hashes
        self.shards += 1
        self._open = _Open()

    @property
    def _note(self) -> Path:
        """The file that says of the open shard that it is done, and what it was made of."""
        return self._folder / f"{self.shards:04}.json"

    def _earlier(self, identity: str, names: tuple[str, ...]) -> dict[str, str] | None:
        """Return the hashes of a shard's files as an earlier run wrote them; None where it did not, or they changed."""
        try:
            note = parse_json(read_bytes(self._note), str(self._note))
            if note["identity"] != identity:
                return None
            files = {name: str(note["files"][name]) for name in names}
            return files if all(hash_file(self._folder / name) == sha256 for name, sha256 in files.items()) else None
        except (BundleError, KeyError, TypeError):
            return None

    def _sort(self, text: Array, rows: Array, names: tuple[str, str, str]) -> dict[str, str]:
        from pydivsufsort import divsufsort

        self._note.unlink(missing_ok=True)
        suffixes = divsufsort(text).astype("<i4", copy=False)
        for name, content in zip(names, (text, suffixes, rows), strict=True):
            with _anew(self._folder / name) as file:
                file.write(content)
        del suffixes
        return {name: hash_file(self._folder / name) for name in names}

    def finish(self, target: Path, *, name: str, overwrite: bool) -> IndexManifest:
        """Write the rest, and move everything into the target."""
        with _anew(self._folder / SOURCES_FILE) as file:
            file.write(canonical_json(list(self._sources)))
        files = {**self._files, SOURCES_FILE: hash_file(self._folder / SOURCES_FILE)}
        manifest = index_manifest(
            name=name, documents=self._documents, num_bytes=self._bytes, shards=self.shards, files=files
        )
        with new_directory(target, kind=manifest.kind, overwrite=overwrite) as temporary:
            temporary.chmod(0o700)
            for item in files:
                os.rename(self._folder / item, temporary / item)
            with own_file(temporary / MANIFEST_FILE) as file:
                file.write(canonical_json(encode(manifest)))
        return manifest


def _anew(path: Path) -> BinaryIO:
    """Return a file of the owner's alone to write, in place of one that an earlier run may have left."""
    path.unlink(missing_ok=True)
    return own_file(path)
