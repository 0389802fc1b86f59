"""What a report shows: plain frozen values. Everything on the page follows from one ``Report``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from flexctl.bundle.manifest import Tombstone
from flexctl.bundle.names import PUBLIC
from flexctl.evaluation.explaining import Piece

__all__ = ["DomainFigures", "Estimate", "Member", "Passage", "Report", "Setting", "Shift", "Shifts"]

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
        alone: What the public expert alone, that is the anchor, scores.
        routing: Domain -> expert -> share of the kept probability, mean over targets and layers.
        routing_layers: Domain -> expert -> the same, a layer each.
        ablation: Expert left out -> what is scored without it.
        top_k: Experts active for a token -> what is scored then.
        baselines: Simpler way -> what it scores.
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
    alone: Shifts | None = None
    routing: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    routing_layers: Mapping[str, Mapping[str, list[float]]] = field(default_factory=dict)
    ablation: Mapping[str, Shifts] = field(default_factory=dict)
    top_k: Mapping[int, Shifts] = field(default_factory=dict)
    baselines: Mapping[str, Shifts] = field(default_factory=dict)
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
        names = [name for name in self.experts if name != PUBLIC]
        shown = ", ".join(names) if len(names) <= _NAMED else f"{len(names)} experts"
        return f"{self.anchor} with {shown}" if names else f"{self.anchor} alone"
