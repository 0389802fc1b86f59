"""Test text, and which documents share words with it: those are left out of training, so that scores stay honest.

A document shares words with test text where RUN neighbouring words of the one stand in the other, case and punctuation
aside: the 13-grams of GPT-3's report (Brown and others, 2020, appendix C). Each document is judged by itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flexctl.errors import UsageError
from flexctl.text.documents import read_documents, text_files
from flexctl.text.words import word_runs

__all__ = ["Decontamination"]

RUN = 13


@dataclass(frozen=True, slots=True)
class Decontamination:
    """What must not be trained on.

    Attributes:
        runs: Hashes of all runs of RUN words in test text, some 70 bytes of memory for each; none where there is no
            test text.
    """

    runs: frozenset[int] = frozenset()

    @classmethod
    def read(cls, paths: Sequence[Path], text_field: str) -> Decontamination:
        """Return what is in some files.

        Raises:
            UsageError: A path does not exist, a file cannot be read, or no document in it has RUN words.
        """
        if not paths:
            return cls()
        text_files(paths, "decontaminate")
        runs = frozenset(run for text in read_documents(paths, text_field) for run in word_runs(text, RUN))
        if not runs:
            raise UsageError(
                f"no document in {', '.join(map(str, paths))} has {RUN} words, so nothing would be found",
                hint="give longer test text, or leave it out",
                field="decontaminate",
            )
        return cls(runs)

    def __bool__(self) -> bool:
        """Whether there is test text."""
        return bool(self.runs)

    @property
    def digest(self) -> str | None:
        """sha256 of what decides which documents are left out, in hex; None where there is no test text."""
        if not self.runs:
            return None
        return hashlib.sha256(np.sort(np.fromiter(self.runs, "<u8", len(self.runs))).tobytes()).hexdigest()

    def shares(self, text: str) -> bool:
        """Return whether a document has RUN neighbouring words of test text."""
        return bool(self.runs) and not self.runs.isdisjoint(word_runs(text, RUN))

    def kept(self, documents: Iterable[str]) -> Iterator[str]:
        """Yield the documents that do not."""
        return (text for text in documents if not self.shares(text))
