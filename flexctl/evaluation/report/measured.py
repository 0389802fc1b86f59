"""From passes of a model over domains to what a report shows of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

from flexctl.bundle.store import new_file
from flexctl.evaluation.bootstrap import RESAMPLES, difference_interval, interval
from flexctl.evaluation.domains import Content
from flexctl.evaluation.explaining import Piece, explain_tokens
from flexctl.evaluation.passes import Passes, Variant, every_top_k, one_left_out
from flexctl.evaluation.report.data import DomainFigures, Estimate, Passage, Report, Setting, Shift, Shifts
from flexctl.evaluation.report.lineage import lineage
from flexctl.evaluation.report.page import render
from flexctl.evaluation.scoring import Score
from flexctl.model.routed import exclude, set_top_k
from flexctl.runtime import software_versions
from flexctl.training.tokens import frame_documents

__all__ = ["report_of", "shifts_of", "write_report"]

PASSAGE_TOKENS = 120
_PASSAGE_DOCUMENTS = 16


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
    passes: Passes, contents: Sequence[Content], whole: Variant, post_norm_ratio: Sequence[float] | None
) -> Report:
    """Return the report of a model, with passes of its own for whatever was not scored before.

    Args:
        passes: The model's.
        contents: The domains.
        whole: How the model runs.
        post_norm_ratio: A layer each, for families that have it.
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
    exclude(passes.model, passes.runnable.indices(whole.without))
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
