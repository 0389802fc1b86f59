"""Two models on the same documents: by how much they differ, how sure that is, and which documents moved."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flexctl.evaluation.bootstrap import difference_interval
from flexctl.evaluation.domains import Content
from flexctl.evaluation.scoring import Score

__all__ = ["Comparison", "DomainComparison", "Moved", "compare"]

SAME = 1e-4
"""Bits per byte: a document that differs by no more has not moved."""
MOVED_SHOWN = 10
_WORDS = 8
_CHARACTERS = 60


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainComparison:
    """One domain for two models; every difference is this model's bits per byte, the other's taken off.

    Attributes:
        bits_per_byte: The other model's.
        difference: Below zero where this model is the better one.
        difference_low: Lower end of the 95 % interval; None for a single document.
        difference_high: Upper end.
        documents_better: On which this model needs fewer bits.
        documents_worse: On which it needs more.
    """

    bits_per_byte: float
    difference: float
    difference_low: float | None
    difference_high: float | None
    documents_better: int
    documents_worse: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Moved:
    """A document on which two models differ.

    Attributes:
        domain: Where it is.
        index: Its place there, from 0.
        words: Its first words.
        difference: In bits per byte.
    """

    domain: str
    index: int
    words: str
    difference: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A model beside another.

    Attributes:
        path: The other bundle; text for one on the Hub.
        digest: Its digest.
        domains: A comparison a domain.
        moved: The documents that differ most, the furthest first.
    """

    path: Path | str
    digest: str
    domains: dict[str, DomainComparison]
    moved: list[Moved]


def compare(
    path: Path | str, digest: str, contents: Sequence[Content], scores: Mapping[str, Score], others: Mapping[str, Score]
) -> Comparison:
    """Return how a model compares with another.

    Args:
        path: The other bundle.
        digest: Its digest.
        contents: The domains.
        scores: This model's, by domain.
        others: The other model's.
    """
    names = [content.domain.name for content in contents]
    differences = {name: _by_document(scores[name]) - _by_document(others[name]) for name in names}
    return Comparison(
        path=path,
        digest=digest,
        domains={name: _domain(scores[name], others[name], differences[name]) for name in names},
        moved=_moved(contents, differences),
    )


def _by_document(score: Score) -> np.ndarray[Any, np.dtype[np.float64]]:
    bits: np.ndarray[Any, np.dtype[np.float64]] = score.per_document[:, 0] / math.log(2) / score.per_document[:, 2]
    return bits


def _domain(score: Score, other: Score, differences: np.ndarray[Any, np.dtype[np.float64]]) -> DomainComparison:
    low, high = difference_interval(score.per_document, other.per_document) or (None, None)
    return DomainComparison(
        bits_per_byte=other.bits_per_byte,
        difference=score.bits_per_byte - other.bits_per_byte,
        difference_low=low,
        difference_high=high,
        documents_better=int((differences < -SAME).sum()),
        documents_worse=int((differences > SAME).sum()),
    )


def _moved(
    contents: Sequence[Content], differences: Mapping[str, np.ndarray[Any, np.dtype[np.float64]]]
) -> list[Moved]:
    """Return the documents that moved most, read anew for their first words."""
    found = []
    for content in contents:
        values = differences[content.domain.name]
        furthest = np.argsort(-np.abs(values), kind="stable")[:MOVED_SHOWN]
        wanted = {int(index) for index in furthest if abs(values[index]) > SAME}
        for index, text in enumerate(content.domain.documents() if wanted else ()):
            if index in wanted:
                words = " ".join(text[:1000].split()[:_WORDS])[:_CHARACTERS]
                difference = float(values[index])
                found.append(Moved(domain=content.domain.name, index=index, words=words, difference=difference))
    return sorted(found, key=lambda moved: -abs(moved.difference))[:MOVED_SHOWN]
