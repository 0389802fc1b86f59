"""How sure a figure is: percentile intervals over resampled documents.

Documents are drawn with replacement, as many as there are, and the figure is computed anew from what was drawn. A
document is the unit because its tokens depend on each other. Seeded: the same figures always give the same interval.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

__all__ = ["difference_interval", "interval"]

Array = np.ndarray[Any, np.dtype[np.float64]]
RESAMPLES = 1000
SEED = 0
_PERCENTILES = (2.5, 97.5)
_DRAWN_TOGETHER = 1 << 20


def interval(per_document: Array) -> tuple[float, float] | None:
    """Return the 95 % interval of bits per byte; None for a single document, which says nothing about others.

    Args:
        per_document: Of a ``Score``, (documents, 3).

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13.
    """
    if len(per_document) < 2:
        return None
    return _percentiles(_bits_per_byte(_resampled(per_document)))


def difference_interval(per_document: Array, other: Array) -> tuple[float, float] | None:
    """Return the 95 % interval of the difference in bits per byte, ``other``'s taken off; None for a single document.

    Both are resampled alike, so that what a document has in common for both models falls out.

    Args:
        per_document: Of a ``Score``, (documents, 3).
        other: Of another model's on the same documents, (documents, 3).
    """
    if len(per_document) < 2:
        return None
    sums = _resampled(np.concatenate([per_document, other], axis=1))
    return _percentiles(_bits_per_byte(sums[:, :3]) - _bits_per_byte(sums[:, 3:]))


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


def _percentiles(values: Array) -> tuple[float, float]:
    low, high = (float(value) for value in np.percentile(values, _PERCENTILES))
    return low, high
