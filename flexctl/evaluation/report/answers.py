"""An audit's three answers in words, for terminal and page: at most, at least, gone; and what each does not mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flexctl.evaluation.attacks.findings import Answers, AtLeast, AtMost
from flexctl.evaluation.figures import Estimate
from flexctl.evaluation.report.words import bits, digest, share
from flexctl.trust.records import Absence

__all__ = ["Answer", "in_words"]

_DONE = {"remove": "removed", "replace": "replaced"}
_NO_BOUND = "no bound"


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One answer.

    Attributes:
        question: ``at most``, ``at least`` or ``gone``.
        figure: The answer in two or three words.
        beside: What goes with the figure; empty where nothing does.
        said: What it means, a sentence or two.
        not_meant: What it does not mean, a sentence.
    """

    question: str
    figure: str
    beside: str
    said: str
    not_meant: str


def in_words(answers: Answers, kind: str) -> Sequence[Answer]:
    """Return the answers, in the order of the questions.

    Args:
        answers: What was found.
        kind: Of the bundle that was audited: ``expert`` or ``merged``.
    """
    at_least = answers.at_least
    return (
        _at_most(answers.at_most, at_least.epsilon),
        _at_least(at_least, answers.at_most),
        _gone(answers.gone, kind),
    )


def _at_most(bound: AtMost | None, shown: float | None) -> Answer:
    nobody_knows = "That does not mean that everything is given away: it means that nobody can say how much."
    figure, beside, not_meant = _NO_BOUND, "", nobody_knows
    if bound is None:
        said = "The expert was trained without a guarantee."
    elif bound.refuted is not None:
        said = f"The expert claims a guarantee that does not hold: {bound.refuted}."
    elif shown is not None and shown > bound.epsilon:
        said = f"The expert claims epsilon {bound.epsilon:g}, and its canaries refute that: they show {shown:.2f}."
    else:
        figure, beside = f"epsilon {bound.epsilon:g}", f"delta {bound.delta:.2g}, for a {bound.unit}"
        again = "computed again from its own figures" if bound.recomputed else "not computed again: no privacy extra"
        said = (
            f"With a {bound.unit} or without it, nothing that is made of the expert is more than e^{bound.epsilon:g} "
            f"times as likely, but for a chance of delta. Claimed by the expert; {again}."
        )
        not_meant = (
            f"That does not mean that a person with several {bound.unit}s is protected as much, nor does it prove that "
            "the expert was trained as its manifest says."
        )
    return Answer(question="at most", figure=figure, beside=beside, said=said, not_meant=not_meant)


def _at_least(found: AtLeast, bound: AtMost | None) -> Answer:
    if found.attack == "extraction":
        figure, beside = f"{share(found.figure.value)} drawn out", _span(found.figure)
        said = (
            "The model goes on with so many documents nearly as they do; the anchor, which never saw them, with "
            f"{share(found.without)}."
        )
    elif not found.counts:
        figure, beside = "not known", ""
        said = (
            "No more is drawn out than from the anchor. Telling what was trained on has an AUC of "
            f"{bits(found.figure.value, 2)} ({_span(found.figure)}), which counts for nothing: the anchor, which saw "
            "neither, tells the two samples apart too. More text of one kind may decide it."
        )
    else:
        figure = f"AUC {bits(found.figure.value, 2)}" if found.found else "nothing found"
        beside = _span(found.figure) if found.found else ""
        said = (
            "The model's loss beside the anchor's tells documents that were trained on from others of their kind: "
            f"guessing has {bits(found.without, 2)}."
            if found.found
            else "No more is drawn out than from the anchor. Telling what was trained on has an AUC of "
            f"{bits(found.figure.value, 2)} ({_span(found.figure)}); guessing has {bits(found.without, 2)}."
        )
    if found.epsilon is not None:
        held = bound is not None and bound.refuted is None
        limit = f"; its guarantee says at most {bound.epsilon:g}" if bound is not None and held else ""
        said += f" By its canaries, epsilon is at least {found.epsilon:.2f}{limit}."
    return Answer(
        question="at least",
        figure=figure,
        beside=beside,
        said=said,
        not_meant="That does not mean that nothing more is given away: another attack may find more.",
    )


def _gone(shown: Absence | None, kind: str) -> Answer:
    if shown is None:
        here = (
            "It is in the model that was audited" if kind == "merged" else "No model was named that it was removed from"
        )
        return Answer(
            question="gone",
            figure="not removed",
            beside="",
            said=f"{here}, and no signed record says that it was removed.",
            not_meant="That does not mean that it cannot be: removal is exact, and can leave such a record.",
        )
    which = "the model that was left" if shown.is_left else "a model that was made from the one that was left"
    act = _DONE[shown.act]
    return Answer(
        question="gone",
        figure=act,
        beside=shown.date,
        said=(
            f"Signed by {shown.signers}. None of the expert's {shown.tensors} tensors and {shown.rows} router rows is "
            f"in {which}: {digest(shown.before)} before, {digest(shown.after)} after."
        ),
        not_meant=(
            "That does not mean that no copy is elsewhere, in backups or in models made before, nor that a changed "
            "copy would be seen."
        ),
    )


def _span(found: Estimate) -> str:
    low, high = (("?" if end is None else bits(end, 2)) for end in (found.low, found.high))
    return f"{low} to {high}"
