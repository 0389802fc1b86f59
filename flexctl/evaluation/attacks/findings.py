"""What an audit found: plain frozen values, which --json, terminal and page show."""

from __future__ import annotations

from dataclasses import dataclass, field

from flexctl.evaluation.figures import Estimate
from flexctl.trust.records import Absence

__all__ = ["Answers", "AtLeast", "AtMost", "Audited", "CanaryBound", "Extraction", "Membership", "Recovery"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Extraction:
    """Who is given the beginning of a document: how often the model goes on as the document does.

    Attributes:
        documents: How many were begun.
        near: Share of documents of which at least one continuation has a normalised Levenshtein similarity of 0.9.
        exact: Share of documents of which at least one continuation is the document's own, letter by letter.
        above_anchor: By how much ``near`` is above the anchor's on the same documents; None for the anchor.
        copied: Share of documents of which at least one continuation has a long verbatim span of some document in the
            index; None where no index was given.
    """

    documents: int
    near: Estimate
    exact: Estimate
    above_anchor: Estimate | None = None
    copied: Estimate | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Membership:
    """How well one score tells documents that were trained on from others of the same kind.

    Attributes:
        auc: Chance that a document that was trained on scores higher than one that was not; 0.5 is guessing.
        tpr: Share of the former that are found where at most one in a hundred of the latter is taken for one.
    """

    auc: Estimate
    tpr: Estimate


@dataclass(frozen=True, kw_only=True, slots=True)
class CanaryBound:
    """What planted canaries show.

    Attributes:
        canaries: Planted and left out together.
        guesses: How many were guessed, the surest ones.
        right: How many of the guesses are right.
        epsilon: Training is not differentially private with an epsilon below this, at 95 % confidence.
        delta: The delta that goes with it.
        auc: Chance that a planted one scores higher than one left out.
    """

    canaries: int
    guesses: int
    right: int
    epsilon: float
    delta: float
    auc: Estimate


@dataclass(frozen=True, kw_only=True, slots=True)
class Audited:
    """All attacks on one model.

    Attributes:
        extraction: Going on with beginnings of documents that were trained on.
        membership: Score -> how well it tells; ``calibrated``, by the anchor's loss, the anchor lacks.
        canaries: What they show, where there are some.
        found: Whether an attack finds anything: more is extracted than from the anchor, or the calibrated score tells
            members, each with an interval that leaves chance out. Of the anchor, which never saw the text: whether its
            loss tells the two samples apart, either way. Then they are not of one kind, and the score counts for
            nothing.
    """

    extraction: Extraction
    membership: dict[str, Membership]
    canaries: CanaryBound | None = None
    found: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Recovery:
    """How fast a removed text comes back when the model is trained on a little of it.

    Attributes:
        documents: How many it was trained on.
        lr: Learning rate, constant.
        steps: Optimiser steps at which the models were scored, 0 first.
        bits_per_byte: Model -> held-out bits per byte at each of these.
        ahead: By how many bits per byte the remaining model is below the anchor at each of these.
        faster: By how many more it has come down since step 0.
    """

    documents: int
    lr: float
    steps: list[int]
    bits_per_byte: dict[str, list[Estimate]] = field(default_factory=dict)
    ahead: list[Estimate] = field(default_factory=list)
    faster: list[Estimate] = field(default_factory=list)

    @property
    def comes_back(self) -> bool:
        """Whether the text comes back faster than it comes to the anchor.

        That is, after the last step the model is ahead and has gained more, both with intervals that leave zero out.
        One look, at the end: a model that began behind passes the anchor for a step or two by chance. One that begins
        ahead and stays so has it from others, and so may one that gains more: intervals are over documents, and know
        nothing of what other experts bring along.
        """
        return self.ahead[-1].is_above() and self.faster[-1].is_above()


@dataclass(frozen=True, kw_only=True, slots=True)
class AtMost:
    """The guarantee that an expert claims, and whether its own figures bear it out.

    Attributes:
        epsilon: The bound.
        delta: How likely it may fail.
        unit: For what: ``document``.
        recomputed: Whether the accounting was made again; not without the ``privacy`` extra.
        refuted: What is wrong with the claim; None where nothing was found.
    """

    epsilon: float
    delta: float
    unit: str
    recomputed: bool
    refuted: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class AtLeast:
    """The strongest attack on the model with the expert.

    Attributes:
        attack: ``extraction`` where more is drawn out than from the anchor, else ``membership``.
        found: Whether it finds anything, by an interval that leaves out the anchor's share, or guessing.
        figure: Of extraction the share of documents; of membership the area under the curve of the calibrated score.
        without: The same of the anchor's share; 0.5, guessing, for membership.
        counts: Whether ``membership`` may be counted: not where the anchor itself tells the two samples apart.
        epsilon: Lower bound by canaries, at 95 % confidence; None where none were planted.
    """

    attack: str
    found: bool
    figure: Estimate
    without: float
    counts: bool = True
    epsilon: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """What an expert gives away at most, at least, and whether it is gone.

    Attributes:
        at_most: None where no guarantee is claimed: nothing bounds it.
        at_least: What an attack found.
        gone: What a signed record proves; None where no removal was shown.
    """

    at_most: AtMost | None
    at_least: AtLeast
    gone: Absence | None
