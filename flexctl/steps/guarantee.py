"""What a guarantee of differential privacy is to be, from a command's settings alone: no document is read for it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from flexctl import flags, privacy
from flexctl.bundle import Anchor, PrivacyInfo
from flexctl.errors import UsageError
from flexctl.steps.expert_run import ExpertConfig, budget_of
from flexctl.steps.router_rows import names_a_file

__all__ = ["Plan", "PrivateConfig", "planned"]

_PASSES = 20.0
_BATCHES, _LARGEST_BATCH = 8, 256
_ROW_SHARE = 0.25
_ALONE = ("dp_delta", "dp_documents", "dp_max_grad_norm", "dp_noise_multiplier", "dp_row_epsilon")


class PrivateConfig(ExpertConfig, Protocol):
    """What ``train_expert``'s Config says of a run under a guarantee, beside what any run goes by."""

    @property
    def decontaminate(self) -> tuple[Path, ...]:
        """Test text that must not be trained on."""

    @property
    def dtype(self) -> str:
        """Of the model, for the manifest."""

    @property
    def dp_epsilon(self) -> float | None:
        """The bound; None is no guarantee."""

    @property
    def dp_delta(self) -> float | None:
        """How likely it may fail."""

    @property
    def dp_documents(self) -> int | None:
        """How many documents there are, in public."""

    @property
    def dp_max_grad_norm(self) -> float | None:
        """Clip of a document's gradient."""

    @property
    def dp_noise_multiplier(self) -> float | None:
        """Noise of a step, in clips."""

    @property
    def dp_row_epsilon(self) -> float | None:
        """Epsilon of router rows by themselves."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A run's guarantee and the settings behind it, none of which depends on a document.

    Attributes:
        documents: How many there are, as the owner says in public.
        delta: The guarantee's.
        mechanism: What epsilon is a function of.
        batch_size: Documents expected in a step.
        seq_len: Targets of a document at most.
        micro_batch: Documents that go through the model at once.
        public_batch: Public sequences of a step.
        lr: Peak learning rate.
    """

    documents: int
    delta: float
    mechanism: privacy.Mechanism
    batch_size: int
    seq_len: int
    micro_batch: int
    public_batch: int
    lr: float

    @property
    def epsilon(self) -> float:
        """What the mechanism spends."""
        epsilon: float = privacy.spent(self.mechanism, self.delta)
        return epsilon

    def info(self, max_grad_norm: float) -> PrivacyInfo:
        """Return the claim for a manifest."""
        return PrivacyInfo(
            mechanism=privacy.MECHANISM,
            epsilon=self.epsilon,
            delta=self.delta,
            unit=privacy.UNIT,
            accountant=privacy.ACCOUNTANT,
            noise_multiplier=self.mechanism.noise_multiplier,
            sampling_rate=self.mechanism.sampling_rate,
            steps=self.mechanism.steps,
            max_grad_norm=max_grad_norm,
            adjacency=privacy.ADJACENCY,
            row_noise_multiplier=self.mechanism.row_noise_multiplier,
        )

    def __str__(self) -> str:
        """Say it in one line."""
        mechanism = self.mechanism
        return (
            f"differential privacy: epsilon {self.epsilon:g}, delta {self.delta:g} for a document; {mechanism.steps} "
            f"steps of about {self.batch_size} of {self.documents} documents, noise {mechanism.noise_multiplier:g} "
            f"times the clip, {mechanism.row_noise_multiplier:g} times for router rows"
        )


def planned(config: PrivateConfig, anchor: Anchor) -> Plan | None:
    """Return the guarantee that is asked for; None where none is.

    Raises:
        UsageError: A setting is missing, would give away what no noise covers, or cannot be kept.
    """
    epsilon, delta, documents = config.dp_epsilon, config.dp_delta, config.dp_documents
    if epsilon is None:
        for name in _ALONE:
            if getattr(config, name) is not None:
                raise UsageError("there is no guarantee to which it belongs", hint="add `dp_epsilon`", field=name)
        return None
    if delta is None or documents is None:
        name = "dp_delta" if delta is None else "dp_documents"
        hint = "a tenth of 1 / documents, or less" if delta is None else "about as many as there are, as you may tell"
        raise UsageError(f"needs `{name}` beside it", hint=f"add `{name}`: {hint}", field="dp_epsilon")
    if not privacy.is_installed():
        raise UsageError(
            "dp-accounting and cryptography are not installed",
            hint="pip install 'flexctl[privacy]'",
            field="dp_epsilon",
        )
    if delta >= 1 / documents:
        raise UsageError(
            f"{delta:g} is not below 1 / `dp_documents` ({1 / documents:g}): giving one document away would keep it",
            hint="a tenth of that, or less",
            field="dp_delta",
        )
    if config.recompute:
        raise UsageError("changes nothing of a run with `dp_epsilon`", hint="leave it out", field="recompute")
    _refuse_leaks(config)
    return _plan(config, anchor, epsilon, delta, documents)


def _refuse_leaks(config: PrivateConfig) -> None:
    """Refuse what would tell of documents outside what is counted."""
    if config.max_tokens is not None:
        raise UsageError(
            "counts the owner's tokens, which a guarantee may not",
            hint="give `max_steps` or `epochs`",
            field="max_tokens",
        )
    if names_a_file(config.router) or config.router == "encoder":
        raise UsageError(
            f"{config.router}: such rows were made from documents without noise",
            hint="use discriminant or hidden, which get noise here",
            field="router",
        )
    if config.own_covariance not in (0.0, flags.OWN_COVARIANCE):
        raise UsageError(
            f"{config.own_covariance}: under a guarantee the covariance is public text's alone",
            hint="leave it out",
            field="own_covariance",
        )
    if config.near_duplicates:
        raise UsageError("counts the owner's documents, which a guarantee may not", field="near_duplicates")
    if config.token_cache is not None:
        raise UsageError(
            f"{config.token_cache}: a run under a guarantee leaves nothing that depends on the text",
            hint="leave it out",
            field="token_cache",
        )
    _refuse_own_text(config, [config.public] if config.public else [], "public", "public text gets no noise")
    _refuse_own_text(
        config, config.decontaminate, "decontaminate", "one document would then decide whether others are trained on"
    )


def _refuse_own_text(config: PrivateConfig, paths: Iterable[Path], field: str, why: str) -> None:
    ours = [path.resolve() for path in config.data]
    for path in paths:
        if any(_overlap(path.resolve(), own) for own in ours):
            raise UsageError(f"{path}: is the owner's text too", hint=why, field=field)


def _overlap(one: Path, other: Path) -> bool:
    return one == other or one in other.parents or other in one.parents


def _plan(config: PrivateConfig, anchor: Anchor, epsilon: float, delta: float, documents: int) -> Plan:
    budget = budget_of(
        config,
        available_tokens=documents,
        hidden_size=anchor.manifest.architecture.hidden_size,
        longest=anchor.config.get("max_position_embeddings"),
    )
    default = min(max(1, documents // _BATCHES), _LARGEST_BATCH)
    size = budget.batch_size if config.batch_tokens is not None else default
    if size > documents:
        raise UsageError(
            f"makes steps of {size} documents of {budget.seq_len} tokens, and there are {documents}",
            hint="give a lower `batch_tokens`",
            field="batch_tokens",
        )
    steps = config.max_steps or max(1, round((config.epochs or _PASSES) * documents / size))
    sampling: dict[str, Any] = {"sampling_rate": size / documents, "steps": steps}
    rows = privacy.gaussian_noise(config.dp_row_epsilon or epsilon * _ROW_SHARE, delta)
    noise = config.dp_noise_multiplier or privacy.least_noise(epsilon, delta, row_noise_multiplier=rows, **sampling)
    plan = Plan(
        documents=documents,
        delta=delta,
        mechanism=privacy.Mechanism(noise_multiplier=noise, row_noise_multiplier=rows, **sampling),
        batch_size=size,
        seq_len=budget.seq_len,
        micro_batch=min(budget.micro_batch, size),
        public_batch=max(1, min(budget.micro_batch, round(size * config.public_mix / (1 - config.public_mix)))),
        lr=budget.lr,
    )
    if plan.epsilon > epsilon:
        raise UsageError(
            f"{noise:g} spends epsilon {plan.epsilon:g}, above `dp_epsilon` {epsilon:g}",
            hint="give more noise, fewer steps, or leave it out",
            field="dp_noise_multiplier",
        )
    return plan
