"""What runs that train an expert have in common, with a guarantee and without: settings, inputs and what comes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from flexctl import evaluation, model, text, training
from flexctl.bundle import PUBLIC, Anchor, PrivacyInfo, RouterInfo
from flexctl.errors import FlexctlError, UsageError
from flexctl.processes import World
from flexctl.runtime import Reporter, software_versions
from flexctl.steps.anchored import Anchored
from flexctl.steps.machine import Machine
from flexctl.steps.router_rows import RowConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = [
    "BudgetConfig",
    "ExpertConfig",
    "Inputs",
    "Told",
    "Trained",
    "budget_of",
    "losses_before",
    "public_sample",
    "refuse_moved",
    "settings_of",
]


class BudgetConfig(Protocol):
    """What ``train_expert``'s Config says of how long and how fast to train."""

    @property
    def public_mix(self) -> float:
        """Share of public text in a step."""

    @property
    def seq_len(self) -> int | None:
        """Targets a sequence, or of a document at most; None is the default. Likewise the next six."""

    @property
    def batch_tokens(self) -> int | None:
        """Tokens of a step."""

    @property
    def micro_batch(self) -> int | None:
        """Sequences in memory at once."""

    @property
    def max_tokens(self) -> int | None:
        """The owner's tokens at most; a guarantee has none."""

    @property
    def max_steps(self) -> int | None:
        """Steps at most."""

    @property
    def epochs(self) -> float | None:
        """Passes over the owner's text."""

    @property
    def lr(self) -> float | None:
        """Peak learning rate."""


class ExpertConfig(RowConfig, BudgetConfig, Protocol):
    """What ``train_expert``'s Config says of any run."""

    @property
    def data(self) -> tuple[Path, ...]:
        """The owner's text."""

    @property
    def text_field(self) -> str:
        """Column or field that holds it."""

    @property
    def near_duplicates(self) -> bool:
        """Whether documents that are nearly the same are counted; never under a guarantee."""

    @property
    def token_cache(self) -> Path | None:
        """Where tokens stay; nowhere under a guarantee."""

    @property
    def public(self) -> Path | None:
        """Public text in place of the anchor's sample."""

    @property
    def public_match(self) -> float:
        """Weight of the match."""

    @property
    def rank(self) -> int | None:
        """Of a low-rank expert; None is a full one."""

    @property
    def warmup_steps(self) -> int | None:
        """Steps of warm-up."""

    @property
    def recompute(self) -> bool:
        """Whether layers compute again on the way back."""

    @property
    def seed(self) -> int:
        """Of what is held out, and of the order of text."""

    @property
    def resume(self) -> bool:
        """Whether to go on."""

    @property
    def checkpoint_steps(self) -> int | None:
        """How often to leave a checkpoint; None for by time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """What a run is given beside its settings.

    Attributes:
        base: The anchor.
        public: Public text.
        decontamination: Test text; documents that share words with it are left out.
        machine: What models run on.
        work: The working folder.
        track: The log.
        reporter: Hears of progress.
        world: The processes that share the run; one, under a guarantee.
    """

    base: Anchored
    public: text.PublicSample
    decontamination: text.Decontamination
    machine: Machine
    work: Path
    track: training.Track
    reporter: Reporter
    world: World


@dataclass(frozen=True, kw_only=True, slots=True)
class Told:
    """What a run tells of the owner's text; under a guarantee nothing.

    Attributes:
        digest: Of the text.
        documents: Those to train on.
        num_bytes: Their UTF-8 bytes.
        num_tokens: Tokens in all of them.
        tokens: Trained on, in all steps.
        counts: Of documents by ``text.COUNTS``.
        final_loss: Mean training loss over the last steps, nats a token.
        tokens_per_s: Own and public tokens a second; None where no step was left to do.
    """

    digest: str | None = None
    documents: int | None = None
    num_bytes: int | None = None
    num_tokens: int | None = None
    tokens: int | None = None
    counts: dict[str, int | None] = field(default_factory=dict)
    final_loss: float | None = None
    tokens_per_s: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """What comes out of a run.

    Attributes:
        tensors: The expert's, rounded as they are stored, with its router rows; none in processes that do not write.
        router: How the rows came about.
        settings: Resolved ones, for the manifest.
        steps: Of training.
        public_tokens: Public tokens of all steps.
        held_out: {part of the text: {"before", "after"}}, nats a token on text that was not trained on.
        told: What is told of the owner's text.
        privacy: The guarantee, where there is one.
        kernels: Whose kernels ran parts of the steps, with version; None for torch's alone.
    """

    tensors: dict[str, Tensor]
    router: RouterInfo
    settings: dict[str, Any]
    steps: int
    public_tokens: int
    held_out: dict[str, dict[str, float]]
    told: Told = field(default_factory=Told)
    privacy: PrivacyInfo | None = None
    kernels: str | None = None


def budget_of(config: BudgetConfig, *, available_tokens: int, hidden_size: int, longest: int | None) -> training.Budget:
    """Return how long and how fast to train, every setting resolved.

    Args:
        config: What the user set.
        available_tokens: The owner's.
        hidden_size: The anchor's width.
        longest: Sequence that the anchor can hold, where its config says so.
    """
    return training.resolve_budget(
        available_tokens=available_tokens,
        epochs=config.epochs or 1.0,
        max_tokens=config.max_tokens,
        public_mix=config.public_mix,
        seq_len=config.seq_len,
        batch_tokens=config.batch_tokens,
        micro_batch=config.micro_batch,
        lr=config.lr,
        hidden_size=hidden_size,
        max_position_embeddings=longest,
    )


def settings_of(
    config: ExpertConfig, loop: training.LoopSettings, *, seq_len: int, batch_size: int, dtype: str
) -> dict[str, Any]:
    """Return every resolved setting that decides the result, as manifests have them.

    Args:
        config: What the user set.
        loop: How the loop goes.
        seq_len: Targets a sequence.
        batch_size: Sequences of a step, or under a guarantee documents expected in one.
        dtype: Of matrix products.
    """
    return {
        "lr": loop.lr,
        "steps": loop.steps,
        "warmup_steps": loop.warmup_steps,
        "seq_len": seq_len,
        "batch_size": batch_size,
        "micro_batch": loop.micro_batch,
        "public_mix": config.public_mix,
        "public_match": config.public_match,
        "seed": config.seed,
        "dtype": dtype,
    }


def public_sample(
    config: ExpertConfig, base: Anchored, decontamination: text.Decontamination, reporter: Reporter
) -> text.PublicSample:
    """Return the public text to train with: the anchor's, or what ``public`` names, without what shares test text.

    Raises:
        UsageError: ``public`` cannot be read, or nothing of the text is left.
    """
    sample = base.sample
    if config.public is not None:
        documents = text.frame_documents(base.tokenizer, text.read_documents([config.public], config.text_field))
        sample = text.draw_sample(documents, base.anchor.public_sample()["tokens"].shape[0], config.seed)
    if not decontamination:
        return sample
    kept = [
        document
        for document, words in zip(sample.documents, sample.texts(base.tokenizer), strict=True)
        if not decontamination.shares(words)
    ]
    if not kept:
        raise UsageError("shares words with every document of public text", field="decontaminate")
    if count := len(sample.documents) - len(kept):
        reporter.note(f"{count} of {len(sample.documents)} public documents share words with `decontaminate`")
    return text.PublicSample(kept)


def losses_before(
    reader: nn.Module, held_out: Mapping[str, Sequence[text.Framed]], seq_len: int, given: Inputs
) -> dict[str, float]:
    """Return the anchor's loss on documents kept out of training, nats a token.

    That on public text is the same for every owner, so it is cached; an owner's own never is.

    Args:
        reader: The anchor.
        held_out: Documents by the name of what they are part of.
        seq_len: Window length.
        given: The anchor's digest, and what it runs on.
    """
    identity = {
        "held_out": given.base.anchor.digest,
        "text": text.PublicSample(held_out.get(PUBLIC, ())).digest,
        "lengths": [len(document.tokens) for document in held_out.get(PUBLIC, ())],
        "seq_len": seq_len,
        "processes": given.world.size,
        "machine": given.machine.identity,
        "software": software_versions(),
    }
    return evaluation.held_out_losses(
        reader,
        held_out,
        seq_len=seq_len,
        reporter=given.reporter,
        world=given.world,
        remembered={PUBLIC: identity},
    )


def refuse_moved(reader: nn.Module, anchor: Anchor, world: World) -> None:
    """Refuse what was trained where anything but the expert changed.

    Raises:
        FlexctlError: A frozen tensor is not the anchor's, bit for bit.
    """
    if moved := model.moved_tensors(reader, anchor.weights(), world):
        raise FlexctlError(f"{len(moved)} frozen tensors moved in training, {moved[0]} first; nothing was written")
