"""Runs tasks through lm-evaluation-harness: offline, silent, and without code from task files."""

from __future__ import annotations

import logging
import math
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import jinja2
import jinja2.sandbox
import lm_eval.api.metrics
import lm_eval.api.task
import lm_eval.evaluator
import lm_eval.utils
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

from flexctl.errors import UsageError
from flexctl.evaluation.tasks.files import file_digest, read_task_file, task_files
from flexctl.evaluation.tasks.model import HarnessModel
from flexctl.evaluation.tasks.templates import task_config
from flexctl.evaluation.tasks.yamls import read_yaml

__all__ = ["Task", "TaskRun", "read_tasks", "run_task"]

_SEED = 1234
# What a wrong field of a task file can end in, inside the harness.
_WRONG_FIELD = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    SyntaxError,
    TypeError,
    ValueError,
    OSError,
    re.error,
    jinja2.TemplateError,
    datasets.exceptions.DatasetsError,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A task that is ready to run.

    Attributes:
        name: Its name in results.
        path: Its file.
        digest: Of that file and of all that it refers to.
        shots: Solved examples in each prompt.
        harness: The harness's own object.
    """

    name: str
    path: Path
    digest: str
    shots: int
    harness: ConfigurableTask


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskRun:
    """What one task gave.

    Attributes:
        metrics: Name -> value over all items.
        stderr: Name -> standard error, for metrics that are means over items.
        items: Items that were scored.
        chance: Share that guessing gets right, mean over items; None where they are not choices with one right answer.
        records: A record an item, by its id: what the model gave, and its scores.
    """

    metrics: dict[str, float]
    stderr: dict[str, float]
    items: int
    chance: float | None
    records: list[dict[str, Any]]


def read_tasks(paths: Iterable[Path], shots: int | None) -> list[Task]:
    """Return the tasks behind files and folders, in that order.

    Args:
        paths: .jsonl files of docs/tasks.md, .yaml files of lm-evaluation-harness, folders of either.
        shots: Solved examples in each prompt; None is a YAML's own number, and none elsewhere.

    Raises:
        UsageError: One cannot be read, asks for code or remote data, or has the name of another.
    """
    tasks: dict[str, Task] = {}
    for file in [file for path in paths for file in task_files(path)]:
        with _contained(file):
            task = _jsonl_task(file, shots) if file.suffix == ".jsonl" else _yaml_task(file, shots)
        if task is None:
            continue
        if task.name in tasks:
            raise UsageError(
                f"{task.name} is in {tasks[task.name].path} and in {file}", hint="rename one", field="tasks"
            )
        tasks[task.name] = task
    if not tasks:
        raise UsageError(f"no task in {', '.join(map(str, paths))}", field="tasks")
    return list(tasks.values())


def _jsonl_task(path: Path, shots: int | None) -> Task:
    file = read_task_file(path)
    pool = file.examples or file.items
    if (shots or 0) >= len(pool) + bool(file.examples):
        raise UsageError(f"{shots} is more than the {len(pool)} items for {path} have to show", field="shots")
    data = {"test": file.items, "examples": file.examples}
    task_class = ConfigurableTask if file.has_choices else _WithReference
    harness = task_class(config=task_config(file) | {"custom_dataset": lambda **_: data})
    return _ready(harness, path, file.digest, shots)


def _yaml_task(path: Path, shots: int | None) -> Task | None:
    found = read_yaml(path)
    if found is None:
        return None
    config, files = found
    return _ready(ConfigurableTask(config=config), path, file_digest(files), shots)


def _ready(harness: ConfigurableTask, path: Path, digest: str, shots: int | None) -> Task:
    count = int((harness.config.num_fewshot or 0) if shots is None else shots)
    harness.set_config("num_fewshot", count)
    harness.set_fewshot_seed(_SEED)
    return Task(name=harness.config.task, path=path, digest=digest, shots=count, harness=harness)


class _WithReference(ConfigurableTask):  # type: ignore[misc]
    """A task of generated answers that also has the reference answer scored, as a second request an item."""

    def construct_requests(self, doc: Mapping[str, Any], ctx: str, **kwargs: Any) -> list[Instance]:
        settings = {"metadata": kwargs["metadata"]}
        reference = (ctx, self.config.target_delimiter + self.doc_to_target(doc))
        return [
            super().construct_requests(doc, ctx, **kwargs),
            Instance(request_type="loglikelihood", doc=doc, arguments=reference, idx=1, **settings),
        ]


def run_task(task: Task, model: HarnessModel, limit: int | None) -> TaskRun:
    """Return a model's figures on one task.

    Args:
        task: As from ``read_tasks``; it can be run again, with another model or other experts left out.
        model: The model.
        limit: Only the first items; None takes all.

    Raises:
        UsageError: An item does not fit the task's templates.
    """
    model.title = task.name
    with _contained(task.path):
        found = lm_eval.evaluator.evaluate(
            lm=model, task_dict={"tasks": {task.name: task.harness}}, limit=limit, bootstrap_iters=0
        )
        samples = found["samples"][task.name]
        chance = _chance(task.harness, samples)
    metrics, stderr = _figures(task.harness, found["results"][task.name], samples)
    return TaskRun(
        metrics=metrics,
        stderr=stderr,
        items=found["n-samples"][task.name]["effective"],
        chance=chance,
        records=[_record(task.name, sample) for sample in samples],
    )


def _figures(
    harness: ConfigurableTask, results: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, float], dict[str, float]]:
    """Return each metric's value and its standard error, named as the harness does where there are several filters."""
    filters = {sample["filter"] for sample in samples}
    metrics, stderr = {}, {}
    for key, value in results.items():
        metric, separator, kind = key.partition(",")
        if not separator or metric.endswith("_stderr"):
            continue
        name = key if len(filters) > 1 else metric
        values = [sample[metric] for sample in samples if sample["filter"] == kind]
        metrics[name] = float(value)
        if harness.aggregation().get(metric) is lm_eval.api.metrics.mean and len(values) > 1:
            stderr[name] = statistics.stdev(map(float, values)) / math.sqrt(len(values))
    return metrics, stderr


def _chance(harness: ConfigurableTask, samples: Sequence[Mapping[str, Any]]) -> float | None:
    if harness.OUTPUT_TYPE != "multiple_choice" or harness.multiple_target:
        return None
    return statistics.fmean(1 / len(harness.doc_to_choice(sample["doc"])) for sample in samples)


def _record(task: str, sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the model gave for one item, and its scores; the item itself is in the task's file."""
    answers = [responses[0] for responses in sample["resps"]]
    generated = [answer for answer in answers if isinstance(answer, str)]
    scored = [answer if isinstance(answer, float) else answer[0] for answer in answers if not isinstance(answer, str)]
    scores = {name: sample[name] for name in sample["metrics"] if isinstance(sample[name], (int, float))}
    return {
        "task": task,
        "item": sample["doc"].get("id", sample["doc_id"]),
        **({} if sample["filter"] == "none" else {"filter": sample["filter"]}),
        **({"generated": generated[0]} if generated else {}),
        **({"log_likelihoods": scored} if scored else {}),
        **{name: float(value) for name, value in scores.items()},
    }


@contextmanager
def _contained(path: Path) -> Iterator[None]:
    """Templates in a sandbox, no network, bars and logs off; what goes wrong is one line about ``path``."""
    sandbox = jinja2.sandbox.SandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    sandbox.filters |= lm_eval.utils.env.filters
    shows_bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with (
            _replaced(lm_eval.utils, "env", sandbox),
            _replaced(lm_eval.api.task, "tqdm", _no_bar),
            _replaced(datasets.config, "HF_HUB_OFFLINE", True),
            _hushed("lm_eval"),
            _hushed("datasets"),
        ):
            yield
    except _WRONG_FIELD as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UsageError(
            f"{path}: the harness cannot use it: {reason}", hint="docs/tasks.md shows the fields"
        ) from error
    finally:
        if shows_bars:
            datasets.enable_progress_bars()


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


@contextmanager
def _hushed(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _no_bar(items: Iterable[Any], **_: Any) -> Iterable[Any]:
    return items
