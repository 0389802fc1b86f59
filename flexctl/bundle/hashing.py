"""SHA-256 of tensors and files in constant memory, with the check for NaN and infinity in the same pass.

Files are read through one small buffer a thread: memory-mapped pages would count as the process's own. Threads share
pieces and not files, so that all cores have work to the end, whatever sizes files have.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from flexctl.bundle.manifest import TensorInfo
from flexctl.bundle.tensors import RawTensor, Span, is_finite
from flexctl.errors import BundleError

__all__ = [
    "Advance",
    "Reach",
    "StoredTensor",
    "by_file",
    "check_tensors",
    "hash_file",
    "hash_raw",
    "hash_spans",
    "hash_weights",
    "in_parallel",
    "locked",
    "pieces",
    "silent",
]

BUFFER_BYTES = 1 << 20
PIECE_BYTES = 1 << 26
# Beyond it the disk is what is waited for; and each has a buffer.
MOST_THREADS = 16
Advance = Callable[[int], None]
Reach = Callable[[int], None]
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of some bundle or checkpoint.

    Attributes:
        name: Its name in the file that it lies in.
        span: Where it lies.
        info: What its bytes are promised to be, by a manifest or by whoever hashed them.
    """

    name: str
    span: Span
    info: TensorInfo


def silent(count: int) -> None:
    """Take note of ``count`` bytes done, and tell nobody."""
    del count


def locked(advance: Advance) -> Advance:
    """Return an ``advance`` that several threads may call at once."""
    lock = threading.Lock()

    def counted(count: int) -> None:
        with lock:
            advance(count)

    return counted


def in_parallel(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Return ``function`` of each item, in order, several at a time; hashing and copying let other threads run.

    Raises:
        FlexctlError: The first one that an item raised; what had not begun then never does.
    """
    pool = ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1))
    try:
        return list(pool.map(function, items))
    finally:
        pool.shutdown(cancel_futures=True)


def pieces(spans: Mapping[str, Span]) -> Iterator[dict[str, Span]]:
    """Yield a file's tensors in runs of about 64 MiB, at least one tensor each, for threads to share."""
    piece: dict[str, Span] = {}
    size = 0
    for name, span in spans.items():
        piece[name] = span
        size += span.stop - span.start
        if size >= PIECE_BYTES:
            yield piece
            piece, size = {}, 0
    if piece:
        yield piece


def hash_file(path: Path, stop: int | None = None) -> str:
    """Return the bare hex SHA-256 of a file, or of its first ``stop`` bytes.

    Raises:
        BundleError: It is missing or cannot be read.
    """
    hasher = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file:
            while block := file.read(BUFFER_BYTES if stop is None else min(BUFFER_BYTES, stop - file.tell())):
                hasher.update(block)
    except FileNotFoundError as error:
        raise BundleError(f"{path}: is missing") from error
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror})") from error
    return hasher.hexdigest()


def hash_raw(tensor: RawTensor) -> TensorInfo:
    """Return dtype, shape and SHA-256 of a tensor in memory."""
    return TensorInfo(tensor.dtype, tensor.shape, hashlib.sha256(tensor.view()).hexdigest())


def hash_spans(
    path: Path, spans: Mapping[str, Span], advance: Advance = silent, reach: Reach = silent
) -> Iterator[tuple[str, TensorInfo, bool]]:
    """Yield (name, what its bytes are, whether all are finite) for tensors of one file.

    Args:
        path: The file that all spans lie in.
        spans: By name; read in the order given.
        advance: Told the bytes done, tensor by tensor; must bear several threads.
        reach: Asked, before it is read, for everything up to a byte of the file, as it may not be written yet.

    Raises:
        BundleError: The file ends early, or cannot be read.
    """
    buffer = memoryview(bytearray(BUFFER_BYTES))
    try:
        with path.open("rb", buffering=0) as file:
            for name, span in spans.items():
                hasher = hashlib.sha256()
                finite = True
                for block in _blocks(file, span, buffer, reach):
                    hasher.update(block)
                    finite = finite and is_finite(span.dtype, block)
                yield name, TensorInfo(span.dtype, span.shape, hasher.hexdigest()), finite
                advance(span.stop - span.start)
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror})") from error


def hash_weights(spans: Mapping[str, Span], advance: Advance = silent) -> dict[str, TensorInfo]:
    """Return what the tensors of several files are, by name, several pieces at a time.

    Args:
        spans: By name.
        advance: Told the bytes done.

    Raises:
        BundleError: One holds NaN or infinity, or a file ends early.
    """
    counted = locked(advance)

    def hashed(item: tuple[Path, Mapping[str, Span]]) -> dict[str, TensorInfo]:
        path, piece = item
        found = {}
        for name, info, finite in hash_spans(path, piece, counted):
            if not finite:
                raise BundleError(f"{path}: tensor {name}: holds NaN or infinity")
            found[name] = info
        return found

    inside = by_file(spans)
    work = [(path, piece) for path in sorted(inside) for piece in pieces(inside[path])]
    return dict(sorted((name, info) for found in in_parallel(hashed, work) for name, info in found.items()))


def by_file(spans: Mapping[str, Span]) -> dict[Path, dict[str, Span]]:
    """Return {file: what of ``spans`` lies in it}."""
    files: dict[Path, dict[str, Span]] = {}
    for name, span in spans.items():
        files.setdefault(span.path, {})[name] = span
    return files


def check_tensors(
    path: Path, spans: Mapping[str, Span], expected: Mapping[str, TensorInfo], advance: Advance = silent
) -> Iterable[str]:
    """Yield one sentence for each tensor of a file whose bytes are not those that a manifest promises.

    Args:
        path: The file.
        spans: Where its tensors lie, by name.
        expected: What they must be, by the same names.
        advance: As for ``hash_spans``.
    """
    for name, found, finite in hash_spans(path, spans, advance):
        if found != expected[name]:
            yield f"{path}: tensor {name}: its bytes are not those of the manifest (sha256 {found.sha256[:16]}...)"
        elif not finite:
            yield f"{path}: tensor {name}: holds NaN or infinity"


def _blocks(file: BinaryIO, span: Span, buffer: memoryview, reach: Reach) -> Iterator[memoryview]:
    """Yield a tensor's bytes, a whole number of elements at a time."""
    file.seek(span.start)
    left = span.stop - span.start
    while left:
        wanted = min(left, len(buffer))
        reach(span.stop - left + wanted)
        filled = 0
        while filled < wanted:
            count = file.readinto(buffer[filled:wanted])  # type: ignore[attr-defined]
            if not count:
                raise BundleError(f"{span.path}: is truncated: it ends before byte {span.stop}")
            filled += count
        yield buffer[:wanted]
        left -= wanted
