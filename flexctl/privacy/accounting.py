"""How much privacy noise buys: epsilon as a pure function of the numbers that a manifest has.

The mechanism is DP-SGD: in each of ``steps`` steps every document takes part with probability ``sampling_rate`` on its
own (Poisson sampling), the sum of clipped gradients gets Gaussian noise of ``noise_multiplier`` clip norms; and once,
before, a sum over all documents gets Gaussian noise of ``row_noise_multiplier`` of its own clip norms, for router rows.
Two corpora are neighbours where one has one document more.

Source: Abadi et al., "Deep Learning with Differential Privacy" (arXiv 1607.00133); accounting by dp-accounting, by
privacy loss distributions (Koskela et al., arXiv 1906.03049; Doroshenko et al., arXiv 2207.04380) and Renyi divergences
(Mironov et al., arXiv 1908.10530): either is an upper bound, and the lower one counts.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flexctl.bundle.manifest import PrivacyInfo
from flexctl.errors import UsageError

__all__ = [
    "ACCOUNTANT",
    "ADJACENCY",
    "MECHANISM",
    "UNIT",
    "Mechanism",
    "gaussian_noise",
    "is_installed",
    "least_noise",
    "refutation",
    "spent",
]

MECHANISM, UNIT, ACCOUNTANT = "dp-sgd", "document", "pld"
ADJACENCY = "add or remove one"

_ORDERS = [*range(2, 64), 80, 96, 128, 192, 256, 512, 1024]
_POINTS = 5_000
_FINEST = 1e-4
_NO_GUARANTEE = 100.0
"""Above this epsilon only the quick bound is computed: nobody is protected by either."""

_GRAIN = 1e-4
"""Figures are rounded up to this."""

_LEAST_NOISE, _MOST_NOISE, _MOST_STEPS = 0.01, 1e6, 10**8
_TOLERANCE = 1e-6
"""What two machines' floating point may make of one epsilon, as a share of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mechanism:
    """What epsilon is a function of.

    Attributes:
        noise_multiplier: Standard deviation of a step's noise, in clip norms.
        sampling_rate: Probability that a document takes part in a step, above 0, at most 1.
        steps: Of them.
        row_noise_multiplier: Standard deviation of the rows' noise, in their own clip norms.
    """

    noise_multiplier: float
    sampling_rate: float
    steps: int
    row_noise_multiplier: float


def is_installed() -> bool:
    """Return whether what counts and what draws noise are there, the ``privacy`` extra."""
    return all(importlib.util.find_spec(name) is not None for name in ("dp_accounting", "cryptography"))


@functools.lru_cache(maxsize=256)
def spent(mechanism: Mechanism, delta: float) -> float:
    """Return epsilon of a mechanism at ``delta``: an upper bound, rounded up to four decimals; inf for none."""
    quick = _renyi(mechanism, delta)
    found = quick if quick > _NO_GUARANTEE else min(quick, _by_distribution(mechanism, delta, quick))
    return found if math.isinf(found) else _rounded_up(found)


def gaussian_noise(epsilon: float, delta: float) -> float:
    """Return the least noise, in clip norms, with which one sum over all documents is (epsilon, delta) private.

    Source: Balle and Wang, "Improving the Gaussian Mechanism for Differential Privacy" (arXiv 1805.06530), theorem 8.
    """

    def holds(noise: float) -> bool:
        lost = _normal(0.5 / noise - epsilon * noise) - math.exp(min(epsilon, 700.0)) * _normal(
            -0.5 / noise - epsilon * noise
        )
        return lost <= delta

    return _least(holds)


def least_noise(
    epsilon: float, delta: float, *, sampling_rate: float, steps: int, row_noise_multiplier: float
) -> float:
    """Return the least noise multiplier of the steps with which rows and steps together keep ``epsilon``.

    Raises:
        UsageError: The row alone takes more.
    """

    def holds(noise: float) -> bool:
        tried = Mechanism(
            noise_multiplier=noise,
            sampling_rate=sampling_rate,
            steps=steps,
            row_noise_multiplier=row_noise_multiplier,
        )
        return spent(tried, delta) <= epsilon

    if not holds(_MOST_NOISE / 10):
        raise UsageError(f"{epsilon} is taken by router rows alone", hint="give a lower `dp_row_epsilon`")
    return _least(holds)


def refutation(info: PrivacyInfo) -> str | None:
    """Return what is wrong with a claim, by its own figures; None if it holds.

    The words begin with the field, as ``epsilon is 2.0; ...``.
    """
    fixed = {"mechanism": MECHANISM, "unit": UNIT, "adjacency": ADJACENCY}
    for name, known in fixed.items():
        if getattr(info, name) != known:
            return f"{name} is {getattr(info, name)!r}; this flexctl can recompute {known!r} alone"
    bounds: dict[str, tuple[Any, float, float]] = {
        "epsilon": (info.epsilon, 0, math.inf),
        "delta": (info.delta, 0, 1),
        "sampling_rate": (info.sampling_rate, 0, 1),
        "steps": (info.steps, 1, _MOST_STEPS),
        "noise_multiplier": (info.noise_multiplier, _LEAST_NOISE, _MOST_NOISE),
        "max_grad_norm": (info.max_grad_norm, 0, math.inf),
        "row_noise_multiplier": (info.row_noise_multiplier, _LEAST_NOISE, _MOST_NOISE),
    }
    for name, (value, low, high) in bounds.items():
        if value is None or not low <= value <= high or value == 0:
            return f"{name} is {value}; expected from {low:g} to {high:g}, and not 0"
    mechanism = Mechanism(
        noise_multiplier=float(info.noise_multiplier),
        sampling_rate=float(info.sampling_rate),
        steps=info.steps,
        row_noise_multiplier=float(info.row_noise_multiplier or 0),
    )
    found = spent(mechanism, float(info.delta))
    if info.epsilon < found * (1 - _TOLERANCE) - _GRAIN:
        return f"epsilon is {info.epsilon:g}; its own noise, sampling rate and steps make it {found:g}"
    return None


def _least(holds: Callable[[float], bool]) -> float:
    """Return the least number for which ``holds`` is true, to a thousandth, rounded up to four decimals."""
    high = 1.0
    while not holds(high):
        high *= 2
    low = 0.0 if high == 1.0 else high / 2
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if middle >= _LEAST_NOISE and holds(middle) else (middle, high)
    return _rounded_up(high)


def _rounded_up(figure: float) -> float:
    return math.ceil(figure / _GRAIN + 0.01) / round(1 / _GRAIN)


def _normal(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


def _events(mechanism: Mechanism) -> Any:
    import dp_accounting as dp

    step: Any = dp.GaussianDpEvent(mechanism.noise_multiplier)
    if mechanism.sampling_rate < 1:
        step = dp.PoissonSampledDpEvent(mechanism.sampling_rate, step)
    rows = dp.GaussianDpEvent(mechanism.row_noise_multiplier)
    return dp.ComposedDpEvent([dp.SelfComposedDpEvent(step, mechanism.steps), rows])


def _renyi(mechanism: Mechanism, delta: float) -> float:
    from dp_accounting import rdp

    return float(rdp.RdpAccountant(_ORDERS).compose(_events(mechanism)).get_epsilon(delta))


def _by_distribution(mechanism: Mechanism, delta: float, quick: float) -> float:
    """Return epsilon by privacy loss distributions, on a grid as fine as ``quick``, an upper bound of it, allows."""
    from dp_accounting import pld

    accountant = pld.PLDAccountant(value_discretization_interval=max(_FINEST, quick / _POINTS))
    return float(accountant.compose(_events(mechanism)).get_epsilon(delta))
