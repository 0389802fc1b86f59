"""Figures that took long to compute, kept with the user so that nobody waits for them twice.

A file an entry, under a name that stands for everything that decides its figures. Holds numbers and no text; losing it
costs time and nothing else.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from flexctl.bundle.codec import canonical_json
from flexctl.bundle.store import new_file
from flexctl.runtime import cache_folder

__all__ = ["Arrays", "recall", "remember"]

MAX_CACHE_BYTES = 500_000_000
"""Of one kind."""

Arrays = dict[str, Any]
"""Name -> numpy array."""


def recall(kind: str, identity: Mapping[str, Any]) -> Arrays | None:
    """Return the arrays that were remembered for ``identity``; None if there are none, or they cannot be read.

    Args:
        kind: What they are, a folder's name.
        identity: Everything that decides the figures, as JSON has it.
    """
    try:
        with _file(kind, identity).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
        return None


def remember(kind: str, identity: Mapping[str, Any], arrays: Arrays) -> None:
    """Keep arrays; a cache that cannot be written is no error, one that has grown large loses what is oldest."""
    path = _file(kind, identity)
    with suppress(OSError):
        with new_file(path, overwrite=True) as temporary, temporary.open("xb") as output:
            np.savez(output, **arrays)
        _shrink(path.parent)


def _file(kind: str, identity: Mapping[str, Any]) -> Path:
    name = hashlib.sha256(canonical_json(identity)).hexdigest()
    return cache_folder() / kind / f"{name}.npz"


def _shrink(folder: Path) -> None:
    files = sorted(folder.glob("*.npz"), key=lambda file: file.stat().st_mtime_ns)
    total = sum(file.stat().st_size for file in files)
    while total > MAX_CACHE_BYTES:
        total -= files[0].stat().st_size
        files.pop(0).unlink()
