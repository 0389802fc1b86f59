"""How sure a figure is: percentile intervals over resampled documents.

Documents are drawn with replacement, as many as there are, and the figure is computed anew from what was drawn. A
document is the unit because its tokens depend on each other. Seeded: the same figures always give the same interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from flexctl.evaluation.figures import Estimate

__all__ = ["RESAMPLES", "Resampled", "gained_more", "resample", "resample_statistic"]

Array = np.ndarray[Any, np.dtype[np.float64]]
RESAMPLES = 1000
SEED = 0
_PERCENTILES = (2.5, 97.5)
_DRAWN_TOGETHER = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Resampled:
    """Bits per byte of documents, and of every draw of them; drawn once, whatever they are held against.

    Attributes:
        value: Of the documents as they are.
        draws: Of each draw, (RESAMPLES,); empty for a single document, which says nothing about others.
    """

    value: float
    draws: Array

    def estimate(self) -> Estimate:
        """Return the value with its 95 % interval.

        Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13.
        """
        return _estimate(self.value, self.draws)

    def above(self, other: Resampled) -> Estimate:
        """Return by how much it is above ``other``, of another model on the same documents, with a 95 % interval.

        Both are resampled alike, so that what a document has in common for both models falls out.
        """
        return _estimate(self.value - other.value, self.draws - other.draws)


def resample(per_document: Array) -> Resampled:
    """Return bits per byte over resampled documents.

    Args:
        per_document: Of a ``Score``, (documents, 3).
    """
    nll, num_bytes = float(per_document[:, 0].sum()), float(per_document[:, 2].sum())
    value = nll / math.log(2) / num_bytes if num_bytes else math.nan
    draws = _bits_per_byte(_resampled(per_document)) if len(per_document) > 1 else np.zeros(0)
    return Resampled(value=value, draws=draws)


def gained_more(ours: tuple[Resampled, Resampled], theirs: tuple[Resampled, Resampled]) -> Estimate:
    """Return by how much more one model came down than another, with a 95 % interval.

    Args:
        ours: A model before and after, on the same documents.
        theirs: The other before and after, on these documents too.
    """
    (before, after), (other_before, other_after) = ours, theirs
    return _estimate(
        before.value - after.value - (other_before.value - other_after.value),
        before.draws - after.draws - (other_before.draws - other_after.draws),
    )


def resample_statistic(statistic: Callable[..., float], *groups: Array) -> Estimate:
    """Return a figure of some groups of documents with its 95 % interval; each group is drawn from by itself.

    Args:
        statistic: Called with as many arrays as there are groups.
        groups: Figures of documents, one a row; what is in one row stays together.
    """
    value = statistic(*groups)
    if any(len(group) < 2 for group in groups):
        return Estimate(value=value)
    rng = np.random.default_rng(SEED)
    drawn = [[group[rng.integers(len(group), size=len(group))] for group in groups] for _ in range(RESAMPLES)]
    return _estimate(value, np.array([statistic(*draw) for draw in drawn]))


def _estimate(value: float, draws: Array) -> Estimate:
    if not len(draws):
        return Estimate(value=value)
    low, high = (float(end) for end in np.percentile(draws, _PERCENTILES))
    return Estimate(value=value, low=low, high=high)


def _resampled(figures: Array) -> Array:
    """Return column sums over each draw of documents, (RESAMPLES, columns)."""
    return np.concatenate([figures[drawn].sum(axis=1) for drawn in _draws(len(figures))])


def _draws(count: int) -> Iterator[np.ndarray[Any, np.dtype[np.int64]]]:
    """Yield the draws, (some, count) each, so that memory holds a million numbers or one draw."""
    rng = np.random.default_rng(SEED)
    together = max(1, _DRAWN_TOGETHER // count)
    for start in range(0, RESAMPLES, together):
        yield rng.integers(count, size=(min(together, RESAMPLES - start), count))


def _bits_per_byte(sums: Array) -> Array:
    bits: Array = sums[:, 0] / math.log(2) / sums[:, 2]
    return bits
