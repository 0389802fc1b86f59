"""Scores of earlier passes, so that an evaluation that is repeated or was interrupted does not score twice.

A file a pass, under a name that stands for everything that decides its figures. Holds numbers and no text. The cache
lies with the user; losing it costs time and nothing else.
"""

from __future__ import annotations

import dataclasses
import hashlib
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from flexctl.bundle.cache import cache_folder
from flexctl.bundle.codec import canonical_json
from flexctl.bundle.store import new_file
from flexctl.evaluation.scoring import Score

__all__ = ["recall", "remember"]

MAX_CACHE_BYTES = 500_000_000
_FIELDS = tuple(field.name for field in dataclasses.fields(Score))


def recall(identity: Mapping[str, Any]) -> Score | None:
    """Return the score that was remembered for ``identity``; None if there is none, or it cannot be read.

    Args:
        identity: Everything that decides the figures, as JSON has it.
    """
    try:
        with _file(identity).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return Score(**{name: arrays[name] for name in _FIELDS})
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
        return None


def remember(identity: Mapping[str, Any], score: Score) -> None:
    """Keep a score; a cache that cannot be written is no error, one that has grown large loses what is oldest."""
    path = _file(identity)
    with suppress(OSError):
        with new_file(path, overwrite=True) as temporary, temporary.open("xb") as output:
            np.savez(output, **{name: getattr(score, name) for name in _FIELDS})
        _shrink(path.parent)


def _file(identity: Mapping[str, Any]) -> Path:
    name = hashlib.sha256(canonical_json(identity)).hexdigest()
    return cache_folder() / "scores" / f"{name}.npz"


def _shrink(folder: Path) -> None:
    files = sorted(folder.glob("*.npz"), key=lambda file: file.stat().st_mtime_ns)
    total = sum(file.stat().st_size for file in files)
    while total > MAX_CACHE_BYTES:
        total -= files[0].stat().st_size
        files.pop(0).unlink()
