"""The bound on epsilon: right by its own formula, and never above what a mechanism of known epsilon has."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from flexctl.evaluation.attacks.canary_bound import best_guess, canary_bound, epsilon_at_least, p_value


def test_without_delta_it_is_a_binomial_tail() -> None:
    chance = math.exp(1.5) / (1 + math.exp(1.5))
    tail = sum(math.comb(20, k) * chance**k * (1 - chance) ** (20 - k) for k in range(17, 21))
    assert p_value(50, 20, 17, 1.5, 0.0) == pytest.approx(tail)


def test_delta_adds_the_largest_mean_of_what_lies_below() -> None:
    chance = 1 / (1 + math.exp(-1.0))
    pmf = [stats.binom.pmf(k, 30, chance) for k in range(31)]
    extra = max(sum(pmf[25 - i : 25]) / i for i in range(1, 26))
    expected = sum(pmf[25:]) + 2 * 100 * 1e-3 * extra
    assert p_value(100, 30, 25, 1.0, 1e-3) == pytest.approx(expected)


def test_the_bound_is_where_the_p_value_crosses_the_level() -> None:
    epsilon = epsilon_at_least(100, 100, 90, 1e-5, 0.05)
    assert p_value(100, 100, 90, epsilon, 1e-5) == pytest.approx(0.05, abs=1e-6)
    assert 1.5 < epsilon < math.log(9)  # below that of the guesses as they are
    assert epsilon_at_least(100, 100, 50, 1e-5, 0.05) == 0
    assert epsilon_at_least(100, 100, 100, 1e-5, 0.05) > epsilon


def test_all_right_says_as_much_as_so_many_canaries_can() -> None:
    """Solved by hand: chance^r = level, without delta."""
    chance = 0.05 ** (1 / 40)
    assert epsilon_at_least(40, 40, 40, 0.0, 0.05) == pytest.approx(math.log(chance / (1 - chance)))


def test_it_holds_for_a_mechanism_of_known_epsilon() -> None:
    """Randomised response with epsilon 1 is refuted by a bound above 1 in at most one run in twenty."""
    rng = np.random.default_rng(0)
    chance = math.e / (1 + math.e)
    bounds = []
    for _ in range(200):
        is_planted = rng.random(200) < 0.5
        said = np.where(rng.random(200) < chance, is_planted, ~is_planted) + rng.random(200) * 1e-3
        bounds.append(best_guess(said[is_planted], said[~is_planted], 0.0)[0])
    assert np.mean(np.array(bounds) > 1.0) <= 0.05
    assert np.mean(bounds) > 0.4


def test_scores_that_tell_all_apart() -> None:
    found = canary_bound(np.arange(10.0, 40.0), np.arange(-40.0, -10.0), 1e-5)
    assert (found.canaries, found.guesses, found.right) == (60, 60, 60)
    assert found.epsilon > 2
    assert found.auc.value == 1
