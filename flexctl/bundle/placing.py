"""Putting files of a merged model in their places: linked, sharing blocks, or copied, and proven.

Every byte is hashed once, in the target: that proves source and copy together. Files are handled in pieces, so that
all cores have work whatever the files' sizes, and a piece is hashed as it is copied, while its bytes are at hand. A
low-rank expert is expanded on the way, from the public expert's file that has just been proven.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from flexctl.bundle.composition import LowRank
from flexctl.bundle.copying import clone_range, copy_steps, start_writing
from flexctl.bundle.hashing import Advance, Reach, StoredTensor, hash_spans, in_parallel, pieces, silent
from flexctl.bundle.headers import read_header
from flexctl.bundle.lowrank import expand_bytes
from flexctl.bundle.manifest import TensorInfo
from flexctl.bundle.seals import seal
from flexctl.bundle.tensors import ITEM_SIZES, Bytes, Span, size_of
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
    """One file in its place: its tensors as they were found there, and what stands for it and its source.

    Attributes:
        name: The file's.
        tensors: By key.
        spared: How many of its bytes were not written, as they were linked or share blocks with the source.
        source_seal: Of the one file that everything came from, if it was one.
    """

    name: str
    tensors: Mapping[str, TensorInfo]
    spared: int
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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Begun:
    """A file that has its size and its head; ``there`` is up to which byte the rest is in it, too."""

    file: WeightFile
    path: Path
    spans: Mapping[str, Span]
    there: int
    spared: int
    source_seal: str | None


def place(files: Sequence[WeightFile], site: Site, public: Mapping[str, Span]) -> list[Placed]:
    """Put files in their places and prove them, several pieces at a time.

    Args:
        files: What to write.
        site: Where.
        public: Expert tensor name -> the public expert's, in a file that was proven before.
    """
    begun = [_begin(file, site) for file in files]
    runs = [(file, list(pieces(file.spans))) for file in begun]
    # A piece of every file in turn: two threads that write to one file wait for each other.
    turns = range(max((len(run) for _, run in runs), default=0))
    work = [(file, run[turn]) for turn in turns for file, run in runs if turn < len(run)]
    found = in_parallel(lambda item: _place_piece(*item, site, public), work)
    tensors: dict[str, dict[str, TensorInfo]] = {file.name: {} for file in files}
    for (file, _), infos in zip(work, found, strict=True):
        tensors[file.path.name] |= infos
    return [
        Placed(name=file.path.name, tensors=tensors[file.path.name], spared=file.spared, source_seal=file.source_seal)
        for file in begun
    ]


def _begin(file: WeightFile, site: Site) -> _Begun:
    """Link a file, or make it with its head and whatever can share blocks with its source."""
    target = site.folder / file.name
    source_seal = _source_seal(file)
    if _link(file, site.old / file.name, target):
        there = spared = len(file.head) + file.size
    else:
        spared = _make(file, target)
        there = len(file.head) + spared
    return _Begun(
        file=file,
        path=target,
        spans=read_header(target).tensors,
        there=there,
        spared=spared,
        source_seal=source_seal,
    )


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


def _make(file: WeightFile, target: Path) -> int:
    """Write a file's head, and return how many bytes behind it share blocks with the source already."""
    with target.open("xb") as output:
        output.write(file.head)
        output.truncate(len(file.head) + file.size)
        source = _one_run(file)
        if source is None:
            return 0
        return clone_range(source.path, source.start, output.fileno(), len(file.head), source.stop - source.start)


def _one_run(file: WeightFile) -> Span | None:
    """Return where all of a file's tensors lie one after the other; None if they do not."""
    spans = [source.span for source in file.tensors.values() if isinstance(source, StoredTensor)]
    follow = all(one.path == other.path and one.stop == other.start for one, other in pairwise(spans))
    if not spans or not follow or len(spans) < len(file.tensors):
        return None
    return replace(spans[0], stop=spans[-1].stop)


def _place_piece(
    begun: _Begun, piece: Mapping[str, Span], site: Site, public: Mapping[str, Span]
) -> dict[str, TensorInfo]:
    """Write what is not there yet of a few tensors, prove them, and return what they are."""
    sources = {name: begun.file.tensors[name] for name in piece}
    there, written = begun.there, _written(begun, piece, public)

    def reach(stop: int) -> None:
        nonlocal there
        while there < stop:
            there = next(written)

    if begun.source_seal is not None and begun.source_seal in site.trusted:
        found = {name: source.info for name, source in sources.items() if isinstance(source, StoredTensor)}
        site.advance(sum(map(size_of, piece.values())))
    else:
        found = _prove(begun.path, piece, sources, site.advance, reach)
    for _ in written:
        pass
    return found


def _written(begun: _Begun, piece: Mapping[str, Span], public: Mapping[str, Span]) -> Iterator[int]:
    """Write what is not there yet of a few tensors; yield up to which byte of the file that is done."""
    spans = list(piece.values())
    first, stop = spans[0].start, spans[-1].stop
    if begun.there >= stop:
        return
    with begun.path.open("r+b") as output:
        for name, span in piece.items():
            source = begun.file.tensors[name]
            if isinstance(source, LowRank):
                output.seek(span.start)
                for block in _expanded(source, public):
                    output.write(block.data)
                    output.flush()
                    yield output.tell()
                continue
            done = min(max(begun.there - span.start, 0), size_of(span))
            start = source.span.start + done
            for count in copy_steps(
                source.span.path, start, output.fileno(), span.start + done, source.span.stop - start
            ):
                yield span.start + done + count
        start_writing(output.fileno(), first, stop - first)


def _expanded(source: LowRank, public: Mapping[str, Span]) -> Iterator[Bytes]:
    for part in (source.a, source.b):
        _prove(part.span.path, {part.name: part.span}, {part.name: part}, silent)
    return expand_bytes(public[source.name], source.a.span, source.b.span)


def _prove(
    path: Path,
    spans: Mapping[str, Span],
    sources: Mapping[str, StoredTensor | LowRank],
    advance: Advance,
    reach: Reach = silent,
) -> dict[str, TensorInfo]:
    """Return what the tensors of a file are, after comparing them with what their sources promise.

    Raises:
        BundleError: One is something else, or not finite; the message names the source.
    """
    found = {}
    for name, info, finite in hash_spans(path, spans, advance, reach):
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
