"""What a report shows: plain frozen values. Everything on the page follows from one ``Report``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from flexctl.bundle.manifest import Tombstone
from flexctl.bundle.names import PUBLIC
from flexctl.evaluation.explaining import Piece

__all__ = [
    "Contrast",
    "DomainFigures",
    "Estimate",
    "Member",
    "MovedDocument",
    "Other",
    "Passage",
    "Report",
    "Setting",
    "Shift",
    "Shifts",
    "TaskFigures",
    "TaskMetric",
]

_NAMED = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A figure and its 95 % interval; ``low`` and ``high`` are None where there is none."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def has_interval(self) -> bool:
        """Whether both ends are known."""
        return self.low is not None and self.high is not None

    @property
    def crosses_zero(self) -> bool:
        """Whether the interval holds zero, so that the figure's sign is not shown by the text at hand."""
        return self.low is not None and self.high is not None and self.low <= 0 <= self.high

    @property
    def is_clear(self) -> bool:
        """Whether it is a number whose interval leaves zero out, so that its sign is shown."""
        return math.isfinite(self.value) and self.has_interval and not self.crosses_zero


@dataclass(frozen=True, kw_only=True, slots=True)
class Shift:
    """What another model scores on a domain.

    Attributes:
        bits_per_byte: Its score.
        change: That minus this model's score; above 0 is worse.
    """

    bits_per_byte: float
    change: Estimate


Shifts = Mapping[str, Shift]
"""Domain -> what another model scores there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One expert in the model, as its manifest tells.

    Attributes:
        name: ``public`` for the anchor's own.
        digest: The expert's, or the anchor's.
        license: SPDX id or text; None is unknown.
        purposes: What it may be used for; none listed is not restricted.
        expires: Last day of its use, YYYY-MM-DD; None is never.
        privacy: The guarantee in words; None is none.
        label: The owner's words for the text behind it.
        left_out: Whether it was masked in this evaluation.
    """

    name: str
    digest: str
    license: str | None
    purposes: tuple[str, ...] = ()
    expires: str | None = None
    privacy: str | None = None
    label: str | None = None
    left_out: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainFigures:
    """What this model scores on a domain; ``digest`` is that of its text, where it is known."""

    bits_per_byte: Estimate
    perplexity: float
    tokens: int
    bytes: int
    documents: int
    digest: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskMetric:
    """One metric of a task.

    Attributes:
        score: Its value; the interval is over items, for metrics that are means over them.
        stderr: Standard error of that mean; None for other metrics.
        chance: What guessing gets; None where the items do not say.
    """

    score: Estimate
    stderr: float | None = None
    chance: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskFigures:
    """What this model scores on a task: its metrics by name, how many items, how many solved ones in each prompt."""

    metrics: Mapping[str, TaskMetric]
    items: int
    shots: int
    digest: str

    @property
    def main(self) -> str | None:
        """The first metric that is a share with an interval, to stand for the task; None where there is none."""
        shares = (name for name, m in self.metrics.items() if m.score.has_interval and 0 <= m.score.value <= 1)
        return next(shares, None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Contrast:
    """This model beside another on a domain.

    Attributes:
        bits_per_byte: The other's score.
        change: From the other to this model; below 0 is better.
        better: Documents on which this model needs fewer bits.
        worse: Documents on which it needs more.
    """

    bits_per_byte: float
    change: Estimate
    better: int
    worse: int


@dataclass(frozen=True, kw_only=True, slots=True)
class MovedDocument:
    """A document that two models score differently: its domain, its place there from 0, by how much.

    ``change`` is from the other to this model, in bits per byte.
    """

    domain: str
    index: int
    change: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Other:
    """Another model that this one stands beside.

    Attributes:
        kind: anchor, expert or merged.
        anchor: Its anchor's name.
        digest: Its digest.
        num_experts_per_tok: Experts active for a token.
        members: Experts, the public one first.
        domains: Domain -> how this model stands beside it.
        moved: Documents that differ most, the furthest first.
    """

    kind: str
    anchor: str
    digest: str
    num_experts_per_tok: int
    members: tuple[Member, ...]
    domains: Mapping[str, Contrast]
    moved: tuple[MovedDocument, ...] = ()

    @property
    def title(self) -> str:
        """What it is called."""
        return _title(self.anchor, self.members)


@dataclass(frozen=True, kw_only=True, slots=True)
class Passage:
    """The beginning of a domain's text, token by token with each expert's share, mean over layers."""

    domain: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One line of how it was measured."""

    name: str
    value: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Everything that a report shows. What was not measured is empty or None.

    Attributes:
        kind: anchor, expert or merged.
        anchor: The anchor's name.
        model_type: The anchor's family.
        digest: The model's.
        license: What the model as a whole is under; None is unknown.
        num_experts_per_tok: Experts active for a token.
        members: Experts, the public one first.
        removed: Experts whose removal the model records.
        domains: Domain -> this model's figures.
        tasks: Task -> this model's figures.
        alone: What the public expert alone, that is the anchor, scores.
        routing: Domain -> expert -> share of the kept probability, mean over targets and layers.
        routing_layers: Domain -> expert -> the same, a layer each.
        ablation: Expert left out -> what is scored without it.
        top_k: Experts active for a token -> what is scored then.
        baselines: Simpler way -> what it scores.
        other: Another model to stand beside.
        passages: Sample texts.
        settings: How it was measured.
    """

    kind: str
    anchor: str
    model_type: str
    digest: str
    license: str | None
    num_experts_per_tok: int
    members: tuple[Member, ...]
    removed: tuple[Tombstone, ...] = ()
    domains: Mapping[str, DomainFigures]
    tasks: Mapping[str, TaskFigures] = field(default_factory=dict)
    alone: Shifts | None = None
    routing: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    routing_layers: Mapping[str, Mapping[str, list[float]]] = field(default_factory=dict)
    ablation: Mapping[str, Shifts] = field(default_factory=dict)
    top_k: Mapping[int, Shifts] = field(default_factory=dict)
    baselines: Mapping[str, Shifts] = field(default_factory=dict)
    other: Other | None = None
    passages: tuple[Passage, ...] = ()
    settings: tuple[Setting, ...] = ()

    @property
    def experts(self) -> list[str]:
        """Names of all experts, the public one first."""
        return [member.name for member in self.members]

    @property
    def closed(self) -> list[str]:
        """Names of the closed experts that took part."""
        return [member.name for member in self.members if member.name != PUBLIC and not member.left_out]

    @property
    def title(self) -> str:
        """What the model is called."""
        return _title(self.anchor, self.members)


def _title(anchor: str, members: Sequence[Member]) -> str:
    names = [member.name for member in members if member.name != PUBLIC]
    shown = ", ".join(names) if len(names) <= _NAMED else f"{len(names)} experts"
    return f"{anchor} with {shown}" if names else f"{anchor} alone"
