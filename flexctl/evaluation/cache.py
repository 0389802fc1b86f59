"""Scores of earlier passes, so that an evaluation that is repeated or was interrupted does not score twice."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flexctl import cache
from flexctl.evaluation.scoring import Score

__all__ = ["recall", "remember"]

_KIND = "scores"
_FIELDS = tuple(field.name for field in dataclasses.fields(Score))


def recall(identity: Mapping[str, Any]) -> Score | None:
    """Return the score that was remembered for ``identity``; None if there is none, or it cannot be read.

    Args:
        identity: Everything that decides the figures, as JSON has it.
    """
    arrays = cache.recall(_KIND, identity)
    return Score(**arrays) if arrays is not None and arrays.keys() == set(_FIELDS) else None


def remember(identity: Mapping[str, Any], score: Score) -> None:
    """Keep a score."""
    cache.remember(_KIND, identity, {name: getattr(score, name) for name in _FIELDS})
