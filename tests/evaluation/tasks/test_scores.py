"""From what a task gave to its figures: intervals over items, what guessing gets, the metric that stands for it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from flexctl.evaluation.figures import Estimate, TaskScore
from flexctl.evaluation.tasks.scores import task_score


def task(metrics: dict[str, float], stderr: dict[str, float], **changes: Any) -> TaskScore:
    """Return figures of a task of 10 items with choices that are guessed once in four times."""
    run: Any = SimpleNamespace(**{"metrics": metrics, "stderr": stderr, "items": 10, "chance": 0.25, **changes})
    ready: Any = SimpleNamespace(name="quiz", shots=2, digest="sha256:00")
    return task_score(ready, run)


@pytest.mark.parametrize(
    ("right", "items", "low", "high"),
    [(0, 10, 0.0, 0.2775), (4, 10, 0.1682, 0.6873), (10, 10, 0.7225, 1.0), (46, 100, 0.3656, 0.5574)],
)
def test_right_answers_have_wilson_s_interval(right: int, items: int, low: float, high: float) -> None:
    """Ends as of statsmodels' proportion_confint(right, items, method="wilson")."""
    found = task({"acc": right / items}, {"acc": 0.1}, items=items).estimate("acc")
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-4)
    assert found.low is not None
    assert found.low >= 0


def test_other_means_have_the_normal_interval_and_the_rest_none() -> None:
    found = task({"edit_similarity": 0.5, "bits_per_byte": 1.5}, {"edit_similarity": 0.1})
    assert found.estimate("edit_similarity") == Estimate(
        value=0.5, low=pytest.approx(0.304, abs=1e-4), high=pytest.approx(0.696, abs=1e-4)
    )
    assert found.estimate("bits_per_byte") == Estimate(value=1.5)
    assert "bits_per_byte" not in found.stderr


def test_a_single_item_shows_nothing_about_others() -> None:
    found = task({"acc": 1.0}, {}, items=1)
    assert not found.estimate("acc").has_interval
    assert found.main is None


def test_guessing_is_that_of_choices_alone() -> None:
    found = task({"acc": 0.4, "acc_norm": 0.4, "f1": 0.4, "exact_match,strict": 0.4}, {"acc": 0.1, "f1": 0.1})
    assert {name: found.chance.get(name) for name in found.metrics} == {
        "acc": 0.25,
        "acc_norm": 0.25,
        "f1": None,
        "exact_match,strict": None,
    }
    assert task({"acc": 0.4}, {"acc": 0.1}, chance=None).chance == {}


def test_the_main_metric_is_the_first_share() -> None:
    found = task({"bits_per_byte": 0.9, "length": 7.0, "acc": 0.4, "acc_norm": 0.5}, {"length": 1, "acc": 0.1})
    assert found.main == "acc"
