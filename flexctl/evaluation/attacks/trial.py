"""All attacks on one model, and what they find beside the anchor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from flexctl.bundle.index import Index
from flexctl.evaluation.attacks.canary_bound import canary_bound
from flexctl.evaluation.attacks.extraction import Beginning, Continuations, continue_all, share
from flexctl.evaluation.attacks.findings import Audited, Extraction
from flexctl.evaluation.attacks.membership import Losses, measure_losses, memberships
from flexctl.evaluation.bootstrap import resample_statistic
from flexctl.runtime import Reporter
from flexctl.text.tokens import Framed
from flexctl.tracing.spans import copied

__all__ = ["Effort", "Texts", "Trial", "audited", "try_model"]

_COPIED_BYTES = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class Texts:
    """Framed documents of each kind.

    Attributes:
        members: That were trained on.
        others: Of the same kind, that were not.
        planted: Canaries that were trained on.
        left_out: Canaries that were not.
    """

    members: Sequence[Framed]
    others: Sequence[Framed]
    planted: Sequence[Framed] = field(default_factory=list)
    left_out: Sequence[Framed] = field(default_factory=list)

    def by_kind(self) -> dict[str, Sequence[Framed]]:
        """Return kind -> documents, of the kinds that there are."""
        kinds = {"members": self.members, "others": self.others, "planted": self.planted, "left_out": self.left_out}
        return {kind: documents for kind, documents in kinds.items() if documents}


@dataclass(frozen=True, kw_only=True, slots=True)
class Effort:
    """How hard it is tried.

    Attributes:
        length: Tokens of a continuation.
        samples: Continuations of each beginning.
        seq_len: Targets of a document whose loss counts.
        batch_tokens: Positions that go through the model at once.
        seed: Of the draws.
    """

    length: int
    samples: int
    seq_len: int
    batch_tokens: int
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Trial:
    """What one model did: how it went on, and its losses by kind of document."""

    continuations: Continuations
    losses: dict[str, Losses]


def try_model(
    model: nn.Module,
    tokenizer: Any,
    started: Sequence[Beginning],
    texts: Texts,
    effort: Effort,
    *,
    name: str,
    reporter: Reporter,
) -> Trial:
    """Let a model go on with beginnings, and take its losses.

    Args:
        model: As from ``model.building.build_model``, in evaluation mode.
        tokenizer: Its tokenizer.
        started: Beginnings of members.
        texts: Documents.
        effort: How hard to try.
        name: What the model is called in progress.
        reporter: Hears of progress.
    """
    with reporter.progress(f"extracting from {name}", len(started) * effort.samples, "continuations") as bar:
        continuations = continue_all(
            model,
            tokenizer,
            started,
            length=effort.length,
            samples=effort.samples,
            batch_tokens=effort.batch_tokens,
            seed=effort.seed,
            progress=bar,
        )
    kinds = texts.by_kind()
    with reporter.progress(f"scoring {name}", sum(map(len, kinds.values())), "documents") as bar:
        losses = {
            kind: measure_losses(
                model,
                tokenizer,
                documents,
                seq_len=effort.seq_len,
                batch_tokens=effort.batch_tokens,
                progress=bar,
            )
            for kind, documents in kinds.items()
        }
    return Trial(continuations=continuations, losses=losses)


def audited(
    trial: Trial, anchor: Trial | None, *, delta: float, indexes: Sequence[Index], are_alike: bool = True
) -> Audited:
    """Return what a trial shows.

    Args:
        trial: Of the model.
        anchor: Of the anchor on the same texts; None for the anchor's own.
        delta: Of the guarantee that canaries are held against.
        indexes: Where spans of any document are looked for.
        are_alike: Whether members and others are of one kind; where they are not, telling them apart finds nothing.
    """
    scores = {kind: found.scores(anchor.losses[kind] if anchor else None) for kind, found in trial.losses.items()}
    best = "calibrated" if anchor else "loss"
    membership = memberships(scores["members"], scores["others"])
    canaries = None
    if "planted" in scores and "left_out" in scores:
        canaries = canary_bound(scores["planted"][best], scores["left_out"][best], delta)
    extraction = _extraction(trial.continuations, anchor.continuations if anchor else None, indexes)
    told, more = membership[best].auc, extraction.above_anchor
    if anchor is None:
        found = told.is_above(0.5) or told.is_below(0.5)
    else:
        found = (are_alike and told.is_above(0.5)) or (more is not None and more.is_above(0.0))
    return Audited(extraction=extraction, membership=membership, canaries=canaries, found=found)


def _extraction(made: Continuations, anchors: Continuations | None, indexes: Sequence[Index]) -> Extraction:
    above = None
    if anchors is not None:
        above = resample_statistic(lambda rows: float(rows.mean()), made.near - anchors.near)
    return Extraction(
        documents=len(made.near),
        near=share(made.near),
        exact=share(made.exact),
        above_anchor=above,
        copied=share(copied(indexes, made.texts, _COPIED_BYTES)) if indexes else None,
    )
