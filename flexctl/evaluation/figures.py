"""What an evaluation found: one set of plain frozen values, which --json, results.json, terminal and page show."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from flexctl.bundle.manifest import Tombstone
from flexctl.bundle.names import PUBLIC

__all__ = [
    "Comparison",
    "DomainComparison",
    "DomainScore",
    "Estimate",
    "Figures",
    "Lineage",
    "Member",
    "Moved",
    "Settings",
    "TaskScore",
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

    def is_above(self, value: float = 0.0) -> bool:
        """Whether all of its interval is above ``value``."""
        return self.low is not None and self.low > value

    def is_below(self, value: float = 0.0) -> bool:
        """Whether all of its interval is below ``value``."""
        return self.high is not None and self.high < value

    @property
    def is_clear(self) -> bool:
        """Whether it is a number whose interval leaves zero out, so that its sign is shown."""
        return math.isfinite(self.value) and self.has_interval and not self.crosses_zero


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One expert in a model, as its manifest tells.

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
class Lineage:
    """What a model is and who is in it.

    Attributes:
        kind: anchor, expert or merged.
        anchor: The anchor's name.
        model_type: The anchor's family.
        license: What the model as a whole is under; None is unknown.
        members: Experts, the public one first.
        removed: Experts whose removal the model records.
    """

    kind: str
    anchor: str
    model_type: str
    license: str | None
    members: tuple[Member, ...]
    removed: tuple[Tombstone, ...] = ()

    @property
    def closed(self) -> list[str]:
        """Names of the closed experts that took part."""
        return [member.name for member in self.members if member.name != PUBLIC and not member.left_out]

    @property
    def title(self) -> str:
        """What the model is called."""
        names = [member.name for member in self.members if member.name != PUBLIC]
        shown = ", ".join(names) if len(names) <= _NAMED else f"{len(names)} experts"
        return f"{self.anchor} with {shown}" if names else f"{self.anchor} alone"


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainScore:
    """Figures of one domain.

    Attributes:
        nll: Mean over targets, nats a token.
        perplexity: Its exponential.
        bits_per_byte: Total nll / ln 2 / UTF-8 bytes.
        bits_per_byte_low: Lower end of its 95 % interval over resampled documents; None for a single document.
        bits_per_byte_high: Upper end.
        tokens: Targets.
        bytes: UTF-8 bytes.
        documents: Documents.
    """

    nll: float
    perplexity: float
    bits_per_byte: float
    bits_per_byte_low: float | None
    bits_per_byte_high: float | None
    tokens: int
    bytes: int
    documents: int

    @property
    def estimate(self) -> Estimate:
        """Bits per byte with their interval."""
        return Estimate(value=self.bits_per_byte, low=self.bits_per_byte_low, high=self.bits_per_byte_high)


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskScore:
    """Figures of one task.

    Attributes:
        metrics: Name, as lm-evaluation-harness calls it -> value.
        stderr: Name -> standard error, for metrics that are means over items.
        items: Items that were scored.
        shots: Solved examples in each prompt.
        digest: Of the task's file and all that it refers to.
        intervals: Name -> value and 95 % interval over items, for metrics that are means over them.
        chance: Name -> what guessing gets, where the items say.
    """

    metrics: dict[str, float]
    stderr: dict[str, float]
    items: int
    shots: int
    digest: str
    intervals: dict[str, Estimate] = field(default_factory=dict)
    chance: dict[str, float] = field(default_factory=dict)

    def estimate(self, metric: str) -> Estimate:
        """Return a metric, with its interval where it has one."""
        return self.intervals.get(metric, Estimate(value=self.metrics[metric]))

    @property
    def main(self) -> str | None:
        """The first metric that is a share with an interval, to stand for the task; None where there is none."""
        shares = (name for name in self.metrics if name in self.intervals and 0 <= self.metrics[name] <= 1)
        return next(shares, None)


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainComparison:
    """One domain for two models; every difference is this model's bits per byte, the other's taken off.

    Attributes:
        bits_per_byte: The other model's.
        difference: Below zero where this model is the better one.
        difference_low: Lower end of the 95 % interval; None for a single document.
        difference_high: Upper end.
        documents_better: On which this model needs fewer bits.
        documents_worse: On which it needs more.
    """

    bits_per_byte: float
    difference: float
    difference_low: float | None
    difference_high: float | None
    documents_better: int
    documents_worse: int

    @property
    def change(self) -> Estimate:
        """The difference with its interval."""
        return Estimate(value=self.difference, low=self.difference_low, high=self.difference_high)


@dataclass(frozen=True, kw_only=True, slots=True)
class Moved:
    """A document on which two models differ.

    Attributes:
        domain: Where it is.
        index: Its place there, from 0.
        words: Its first words; None in results.json, which holds no text.
        difference: In bits per byte.
    """

    domain: str
    index: int
    words: str | None = None
    difference: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A model beside another.

    Attributes:
        path: The other bundle; text for one on the Hub; None in results.json, which holds no path.
        digest: Its digest.
        lineage: What it is and who is in it.
        num_experts_per_tok: Experts that are active in it for a token.
        domains: A comparison a domain.
        moved: The documents that differ most, the furthest first.
    """

    path: Path | str | None = None
    digest: str
    lineage: Lineage
    num_experts_per_tok: int
    domains: dict[str, DomainComparison]
    moved: list[Moved]


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What decides figures beside model and text.

    Attributes:
        seq_len: Window length, tokens.
        device: cpu or cuda.
        dtype: Of the model's weights as it ran.
        special_as_text: Whether special tokens that stood in the text were read as plain text.
    """

    seq_len: int
    device: str
    dtype: str
    special_as_text: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """All that was found, and all that results.json holds. What was not measured is empty or None.

    A ``..._change`` is what another model scores minus what this one does, in bits per byte with its interval: above
    zero the other is worse.

    Attributes:
        digest: The bundle's.
        experts: Experts that were there, the public one first.
        without: Those left out.
        num_experts_per_tok: Experts active for a token.
        lineage: What the model is and who is in it.
        settings: What decides the figures beside model and text.
        perplexity: A score a domain.
        routing: Domain -> expert -> share of the kept probability, mean over targets and layers.
        routing_layers: Domain -> expert -> the same layer by layer.
        public_alone: Domain -> bits per byte of the public expert alone, which is the anchor; only for a page.
        public_alone_change: Domain -> its change.
        ablation: Expert left out -> domain -> bits per byte; empty unless asked for.
        ablation_change: Expert left out -> domain -> its change.
        top_k: Experts active -> domain -> bits per byte; empty unless asked for.
        top_k_change: Experts active -> domain -> its change.
        baselines: Baseline -> domain -> bits per byte.
        baselines_change: Baseline -> domain -> its change.
        compare: How it stands beside another model.
        tasks: A score a task.
        router_agreement: Domain -> how often a bfloat16 router keeps the same experts, mean over targets and layers;
            empty where all experts are active.
        post_norm_ratio: Mean square of each layer's feed-forward output over rms_norm_eps, the smallest over domains;
            only for families with a norm after the feed-forward network, where it must be far above 1 for the norm to
            absorb that kept probabilities do not add up to 1.
        data: Domain -> digest of its documents.
        software: Package -> version.
    """

    digest: str
    experts: list[str]
    without: list[str]
    num_experts_per_tok: int
    lineage: Lineage
    settings: Settings
    perplexity: dict[str, DomainScore] = field(default_factory=dict)
    routing: dict[str, dict[str, float]] = field(default_factory=dict)
    routing_layers: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    public_alone: dict[str, float] = field(default_factory=dict)
    public_alone_change: dict[str, Estimate] = field(default_factory=dict)
    ablation: dict[str, dict[str, float]] = field(default_factory=dict)
    ablation_change: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    top_k: dict[int, dict[str, float]] = field(default_factory=dict)
    top_k_change: dict[int, dict[str, Estimate]] = field(default_factory=dict)
    baselines: dict[str, dict[str, float]] = field(default_factory=dict)
    baselines_change: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    compare: Comparison | None = None
    tasks: dict[str, TaskScore] = field(default_factory=dict)
    router_agreement: dict[str, float] = field(default_factory=dict)
    post_norm_ratio: list[float] | None = None
    data: dict[str, str] = field(default_factory=dict)
    software: dict[str, str] = field(default_factory=dict)
