"""Intervals over resampled documents, against a loop that anyone can read."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from flexctl.evaluation import bootstrap
from flexctl.evaluation.bootstrap import resample
from flexctl.evaluation.figures import Estimate


def ends(found: Estimate) -> tuple[float, float] | None:
    return None if found.low is None or found.high is None else (found.low, found.high)


def interval(figures: Any) -> tuple[float, float] | None:
    return ends(resample(figures).estimate())


def difference_interval(figures: Any, other: Any) -> tuple[float, float] | None:
    return ends(resample(figures).above(resample(other)))


def make_figures(count: int, seed: int = 0) -> Any:
    """(documents, 3): nats, tokens, bytes of documents of different sizes."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(20, 400, count).astype(float)
    return np.column_stack([sizes * rng.normal(1.5, 0.3, count), sizes // 3, sizes])


def drawn_directly(count: int) -> list[Any]:
    rng = np.random.default_rng(bootstrap.SEED)
    return [rng.integers(count, size=count) for _ in range(bootstrap.RESAMPLES)]


def bits_per_byte(figures: Any) -> float:
    return float(figures[:, 0].sum() / math.log(2) / figures[:, 2].sum())


@pytest.mark.parametrize("together", [1, 1 << 20])
def test_interval_is_that_of_the_plain_loop(monkeypatch: pytest.MonkeyPatch, together: int) -> None:
    monkeypatch.setattr(bootstrap, "_DRAWN_TOGETHER", together)
    figures = make_figures(23)
    figures[:, 0] *= np.linspace(0.5, 1.5, 23)
    values = [bits_per_byte(figures[drawn]) for drawn in drawn_directly(23)]
    expected = np.percentile(values, [2.5, 97.5])
    found = interval(figures)
    assert found == pytest.approx(expected.tolist(), rel=1e-12)
    assert found is not None
    assert found[0] < bits_per_byte(figures) < found[1]


def test_paired_interval_is_that_of_the_plain_loop() -> None:
    one, other = make_figures(30), make_figures(30)
    other[:, 0] += np.random.default_rng(5).normal(0, 1, 30)
    values = [bits_per_byte(one[drawn]) - bits_per_byte(other[drawn]) for drawn in drawn_directly(30)]
    assert difference_interval(one, other) == pytest.approx(np.percentile(values, [2.5, 97.5]).tolist(), abs=1e-12)


def test_pairing_takes_out_what_documents_have_in_common() -> None:
    one = make_figures(200)
    other = one + np.array([0.02, 0, 0]) * one[:, 2:]
    low, high = difference_interval(one, other) or (0, 0)
    assert (low, high) == pytest.approx((-0.02 / math.log(2),) * 2)
    alone_low, alone_high = interval(one) or (0, 0)
    assert alone_high - alone_low > 0.05


def test_the_interval_covers_what_it_should() -> None:
    """Of 200 samples of 40 documents about 190 have the true value inside."""
    truth = 1.5 / math.log(2)
    found = [interval(make_figures(40, seed)) for seed in range(200)]
    inside = sum(low < truth < high for low, high in filter(None, found))
    assert 174 <= inside <= 199


def test_one_document_says_nothing_about_others() -> None:
    assert interval(make_figures(1)) is None
    assert difference_interval(make_figures(1), make_figures(1)) is None


def test_a_model_beside_itself_does_not_differ() -> None:
    assert difference_interval(make_figures(9), make_figures(9)) == (0.0, 0.0)
