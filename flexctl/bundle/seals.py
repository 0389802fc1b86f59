"""Which files have been hashed before, so that ``trust_cache`` need not hash them again.

A line stands for a file by size, mtime, ctime, inode and device, together with the hash that its tensors were found
to have. The cache lies with the user, never in a bundle; losing it costs time and nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from flexctl.bundle.manifest import TensorInfo, digest_of
from flexctl.runtime import cache_folder

__all__ = ["known", "remember", "seal"]

MAX_CACHE_BYTES = 4_000_000


def seal(path: Path, tensors: Mapping[str, TensorInfo]) -> str:
    """Return what stands for "this file, unchanged, has these tensors": bare hex.

    Args:
        path: The file as it is now.
        tensors: By their names in it.
    """
    stat = path.stat()
    file = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    return hashlib.sha256(f"{file} {digest_of(tensors)}".encode()).hexdigest()


def known() -> frozenset[str]:
    """Return the seals of all files that were hashed and found right."""
    try:
        return frozenset(_cache_file().read_text("ascii").split())
    except (OSError, UnicodeDecodeError):
        return frozenset()


def remember(seals: Iterable[str]) -> None:
    """Add seals; a cache that cannot be written is no error, one that has grown large starts afresh."""
    path = _cache_file()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size > MAX_CACHE_BYTES:
            path.unlink()
        # One short append is atomic, so that commands that run at once do not mix their lines.
        with path.open("a", encoding="ascii") as file:
            file.write("".join(f"{line}\n" for line in seals))


def _cache_file() -> Path:
    return cache_folder() / "hashed-files"
