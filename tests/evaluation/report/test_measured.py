"""From what was measured to what the page shows: intervals of tasks, and another model without its path and texts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flexctl.bundle.runnable import open_runnable
from flexctl.evaluation.comparison import Comparison, DomainComparison, Moved
from flexctl.evaluation.report import Estimate, TaskFigures
from flexctl.evaluation.report.measured import other_of, tasks_of


def task(metrics: dict[str, float], stderr: dict[str, float], **changes: Any) -> TaskFigures:
    """Return figures of a task of 10 items with choices that are guessed once in four times."""
    run: Any = SimpleNamespace(**{"metrics": metrics, "stderr": stderr, "items": 10, "chance": 0.25, **changes})
    ready: Any = SimpleNamespace(name="quiz", shots=2, digest="sha256:00")
    return tasks_of([ready], {"quiz": run})["quiz"]


@pytest.mark.parametrize(
    ("right", "items", "low", "high"),
    [(0, 10, 0.0, 0.2775), (4, 10, 0.1682, 0.6873), (10, 10, 0.7225, 1.0), (46, 100, 0.3656, 0.5574)],
)
def test_right_answers_have_wilson_s_interval(right: int, items: int, low: float, high: float) -> None:
    """Ends as of statsmodels' proportion_confint(right, items, method="wilson")."""
    found = task({"acc": right / items}, {"acc": 0.1}, items=items).metrics["acc"].score
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-4)
    assert found.low is not None
    assert found.low >= 0


def test_other_means_have_the_normal_interval_and_the_rest_none() -> None:
    found = task({"edit_similarity": 0.5, "bits_per_byte": 1.5}, {"edit_similarity": 0.1}).metrics
    assert found["edit_similarity"].score == Estimate(
        value=0.5, low=pytest.approx(0.304, abs=1e-4), high=pytest.approx(0.696, abs=1e-4)
    )
    assert found["bits_per_byte"].score == Estimate(value=1.5)
    assert found["bits_per_byte"].stderr is None


def test_a_single_item_shows_nothing_about_others() -> None:
    found = task({"acc": 1.0}, {}, items=1)
    assert not found.metrics["acc"].score.has_interval
    assert found.main is None


def test_guessing_is_that_of_choices_alone() -> None:
    found = task({"acc": 0.4, "acc_norm": 0.4, "f1": 0.4, "exact_match,strict": 0.4}, {"acc": 0.1, "f1": 0.1}).metrics
    assert {name: metric.chance for name, metric in found.items()} == {
        "acc": 0.25,
        "acc_norm": 0.25,
        "f1": None,
        "exact_match,strict": None,
    }
    assert task({"acc": 0.4}, {"acc": 0.1}, chance=None).metrics["acc"].chance is None


def test_the_main_metric_is_the_first_share() -> None:
    found = task({"bits_per_byte": 0.9, "length": 7.0, "acc": 0.4, "acc_norm": 0.5}, {"length": 1, "acc": 0.1})
    assert found.main == "acc"


def test_another_model_is_neither_its_path_nor_its_texts(merged: Path, anchor: Path) -> None:
    row = DomainComparison(
        bits_per_byte=2.0,
        difference=-0.5,
        difference_low=-0.6,
        difference_high=-0.4,
        documents_better=3,
        documents_worse=1,
    )
    moved = Moved(domain="code", index=7, words="private words", difference=-0.9)
    runnable = open_runnable(merged, anchor)
    found = other_of(runnable, Comparison(path=merged, digest=runnable.digest, domains={"code": row}, moved=[moved]))
    shown = repr(dataclasses.asdict(found))
    assert "private" not in shown
    assert str(merged) not in shown
    assert (found.kind, found.digest) == ("merged", runnable.digest)
    assert found.title == "tiny-olmo2 with code, sums"
    assert found.domains["code"].change == Estimate(value=-0.5, low=-0.6, high=-0.4)
    assert (found.moved[0].domain, found.moved[0].index, found.moved[0].change) == ("code", 7, -0.9)
