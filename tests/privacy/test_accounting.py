"""Accounting: epsilon is an upper bound, never below dp-accounting's own, and a claim below it is refuted."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from flexctl.bundle import PrivacyInfo
from flexctl.errors import UsageError
from flexctl.privacy.accounting import Mechanism, gaussian_noise, least_noise, refutation, spent

PLAIN = Mechanism(noise_multiplier=0.839, sampling_rate=0.032, steps=150, row_noise_multiplier=13.3)


@pytest.fixture(scope="module")
def claim() -> PrivacyInfo:
    return PrivacyInfo(
        mechanism="dp-sgd",
        epsilon=spent(PLAIN, 1e-5),
        delta=1e-5,
        unit="document",
        accountant="pld",
        noise_multiplier=0.839,
        sampling_rate=0.032,
        steps=150,
        max_grad_norm=0.3,
        adjacency="add or remove one",
        row_noise_multiplier=13.3,
    )


def by_the_library(mechanism: Mechanism, delta: float) -> float:
    """Epsilon by dp-accounting's own defaults, written down once more."""
    import dp_accounting as dp
    from dp_accounting import pld

    step = dp.PoissonSampledDpEvent(mechanism.sampling_rate, dp.GaussianDpEvent(mechanism.noise_multiplier))
    rows = dp.GaussianDpEvent(mechanism.row_noise_multiplier)
    accountant = pld.PLDAccountant()
    accountant.compose(dp.SelfComposedDpEvent(step, mechanism.steps)).compose(rows)
    return accountant.get_epsilon(delta)


@pytest.mark.parametrize(
    ("noise", "rate", "steps", "rows", "delta"),
    [(0.64, 0.032, 150, 3.73, 1e-5), (6.0, 0.128, 150, 20.0, 5e-5), (0.8, 0.2, 3, 2.0, 1e-3), (1.0, 1.0, 4, 9.0, 1e-6)],
)
def test_what_is_spent_is_never_below_the_library_s_own_figure(
    noise: float, rate: float, steps: int, rows: float, delta: float
) -> None:
    mechanism = Mechanism(noise_multiplier=noise, sampling_rate=rate, steps=steps, row_noise_multiplier=rows)
    direct = by_the_library(mechanism, delta)
    assert direct <= spent(mechanism, delta) <= 1.01 * direct + 1e-3


def test_figures_that_others_measured() -> None:
    """Row and steps composed: sigma 0.839 for epsilon 4, with a row of epsilon 0.25 by itself."""
    assert spent(PLAIN, 1e-5) == pytest.approx(4.0, abs=0.02)
    assert gaussian_noise(1.0, 1e-5) == pytest.approx(3.7306, rel=1e-3)
    assert gaussian_noise(0.25, 1e-5) == pytest.approx(13.286, rel=1e-3)


def test_the_least_noise_keeps_epsilon_and_a_little_less_does_not() -> None:
    told: dict[str, Any] = {"sampling_rate": 0.25, "steps": 2, "row_noise_multiplier": 5.0}
    noise = least_noise(2.0, 1e-3, **told)
    assert spent(Mechanism(noise_multiplier=noise, **told), 1e-3) <= 2.0
    assert spent(Mechanism(noise_multiplier=0.99 * noise, **told), 1e-3) > 2.0


def test_rows_that_take_all_of_it_leave_nothing_for_steps() -> None:
    with pytest.raises(UsageError, match="taken by router rows alone"):
        least_noise(1.0, 1e-5, sampling_rate=0.1, steps=2, row_noise_multiplier=gaussian_noise(2.0, 1e-5))


def test_a_claim_holds_by_its_own_figures(claim: PrivacyInfo) -> None:
    assert refutation(claim) is None
    assert refutation(dataclasses.replace(claim, epsilon=5.0)) is None


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"epsilon": 3.9}, "epsilon is 3.9; its own noise, sampling rate and steps make it"),
        ({"noise_multiplier": 0.8}, "epsilon is"),
        ({"sampling_rate": 0.04}, "epsilon is"),
        ({"steps": 200}, "epsilon is"),
        ({"row_noise_multiplier": 1.0}, "epsilon is"),
        ({"delta": 1e-7}, "epsilon is"),
        ({"noise_multiplier": 1e-300}, "noise_multiplier is 1e-300"),
        ({"noise_multiplier": math.nan}, "noise_multiplier is nan"),
        ({"sampling_rate": 1.5}, "sampling_rate is 1.5"),
        ({"steps": 10**12}, "steps is"),
        ({"delta": 0.0}, "delta is 0"),
        ({"epsilon": -1.0}, "epsilon is -1"),
        ({"row_noise_multiplier": None}, "row_noise_multiplier is None"),
        ({"adjacency": None}, "adjacency is None; this flexctl can recompute 'add or remove one' alone"),
        ({"mechanism": "magic"}, "mechanism is 'magic'"),
        ({"unit": "token"}, "unit is 'token'"),
    ],
)
def test_a_claim_that_its_figures_do_not_keep_is_refuted(claim: PrivacyInfo, wrong: dict[str, Any], says: str) -> None:
    assert says in str(refutation(dataclasses.replace(claim, **wrong)))


@pytest.mark.parametrize(("noise", "rate", "steps"), [(0.01, 1.0, 10**8), (0.01, 1e-9, 10**8), (1e6, 1.0, 10**8)])
def test_figures_at_the_ends_of_what_is_read_take_no_time(
    claim: PrivacyInfo, noise: float, rate: float, steps: int
) -> None:
    found = refutation(dataclasses.replace(claim, noise_multiplier=noise, sampling_rate=rate, steps=steps))
    assert (found is None) == (noise > 1)
