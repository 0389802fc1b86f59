"""All attacks on every model that an audit compares, and the strongest of what they find."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flexctl.bundle.index import Index
from flexctl.evaluation.attacks.extraction import Beginning
from flexctl.evaluation.attacks.findings import AtLeast, Audited
from flexctl.evaluation.attacks.trial import Effort, Texts, audited, try_model
from flexctl.evaluation.passes import Passes, Variant
from flexctl.runtime import Reporter

__all__ = ["ANCHOR", "attack", "strongest"]

ANCHOR = "anchor"
"""What the model that never saw the text is called."""

_GUESSING = 0.5


def attack(
    passes: Passes,
    variants: Mapping[str, Variant],
    started: Sequence[Beginning],
    texts: Texts,
    effort: Effort,
    *,
    delta: float,
    indexes: Sequence[Index],
    reporter: Reporter,
) -> dict[str, Audited]:
    """Return model -> what attacks on it found.

    Args:
        passes: The model.
        variants: Model -> how ``passes`` runs as it, ``ANCHOR`` first and the model with the expert second.
        started: Beginnings of members.
        texts: Documents.
        effort: How hard to try.
        delta: Of the guarantee that canaries are held against.
        indexes: Where spans of any document are looked for.
        reporter: Hears of progress, and where the two samples are not of one kind.
    """
    trials = {
        name: try_model(
            passes.model_as(variant), passes.tokenizer, started, texts, effort, name=name, reporter=reporter
        )
        for name, variant in variants.items()
    }
    anchor = trials.pop(ANCHOR)
    first = audited(anchor, None, delta=delta, indexes=indexes)
    if first.found:
        reporter.warn("the anchor, which saw neither, tells `data` from `held_out`: they are not of one kind")
    others = {
        name: audited(trial, anchor, delta=delta, indexes=indexes, are_alike=not first.found)
        for name, trial in trials.items()
    }
    return {ANCHOR: first, **others}


def strongest(models: Mapping[str, Audited]) -> AtLeast:
    """Return the strongest attack on the model with the expert, as ``attack`` returns it.

    Extraction where it finds anything, as that is the text itself; else membership by the calibrated score alone: the
    best of several scores would be above guessing by chance.
    """
    anchor, whole, *_ = models.values()
    above, canaries = whole.extraction.above_anchor, whole.canaries
    epsilon = None if canaries is None else canaries.epsilon
    if above is not None and above.is_above(0.0):
        return AtLeast(
            attack="extraction",
            found=True,
            figure=whole.extraction.near,
            without=anchor.extraction.near.value,
            epsilon=epsilon,
        )
    return AtLeast(
        attack="membership",
        found=whole.found,
        figure=whole.membership["calibrated"].auc,
        without=_GUESSING,
        counts=not anchor.found,
        epsilon=epsilon,
    )
