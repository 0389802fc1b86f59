"""Putting one file of a merged model in its place: linked or copied, and proven.

Every byte is hashed once, in the target: that proves source and copy together. A low-rank expert is expanded on the
way, from the public expert's file that has just been proven.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from flexctl.bundle.composition import LowRank
from flexctl.bundle.hashing import Advance, StoredTensor, hash_spans, silent
from flexctl.bundle.headers import read_header
from flexctl.bundle.lowrank import expand_bytes
from flexctl.bundle.manifest import TensorInfo
from flexctl.bundle.seals import seal
from flexctl.bundle.store import append_range
from flexctl.bundle.tensors import ITEM_SIZES, Span, size_of
from flexctl.errors import BundleError

__all__ = ["Placed", "Site", "WeightFile", "place"]


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightFile:
    """One file to write: its name, its head, and where the tensors come from, by key, in order."""

    name: str
    head: bytes
    tensors: Mapping[str, StoredTensor | LowRank]

    @property
    def size(self) -> int:
        """Bytes of its tensors."""
        return sum(map(_size, self.tensors.values()))


@dataclass(frozen=True, kw_only=True, slots=True)
class Placed:
    """One file in its place: its tensors as they were found there, and what stands for it and its source."""

    name: str
    tensors: Mapping[str, TensorInfo]
    linked: bool
    source_seal: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """Where a merged model is being built.

    Attributes:
        folder: The temporary sibling.
        old: What it will replace, if that exists.
        trusted: Seals of files that need no hashing.
        advance: Told the bytes done.
    """

    folder: Path
    old: Path
    trusted: frozenset[str]
    advance: Advance


def place(file: WeightFile, site: Site, public: Mapping[str, Span]) -> Placed:
    """Put one file in its place and prove it.

    Args:
        file: What to write.
        site: Where.
        public: Expert tensor name -> the public expert's, in the file that was proven before.
    """
    target = site.folder / file.name
    source_seal = _source_seal(file)
    linked = _link(file, site.old / file.name, target)
    if not linked:
        _write(file, target, public)
    if source_seal is not None and source_seal in site.trusted:
        tensors = {key: source.info for key, source in file.tensors.items() if isinstance(source, StoredTensor)}
        site.advance(file.size)
    else:
        spans = read_header(target).tensors
        tensors = _prove(target, spans, file.tensors, site.advance)
    return Placed(name=file.name, tensors=tensors, linked=linked, source_seal=source_seal)


def _link(file: WeightFile, old: Path, target: Path) -> bool:
    """Link a file of the model that will be replaced, if it has these very bytes and no other name."""
    if not old.is_file() or any(
        isinstance(source, LowRank) or Path(os.path.realpath(source.span.path)) != old
        for source in file.tensors.values()
    ):
        return False
    status = old.lstat()
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1 or read_header(old).head != file.head:
        return False
    try:
        os.link(old, target)
    except OSError:
        return False  # a file system without hard links: copy
    return True


def _write(file: WeightFile, target: Path, public: Mapping[str, Span]) -> None:
    with target.open("xb") as output:
        output.write(file.head)
        for source in _joined(file.tensors.values()):
            if isinstance(source, LowRank):
                for part in (source.a, source.b):
                    _prove(part.span.path, {part.name: part.span}, {part.name: part}, silent)
                for block in expand_bytes(public[source.name], source.a.span, source.b.span):
                    output.write(block.data)
                continue
            append_range(source.path, source.start, output, source.stop - source.start)


def _joined(sources: Iterable[StoredTensor | LowRank]) -> Iterator[Span | LowRank]:
    """Yield spans of one file that follow each other as one, so that the kernel copies them in one go."""
    pending: Span | None = None
    for source in sources:
        span = source.span if isinstance(source, StoredTensor) else None
        if pending and span and pending.path == span.path and pending.stop == span.start:
            pending = replace(pending, stop=span.stop)
            continue
        if pending:
            yield pending
        pending = span
        if isinstance(source, LowRank):
            yield source
    if pending:
        yield pending


def _prove(
    path: Path, spans: Mapping[str, Span], sources: Mapping[str, StoredTensor | LowRank], advance: Advance
) -> dict[str, TensorInfo]:
    """Return what the tensors of a file are, after comparing them with what their sources promise.

    Raises:
        BundleError: One is something else, or not finite; the message names the source.
    """
    found = {}
    for name, info, finite in hash_spans(path, spans, advance):
        source = sources[name]
        piece = source if isinstance(source, StoredTensor) else source.b
        where = f"{piece.span.path}: tensor {piece.name}"
        if isinstance(source, StoredTensor) and info != source.info:
            raise BundleError(f"{where}: its bytes are not those of the manifest", hint="fetch the file again")
        if not finite:
            problem = (
                "holds NaN or infinity" if isinstance(source, StoredTensor) else f"expanded, overflows {info.dtype}"
            )
            raise BundleError(f"{where}: {problem}", hint="the owner must train it again")
        found[name] = info
    return found


def _source_seal(file: WeightFile) -> str | None:
    """Return the seal of the one file that everything is copied from; None if it is several, or expanded."""
    pieces = [source for source in file.tensors.values() if isinstance(source, StoredTensor)]
    paths = {piece.span.path for piece in pieces}
    if len(pieces) < len(file.tensors) or len(paths) != 1:
        return None
    return seal(paths.pop(), {piece.name: piece.info for piece in pieces})


def _size(source: StoredTensor | LowRank) -> int:
    if isinstance(source, StoredTensor):
        return size_of(source.info)
    return ITEM_SIZES[source.a.info.dtype] * source.b.info.shape[0] * source.a.info.shape[1]
