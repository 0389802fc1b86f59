"""A lower bound on epsilon from one training run, by canaries that a coin put in or left out."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import optimize, stats

from flexctl.evaluation.attacks.findings import CanaryBound
from flexctl.evaluation.attacks.membership import area
from flexctl.evaluation.bootstrap import resample_statistic

__all__ = ["best_guess", "canary_bound", "epsilon_at_least", "p_value"]

_CONFIDENCE = 0.95
_GUESSED = (0.25, 0.5, 1.0)
"""Shares of the canaries that are guessed; fixed in advance, and the confidence is divided among them."""
_LARGEST_EPSILON = 64.0
Array = np.ndarray[Any, np.dtype[np.float64]]


def canary_bound(planted: Array, left_out: Array, delta: float) -> CanaryBound:
    """Return what canaries show of a model.

    Args:
        planted: Scores of canaries that were trained on, higher for what looks trained on.
        left_out: Scores of those that were not.
        delta: Of the guarantee that is tested.
    """
    epsilon, guesses, right = best_guess(planted, left_out, delta)
    return CanaryBound(
        canaries=len(planted) + len(left_out),
        guesses=guesses,
        right=right,
        epsilon=epsilon,
        delta=delta,
        auc=resample_statistic(area, planted, left_out),
    )


def best_guess(planted: Array, left_out: Array, delta: float) -> tuple[float, int, int]:
    """Return the best bound on epsilon among the shares that are guessed, its guesses, and how many are right.

    The highest scores are guessed to be planted, as many of the lowest to be left out; nothing is said of the others.

    Args:
        planted: As for ``canary_bound``, and so are the others.
        left_out: Likewise.
        delta: Likewise.
    """
    scores = np.concatenate([planted, left_out])
    is_planted = np.concatenate([np.ones(len(planted), bool), np.zeros(len(left_out), bool)])[np.argsort(-scores)]
    count = len(scores)
    tried = []
    for share in _GUESSED:
        half = max(1, int(share * count / 2))
        right = int(is_planted[:half].sum() + (~is_planted[count - half :]).sum())
        epsilon = epsilon_at_least(count, 2 * half, right, delta, (1 - _CONFIDENCE) / len(_GUESSED))
        tried.append((epsilon, 2 * half, right))
    return max(tried)


def epsilon_at_least(count: int, guesses: int, right: int, delta: float, level: float) -> float:
    """Return the largest epsilon that so many right guesses refute: any training with it is less likely than ``level``.

    Args:
        count: Canaries, each put in by a fair coin of its own.
        guesses: How many were guessed.
        right: How many guesses are right.
        delta: Of the guarantee.
        level: Chance of being wrong.
    """

    def above(epsilon: float) -> float:
        return p_value(count, guesses, right, epsilon, delta) - level

    if above(0.0) > 0:
        return 0.0
    return _LARGEST_EPSILON if above(_LARGEST_EPSILON) <= 0 else float(optimize.brentq(above, 0.0, _LARGEST_EPSILON))


def p_value(count: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Return how likely at least ``right`` right guesses are, at most, where training is (epsilon, delta)-private.

    With delta 0, right guesses are at most binomial with chance e^epsilon / (1 + e^epsilon); with delta, a right guess
    more may come for each canary with chance delta, which the second term bounds.

    Source: Steinke, Nasr and Jagielski, "Privacy Auditing with One (1) Training Run", 2023, theorem 5.2.
    """
    chance = 1 / (1 + np.exp(-epsilon))
    tail = float(stats.binom.sf(right - 1, guesses, chance))
    if not right or not delta:
        return min(1.0, tail)
    fewer = np.arange(1, right + 1)
    between = np.cumsum(stats.binom.pmf(right - fewer, guesses, chance))
    return min(1.0, tail + 2 * count * delta * float((between / fewer).max()))
