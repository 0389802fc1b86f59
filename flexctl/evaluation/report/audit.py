"""The page of an audit: at most, at least, gone; and what attacks found, model by model."""

from __future__ import annotations

from collections.abc import Mapping

from flexctl.evaluation.attacks.findings import Answers, Audited, Recovery
from flexctl.evaluation.figures import Lineage
from flexctl.evaluation.report import charts
from flexctl.evaluation.report.answers import in_words
from flexctl.evaluation.report.template import fill
from flexctl.evaluation.report.words import bits, interval, joined, share

__all__ = ["render_audit"]

_ATTACKS = {
    "loss": "the model's loss",
    "zlib": "loss over what zlib makes of the text",
    "min-k": "loss of the hardest fifth of tokens",
    "calibrated": "how much lower the loss is than the anchor's",
}


def render_audit(
    name: str,
    answers: Answers,
    models: Mapping[str, Audited],
    recovery: Recovery | None,
    *,
    lineage: Lineage,
    digest: str,
    facts: Mapping[str, int],
) -> str:
    """Return the page.

    Args:
        name: The expert whose text it is about.
        answers: At most, at least, gone.
        models: Model -> what attacks found, the anchor first.
        recovery: What comes back after removal.
        lineage: Who is in the model.
        digest: Of the bundle.
        facts: How hard it was tried, as ``AuditResult`` has it.

    Raises:
        UsageError: matplotlib or jinja2 is not installed.
    """
    charts.require_matplotlib()
    anchor = next(iter(models))
    best = {model: found.membership["loss" if model == anchor else "calibrated"].auc for model, found in models.items()}
    return fill(
        "audit.html",
        name=name,
        answers=in_words(answers, lineage.kind),
        claimed=answers.at_most,
        gone=answers.gone,
        models=models,
        recovery=recovery,
        lineage=lineage,
        digest_of_model=digest,
        facts=facts,
        attacks=_ATTACKS,
        has_copied=any(found.extraction.copied for found in models.values()),
        has_canaries=any(found.canaries for found in models.values()),
        summary=" ".join(_summary(name, models, recovery)),
        charts={
            "extraction": charts.shares(
                {model: found.extraction.near for model, found in models.items()},
                "extraction",
                "Share of documents that a model goes on with nearly as they do",
            ),
            "membership": charts.shares(
                best, "membership", "How well a model's loss tells what was trained on", chance=0.5
            ),
            "recovery": charts.recovery(recovery, "recovery") if recovery else "",
        },
    )


def _summary(name: str, models: Mapping[str, Audited], recovery: Recovery | None) -> list[str]:
    """Return what attacks found, a sentence each."""
    anchor, *others = models
    found = [model for model in others if models[model].found]
    clean = [model for model in others if not models[model].found]
    told = []
    if found:
        told.append(f"Attacks find something of {name} in {joined(map(_called, found))}.")
    where = joined(map(_called, clean)) if clean else ""
    if clean and models[anchor].found:
        told.append(
            f"Of {where} nothing can be said: even the anchor tells the two samples apart, and membership counts for "
            "nothing."
        )
    elif clean:
        told.append(f"They find nothing in {where}." if found else f"Attacks find nothing in {where}.")
    whole = models[others[0]].extraction
    told.append(
        f"The {others[0]} model goes on with {share(whole.near.value)} of the documents nearly as they do; the anchor, "
        f"which never saw them, with {share(models[anchor].extraction.near.value)}."
    )
    if recovery:
        ahead = recovery.ahead[-1]
        told.append(
            f"After removal it comes back faster than to the anchor, by {bits(ahead.value)} bits per byte "
            f"({interval(ahead)}): other experts here had it too, or help with text of its kind."
            if recovery.comes_back
            else "After removal the text comes back no faster than it comes to the anchor."
        )
    return told


def _called(model: str) -> str:
    """Return what a sentence calls a model."""
    return f"the model {model}" if model.startswith("without ") else f"the {model} model"
