"""From what a task gave to its figures, with intervals over items."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from flexctl.evaluation.figures import Estimate, TaskScore

if TYPE_CHECKING:
    from flexctl.evaluation.tasks.harness import Task, TaskRun

__all__ = ["task_score"]

_Z = 1.959964  # standard errors from the middle of a normal distribution that hold 95 % of it
_RIGHT = ("acc", "exact_match")  # how names of metrics begin for which an item is right or wrong


def task_score(task: Task, run: TaskRun) -> TaskScore:
    """Return a task's figures.

    Args:
        task: The task.
        run: What it gave.
    """
    return TaskScore(
        metrics=run.metrics,
        stderr=run.stderr,
        items=run.items,
        shots=task.shots,
        digest=task.digest,
        intervals={
            name: _over_items(run.metrics[name], stderr, run.items if name.startswith(_RIGHT) else None)
            for name, stderr in run.stderr.items()
        },
        chance={} if run.chance is None else {name: run.chance for name in run.metrics if name.startswith("acc")},
    )


def _over_items(value: float, stderr: float, count: int | None) -> Estimate:
    """Return a mean over items with its 95 % interval: Wilson's where each of ``count`` items is right or wrong.

    Otherwise the normal one.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    if count is None:
        return Estimate(value=value, low=value - _Z * stderr, high=value + _Z * stderr)
    weight = _Z**2 / count
    middle = (value + weight / 2) / (1 + weight)
    half = math.sqrt(value * (1 - value) * weight + weight**2 / 4) / (1 + weight)
    return Estimate(value=value, low=middle - half, high=middle + half)
