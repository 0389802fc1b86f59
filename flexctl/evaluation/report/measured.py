"""From passes of a model over domains to what a report shows of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from flexctl.bundle.runnable import Runnable
from flexctl.bundle.store import new_file
from flexctl.evaluation.bootstrap import RESAMPLES, difference_interval, interval
from flexctl.evaluation.comparison import Comparison, DomainComparison
from flexctl.evaluation.domains import Content
from flexctl.evaluation.explaining import Piece, explain_tokens
from flexctl.evaluation.passes import Passes, Variant, every_top_k, one_left_out
from flexctl.evaluation.report.data import (
    Contrast,
    DomainFigures,
    Estimate,
    MovedDocument,
    Other,
    Passage,
    Report,
    Setting,
    Shift,
    Shifts,
    TaskFigures,
    TaskMetric,
)
from flexctl.evaluation.report.lineage import lineage
from flexctl.evaluation.report.page import render
from flexctl.evaluation.scoring import Score
from flexctl.model.routed import exclude, set_top_k
from flexctl.runtime import software_versions
from flexctl.text.tokens import frame_documents

if TYPE_CHECKING:
    from flexctl.evaluation.tasks.harness import Task, TaskRun

__all__ = ["other_of", "report_of", "shifts_of", "tasks_of", "write_report"]

PASSAGE_TOKENS = 120
_PASSAGE_DOCUMENTS = 16
_Z = 1.959964  # standard errors from the middle of a normal distribution that hold 95 % of it
_RIGHT = ("acc", "exact_match")  # how names of metrics begin for which an item is right or wrong


def write_report(path: Path, report: Report, *, overwrite: bool) -> None:
    """Write a report as one page.

    Args:
        path: File to write.
        report: What it shows.
        overwrite: Whether a file that exists may be replaced.

    Raises:
        UsageError: The file exists and may not be replaced, or matplotlib is not installed.
    """
    page = render(report)
    with new_file(path, overwrite=overwrite) as temporary:
        temporary.write_text(page, encoding="utf-8")


def report_of(
    passes: Passes,
    contents: Sequence[Content],
    whole: Variant,
    post_norm_ratio: Sequence[float] | None,
    tasks: Mapping[str, TaskFigures],
) -> Report:
    """Return the report of a model, with passes of its own for whatever was not scored before.

    Args:
        passes: The model's.
        contents: The domains.
        whole: How the model runs.
        post_norm_ratio: A layer each, for families that have it.
        tasks: As of ``tasks_of``.
    """
    names = passes.runnable.experts
    scores = {content.domain.name: passes.score(content, whole) for content in contents}

    def shifts(variant: Variant) -> Shifts:
        return shifts_of({content.domain.name: passes.score(content, variant) for content in contents}, scores)

    closed = tuple(sorted(names[1:]))
    is_alone = len(closed) == len(whole.without)
    return Report(
        **lineage(passes.runnable.bundles, whole.without),
        num_experts_per_tok=whole.top_k,
        domains={content.domain.name: _figures(scores[content.domain.name], content) for content in contents},
        tasks=tasks,
        alone=None if is_alone else shifts(Variant(without=closed, top_k=1)),
        routing={name: dict(zip(names, score.routing(), strict=True)) for name, score in scores.items()},
        routing_layers={name: dict(zip(names, score.routing_layers(), strict=True)) for name, score in scores.items()},
        ablation={name: shifts(variant) for name, variant in one_left_out(passes, whole).items()},
        top_k={} if is_alone else {k: shifts(variant) for k, variant in every_top_k(passes, whole).items()},
        passages=tuple(_passage(passes, content, whole) for content in contents),
        settings=_settings(passes, scores, post_norm_ratio),
    )


def shifts_of(others: Mapping[str, Score], scores: Mapping[str, Score]) -> Shifts:
    """Return what another model scores beside this one, domain by domain.

    Args:
        others: The other model's, on the same documents.
        scores: This model's.
    """
    return {name: _shift(other, scores[name]) for name, other in others.items()}


def other_of(runnable: Runnable, comparison: Comparison) -> Other:
    """Return another model as the report shows it: by what is in it, not by where it lies, and without any text.

    Args:
        runnable: The other model.
        comparison: How this model stands beside it.
    """
    known = lineage(runnable.bundles, ())
    return Other(
        **{name: known[name] for name in ("kind", "anchor", "digest", "members")},
        num_experts_per_tok=runnable.weights.num_experts_per_tok,
        domains={name: _contrast(row) for name, row in comparison.domains.items()},
        moved=tuple(
            MovedDocument(domain=moved.domain, index=moved.index, change=moved.difference) for moved in comparison.moved
        ),
    )


def tasks_of(tasks: Sequence[Task], runs: Mapping[str, TaskRun]) -> dict[str, TaskFigures]:
    """Return each task's figures with intervals over items.

    Args:
        tasks: The tasks.
        runs: What each of them gave, by its name.
    """
    return {task.name: _task(task, runs[task.name]) for task in tasks}


def _task(task: Task, run: TaskRun) -> TaskFigures:
    metrics = {
        name: TaskMetric(
            score=_over_items(value, run.stderr.get(name), run.items if name.startswith(_RIGHT) else None),
            stderr=run.stderr.get(name),
            chance=run.chance if name.startswith("acc") else None,
        )
        for name, value in run.metrics.items()
    }
    return TaskFigures(metrics=metrics, items=run.items, shots=task.shots, digest=task.digest)


def _over_items(value: float, stderr: float | None, count: int | None) -> Estimate:
    """Return a mean over items with its 95 % interval: Wilson's where each of ``count`` items is right or wrong.

    Otherwise the normal one. A metric without a standard error has none.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    if stderr is None:
        return Estimate(value=value)
    if count is None:
        return Estimate(value=value, low=value - _Z * stderr, high=value + _Z * stderr)
    weight = _Z**2 / count
    middle = (value + weight / 2) / (1 + weight)
    half = math.sqrt(value * (1 - value) * weight + weight**2 / 4) / (1 + weight)
    return Estimate(value=value, low=middle - half, high=middle + half)


def _contrast(row: DomainComparison) -> Contrast:
    return Contrast(
        bits_per_byte=row.bits_per_byte,
        change=Estimate(value=row.difference, low=row.difference_low, high=row.difference_high),
        better=row.documents_better,
        worse=row.documents_worse,
    )


def _shift(other: Score, score: Score) -> Shift:
    low, high = difference_interval(other.per_document, score.per_document) or (None, None)
    change = Estimate(value=other.bits_per_byte - score.bits_per_byte, low=low, high=high)
    return Shift(bits_per_byte=other.bits_per_byte, change=change)


def _figures(score: Score, content: Content) -> DomainFigures:
    low, high = interval(score.per_document) or (None, None)
    return DomainFigures(
        bits_per_byte=Estimate(value=score.bits_per_byte, low=low, high=high),
        perplexity=score.perplexity,
        tokens=score.tokens,
        bytes=score.num_bytes,
        documents=score.documents,
        digest=content.digest,
    )


def _passage(passes: Passes, content: Content, whole: Variant) -> Passage:
    """Return about PASSAGE_TOKENS tokens from the beginning of a domain."""
    set_top_k(passes.model, whole.top_k)
    exclude(passes.model, passes.runnable.select(whole.without).left_out)
    pieces: list[Piece] = []
    texts = islice(content.domain.documents(), _PASSAGE_DOCUMENTS)
    for framed in frame_documents(passes.tokenizer, texts):
        if len(pieces) >= PASSAGE_TOKENS:
            break
        if pieces:
            # The end-of-text token has no text of its own.
            pieces[-1] = dataclasses.replace(pieces[-1], text="\n\n")
        tokens = framed.tokens[: PASSAGE_TOKENS - len(pieces) + 1].tolist()
        pieces += explain_tokens(passes.model, passes.tokenizer, tokens, passes.runnable.experts, passes.seq_len)
    return Passage(domain=content.domain.name, pieces=tuple(pieces))


def _settings(
    passes: Passes, scores: Mapping[str, Score], post_norm_ratio: Sequence[float] | None
) -> tuple[Setting, ...]:
    settings = passes.settings
    agreement = [score.router_agreement for score in scores.values() if score.router_agreement is not None]
    software = (f"{name} {version}" for name, version in software_versions().items())
    said = {
        "text": f"each document by itself, in windows of {settings['seq_len']} tokens that do not overlap",
        "intervals": f"95 %, of {RESAMPLES:,} draws of documents; for differences both models have the same draws",
        "precision": f"{settings['dtype']} on {settings['device']}",
        "bfloat16 routers": f"keep the same experts for {100 * min(agreement):.2f} % of tokens" if agreement else None,
        "post-norm ratio": f"at least {min(post_norm_ratio):,.0f}; must be far above 1" if post_norm_ratio else None,
        "software": ", ".join(software),
    }
    return tuple(Setting(name=name, value=value) for name, value in said.items() if value is not None)
