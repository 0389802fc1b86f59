"""Memory that one step frees and the next one takes: kept in the process instead of given back and asked for again."""

from __future__ import annotations

import ctypes
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["reusing_memory"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
"""What glibc's malloc.h calls M_TRIM_THRESHOLD, M_MMAP_THRESHOLD and M_MMAP_MAX."""

_KEEPING = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1}
"""Nothing is mapped by itself, nothing given back."""

_USUAL = {_MMAP_MAX: 65536, _MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20}
"""glibc's own, the thresholds where it moves them to when blocks are large; once set, it no longer moves them."""

_SETS = re.compile(r"(MALLOC_|glibc\.malloc\.)(mmap_max|mmap_threshold|trim_threshold|top_pad)(_|\b)", re.IGNORECASE)
"""What in the environment sets them: a variable's name, or a part of GLIBC_TUNABLES."""

_lock = threading.Lock()
_users = 0


@contextmanager
def reusing_memory() -> Iterator[None]:
    """Let what is freed inside the ``with`` statement wait for the next tensor; at the end what is free goes back.

    By itself glibc maps each block of 32 MiB and more anew and gives back what is free at the end of its heap. So a
    pass like the one before gets all its pages again, cleared by the system, which takes 1 to 12 % of a training step
    (docs/benchmarks.md). What was made inside and outlives it goes back when glibc sees fit. With another C library, or
    where the environment sets malloc's thresholds, nothing changes. Not for generators, which end the statement as soon
    as they are made where this decorates them.
    """
    malloc = _glibc()
    if malloc is None:
        yield
        return
    _enter(malloc)
    try:
        yield
    finally:
        _leave(malloc)


def _enter(malloc: ctypes.CDLL) -> None:
    global _users
    with _lock:
        _users += 1
        if _users == 1:
            _set(malloc, _KEEPING)


def _leave(malloc: ctypes.CDLL) -> None:
    global _users
    with _lock:
        _users -= 1
        if not _users:
            _set(malloc, _USUAL)
            malloc.malloc_trim(0)


def _set(malloc: ctypes.CDLL, values: dict[int, int]) -> None:
    for name, value in values.items():
        malloc.mallopt(name, value)


def _glibc() -> ctypes.CDLL | None:
    """Return the C library where it is glibc and nobody else sets what we would set."""
    told = [name for name in os.environ if _SETS.fullmatch(name)] or _SETS.search(os.environ.get("GLIBC_TUNABLES", ""))
    if sys.platform != "linux" or told:
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None
