"""Noise: normal, secret, the same for a step whoever asks again, and on a grid."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from flexctl.privacy.noise import Secret, noisy

pytestmark = pytest.mark.usefixtures("one_thread")

SECRET = Secret(bytes(range(32)))
CPU = torch.device("cpu")


def test_numbers_are_normal() -> None:
    """With one key, so that the test is the same every time."""
    numbers = SECRET.stream("steps").normal(torch.Size([400_001]), CPU)
    assert numbers.dtype == torch.float64
    for power, expected, apart in ((1, 0.0, 0.006), (2, 1.0, 0.01), (3, 0.0, 0.03), (4, 3.0, 0.06)):
        assert float((numbers**power).mean()) == pytest.approx(expected, abs=apart)
    for limit in (1.0, 2.0, 3.0):
        assert float((numbers > limit).double().mean()) == pytest.approx(math.erfc(limit / 2**0.5) / 2, rel=0.1)
    assert float((numbers[1:] * numbers[:-1]).mean()) == pytest.approx(0.0, abs=0.006)


def test_a_step_has_its_own_bits_and_the_same_ones_again() -> None:
    first = SECRET.stream("steps", 3).words(50)
    assert np.array_equal(first, SECRET.stream("steps", 3).words(50))
    others = [
        SECRET.stream("steps", 4),
        SECRET.stream("sample", 3),
        SECRET.stream("rows", 3),
        Secret(bytes(32)).stream("steps", 3),
    ]
    assert not any(np.isin(other.words(50), first).any() for other in others)


def test_bits_come_one_after_the_other_however_many_are_asked_for() -> None:
    stream = SECRET.stream("sample")
    parts = [stream.words(count) for count in (0, 1, 7, 200_000)]
    assert np.array_equal(np.concatenate(parts), SECRET.stream("sample").words(200_008))


def test_nobody_s_seed_has_a_say() -> None:
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        drawn.append(Secret(Secret.new_key()).stream("steps").normal(torch.Size([4]), CPU))
    assert not torch.equal(*drawn)


@pytest.mark.parametrize(("probability", "expected"), [(0.0, 0), (1.0, 100_000), (0.25, 25_000), (1e-3, 100)])
def test_each_is_chosen_by_itself(probability: float, expected: int) -> None:
    chosen = SECRET.stream("sample").chosen(100_000, probability)
    assert abs(len(chosen) - expected) <= 4 * math.sqrt(100_000 * probability * (1 - probability))
    assert np.array_equal(chosen, np.unique(chosen))


def test_a_noised_sum_is_a_point_of_a_grid_that_no_sum_shifts() -> None:
    """Else the last bits of floating point would tell which sum it was."""
    for total in (torch.zeros(1000), torch.full((1000,), 0.1), torch.rand(1000) / 3):
        found = noisy(total, 0.7, SECRET.stream("steps"))
        points = found * 2.0**17
        assert torch.equal(points, points.round())
        noise = 0.7 * SECRET.stream("steps").normal(total.shape, CPU)
        assert (found - total - noise).abs().max() <= 2.0**-18
