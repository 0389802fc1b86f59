"""Two models on the same documents: by how much they differ, how sure that is, and which documents moved."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flexctl.evaluation.bootstrap import Resampled
from flexctl.evaluation.domains import Content
from flexctl.evaluation.figures import DomainComparison, Moved
from flexctl.evaluation.scoring import Score

__all__ = ["compare_domain", "most_moved"]

Array = np.ndarray[Any, np.dtype[np.float64]]
SAME = 1e-4
"""Bits per byte: a document that differs by no more has not moved."""
MOVED_SHOWN = 10
_WORDS = 8
_CHARACTERS = 60


def compare_domain(score: Score, other: Score, drawn: Resampled, other_drawn: Resampled) -> DomainComparison:
    """Return how a model compares with another on one domain.

    Args:
        score: This model's.
        other: The other's.
        drawn: This model's, over resampled documents.
        other_drawn: The other's.
    """
    differences = _differences(score, other)
    change = drawn.above(other_drawn)
    return DomainComparison(
        bits_per_byte=other_drawn.value,
        difference=change.value,
        difference_low=change.low,
        difference_high=change.high,
        documents_better=int((differences < -SAME).sum()),
        documents_worse=int((differences > SAME).sum()),
    )


def most_moved(contents: Sequence[Content], scores: Mapping[str, Score], others: Mapping[str, Score]) -> list[Moved]:
    """Return the documents on which two models differ most, read anew for their first words.

    Args:
        contents: The domains.
        scores: This model's, by domain.
        others: The other model's.
    """
    found = []
    for content in contents:
        name = content.domain.name
        values = _differences(scores[name], others[name])
        furthest = np.argsort(-np.abs(values), kind="stable")[:MOVED_SHOWN]
        wanted = {int(index) for index in furthest if abs(values[index]) > SAME}
        for index, text in enumerate(content.domain.documents() if wanted else ()):
            if index in wanted:
                words = " ".join(text[:1000].split()[:_WORDS])[:_CHARACTERS]
                found.append(Moved(domain=name, index=index, words=words, difference=float(values[index])))
    return sorted(found, key=lambda moved: -abs(moved.difference))[:MOVED_SHOWN]


def _differences(score: Score, other: Score) -> Array:
    """Return each document's bits per byte, the other's taken off, (documents,)."""
    ours, theirs = (each.per_document[:, 0] / math.log(2) / each.per_document[:, 2] for each in (score, other))
    differences: Array = ours - theirs
    return differences
