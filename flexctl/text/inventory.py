"""The first pass over text: what is in it, and what of it is left out."""

from __future__ import annotations

import hashlib
import time
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flexctl.errors import UsageError
from flexctl.runtime import Progress, Reporter
from flexctl.text.decontamination import RUN, Decontamination
from flexctl.text.documents import Record, read_documents, read_records, size_bytes
from flexctl.text.near_duplicates import NearDuplicates

__all__ = ["COUNTS", "Inventory", "Pace", "Ranks", "Stocktaking", "rank_of", "take_inventory", "text_digest"]

COUNTS = ("duplicates", "near_duplicates", "contaminated")
"""What is counted of documents, by the names that it has in an inventory, in results and in run.json."""

_PLACES = 3
_NOTHING = Decontamination()
_BYTES_A_SIGN = 1 << 18


class Ranks:
    """Some texts, by their ranks, in 8 bytes each.

    Args:
        ranks: In any order.
    """

    def __init__(self, ranks: Iterable[int] = ()) -> None:
        self._sorted = array("Q", sorted(set(ranks)))

    def __contains__(self, rank: int) -> bool:
        place = bisect_left(self._sorted, rank)
        return place < len(self._sorted) and self._sorted[place] == rank

    def __len__(self) -> int:
        return len(self._sorted)


def rank_of(text: str, seed: int) -> int:
    """Return a seeded hash of a text, of 64 bits."""
    hasher = hashlib.sha256(f"{seed}\0".encode())
    hasher.update(text.encode())
    return int.from_bytes(hasher.digest()[:8], "big")


class Pace:
    """Tells a progress of documents, and how fast they come.

    Args:
        bar: Hears of it every few documents.
    """

    def __init__(self, bar: Progress) -> None:
        self._bar, self._start_s = bar, time.monotonic()
        self._bytes = self._told = self._documents = 0

    def add(self, num_bytes: int) -> None:
        """Count a document."""
        self._documents += 1
        self._bytes += num_bytes
        if self._bytes - self._told >= _BYTES_A_SIGN:
            pace = self._bytes / 1e6 / max(time.monotonic() - self._start_s, 1e-9)
            self._bar.advance(self._bytes - self._told, documents=f"{self._documents:,}", MB_per_s=pace)
            self._told = self._bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Inventory:
    """What the first pass over text finds.

    Attributes:
        digest: sha256 of all documents in order, in hex.
        seed: Of the ranks.
        ranks: Of all documents that are kept, in order of size, (documents,), 8 bytes each.
        num_bytes: Their UTF-8 bytes.
        duplicates: Kept documents whose text had come before.
        near_duplicates: Other kept documents that are nearly the same as one before; None where nobody counted.
        contaminated: Documents that share words with test text; None where there is none.
        left_out: Ranks of those.
    """

    digest: str
    seed: int
    ranks: array[int]
    num_bytes: int
    duplicates: int
    near_duplicates: int | None
    contaminated: int | None
    left_out: Ranks

    def kept(self, documents: Iterable[str]) -> Iterator[str]:
        """Yield the documents that are not left out."""
        return (text for text in documents if not self.left_out or rank_of(text, self.seed) not in self.left_out)


class Stocktaking:
    """Takes the inventory of some text while it is read.

    Args:
        paths: The text.
        text_field: The column or field that holds it.
        seed: Of the ranks.
        decontamination: Test text; documents that share words with it are left out, and told by their places.
        near_duplicates: Counts documents that are nearly the same as one before; None for no such count.
        reporter: Hears of progress.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        text_field: str,
        seed: int,
        *,
        decontamination: Decontamination = _NOTHING,
        near_duplicates: NearDuplicates | None = None,
        reporter: Reporter,
    ) -> None:
        self._paths, self._text_field, self._seed, self._reporter = paths, text_field, seed, reporter
        self._decontamination, self._near = decontamination, near_duplicates
        self._digest = hashlib.sha256()
        self._ranks, self._left_out = array("Q"), array("Q")
        self._bytes = 0
        self._places: list[str] = []
        self.is_done = False

    def documents(self) -> Iterator[str]:
        """Yield the documents that are kept; the inventory is of those that were read.

        Raises:
            UsageError: A file cannot be read.
        """
        with self._reporter.progress("reading", size_bytes(self._paths), "bytes") as bar:
            pace = Pace(bar)
            for record in read_records(self._paths, self._text_field):
                raw = record.text.encode()
                pace.add(len(raw))
                _update(self._digest, raw)
                if self._is_kept(record):
                    self._bytes += len(raw)
                    yield record.text
        self.is_done = True

    def _is_kept(self, record: Record) -> bool:
        rank = rank_of(record.text, self._seed)
        if self._decontamination.shares(record.text):
            self._left_out.append(rank)
            if len(self._places) < _PLACES:
                self._places.append(f"{record.file}, document {record.number}")
            return False
        self._ranks.append(rank)
        if self._near is not None:
            self._near.add(record.text)
        return True

    def inventory(self) -> Inventory:
        """Return the inventory, and say what is left out and what comes more than once.

        Raises:
            UsageError: No document is left.
        """
        self._tell_left_out()
        if not self._ranks:
            raise UsageError(
                f"no document that does not share {RUN} words in a row with `decontaminate` in "
                + ", ".join(map(str, self._paths)),
                field="data",
            )
        ranks = np.frombuffer(self._ranks, dtype=np.uint64)
        ranks.sort()
        duplicates = int(np.count_nonzero(ranks[1:] == ranks[:-1]))
        found = Inventory(
            digest=self._digest.hexdigest(),
            seed=self._seed,
            ranks=self._ranks,
            num_bytes=self._bytes,
            duplicates=duplicates,
            near_duplicates=None if self._near is None else self._near.count() - duplicates,
            contaminated=len(self._left_out) if self._decontamination else None,
            left_out=Ranks(self._left_out),
        )
        self._tell_copies(found)
        return found

    def _tell_left_out(self) -> None:
        if not self._left_out:
            return
        count = len(self._left_out)
        self._reporter.note(
            f"{count} of {count + len(self._ranks)} documents share {RUN} words in a row with `decontaminate` and are "
            f"left out: {'; '.join(self._places)}{'; ...' if count > len(self._places) else ''}"
        )

    def _tell_copies(self, found: Inventory) -> None:
        of = f"of {len(found.ranks)} documents are"
        if found.duplicates:
            self._reporter.note(f"{found.duplicates} {of} copies of others; copies are held out together")
        if found.near_duplicates is not None:
            self._reporter.note(f"{found.near_duplicates} {of} nearly the same as one before, copies aside")


def take_inventory(stocktaking: Stocktaking) -> Inventory:
    """Return the inventory, after reading all there is unless somebody has done so.

    Raises:
        UsageError: No document is left, or a file cannot be read.
    """
    if not stocktaking.is_done:
        for _ in stocktaking.documents():
            pass
    return stocktaking.inventory()


def text_digest(paths: Sequence[Path], text_field: str) -> str:
    """Return the digest that an ``Inventory`` has of the same text, after one pass over it."""
    digest = hashlib.sha256()
    for text in read_documents(paths, text_field):
        _update(digest, text.encode())
    return digest.hexdigest()


def _update(digest: Any, raw: bytes) -> None:
    """Let a digest of documents have the next one, so that it tells where each ends."""
    digest.update(len(raw).to_bytes(8, "big"))
    digest.update(raw)
