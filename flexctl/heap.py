"""Memory that one step frees and the next one takes: kept in the process instead of given back and asked for again."""

from __future__ import annotations

import ctypes
import os
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
"""glibc's own, the two thresholds where it moves them to when blocks are large."""

_lock = threading.Lock()
_users = 0


@contextmanager
def reusing_memory() -> Iterator[None]:
    """Let what is freed inside the ``with`` statement wait for the next tensor; give it back at the end.

    By itself glibc maps each block of 32 MiB and more anew and gives back what is free at the end of its heap. So a
    pass like the one before gets all its pages again, cleared by the system, which takes 3 to 20 % of the pass
    (docs/benchmarks.md). With another C library, or where the environment sets malloc up, nothing changes.
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
    """Return the C library where it is glibc and its malloc is as it comes."""
    told = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform != "linux" or told:
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None
