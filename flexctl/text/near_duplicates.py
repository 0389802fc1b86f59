"""How many documents are nearly the same as one before: by MinHash over runs of five words, in bands.

Two documents count as nearly the same where one of 14 bands of 8 minima agrees. Of pairs that share a part s of their
runs that finds 1 - (1 - s^8)^14: 92 in 100 at s = 0.8, 56 at 0.7, 5 at 0.5. Bands and rows are datatrove's.

Bands lie in a file, 112 bytes a document, and are counted one after the other, in some 40 bytes of memory a document.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from xxhash import xxh3_64_intdigest

from flexctl.errors import UsageError
from flexctl.text.words import word_runs

__all__ = ["NearDuplicates", "require_datasketch"]

_RUN = 5
_BANDS, _ROWS = 14, 8
_AT_ONCE = 1 << 12
_BLOCK = 1 << 16


def require_datasketch() -> None:
    """Refuse where datasketch is not installed.

    Raises:
        UsageError: It is not.
    """
    if find_spec("datasketch") is None:
        raise UsageError(
            "counting them needs datasketch, which is not installed",
            hint="pip install 'flexctl[dedup]'",
            field="near_duplicates",
        )


class NearDuplicates:
    """Counts documents that are nearly the same as one before.

    Args:
        file: Where their bands are kept, open for reading and writing, and empty.
    """

    def __init__(self, file: BinaryIO) -> None:
        from datasketch import MinHash

        self._file, self._documents = file, 0
        self._empty = MinHash(num_perm=_BANDS * _ROWS, hashfunc=_low)

    @classmethod
    @contextmanager
    def within(cls, folder: Path) -> Iterator[NearDuplicates]:
        """Give a counter whose file lies in a folder while the block runs."""
        path = folder / "bands"
        try:
            with path.open("w+b") as file:
                yield cls(file)
        finally:
            path.unlink(missing_ok=True)

    def add(self, text: str) -> None:
        """Take in the next document."""
        found = self._empty.copy()
        runs = word_runs(text, _RUN)
        while some := list(islice(runs, _AT_ONCE)):
            found.update_batch(some)
        if found.is_empty():  # it has fewer words; only the very same counts
            found.update_batch([xxh3_64_intdigest(text.encode())])
        bands = found.hashvalues.reshape(_BANDS, _ROWS)
        self._file.write(np.array([xxh3_64_intdigest(band.tobytes()) for band in bands], np.uint64).tobytes())
        self._documents += 1

    def count(self) -> int:
        """Return how many documents are nearly, or quite, the same as one before."""
        repeats = np.zeros(self._documents, dtype=bool)
        for band in range(_BANDS):
            _, first = np.unique(self._column(band), return_index=True)
            is_new = np.zeros(self._documents, dtype=bool)
            is_new[first] = True
            repeats |= ~is_new
        return int(repeats.sum())

    def _column(self, band: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
        found = np.empty(self._documents, dtype=np.uint64)
        self._file.seek(0)
        for start in range(0, self._documents, _BLOCK):
            block = np.frombuffer(self._file.read(8 * _BANDS * _BLOCK), dtype=np.uint64).reshape(-1, _BANDS)
            found[start : start + len(block)] = block[:, band]
        return found


def _low(run: int) -> int:
    return run & 0xFFFFFFFF
