"""Looking at experts from outside before they are taken: what their bytes say, and what they do to text.

What neither sees is in docs/security.md, section 6: an expert that behaves on all text that it is tried on.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from flexctl import evaluation, model, text
from flexctl.bundle import Anchor, open_anchor
from flexctl.bundle.composed import composed_weights
from flexctl.bundle.composition import Composition
from flexctl.bundle.names import and_more
from flexctl.bundle.plausible import implausible_sizes, sizes_of
from flexctl.errors import BundleError, UsageError
from flexctl.evaluation.figures import Estimate
from flexctl.runtime import Parts, Reporter
from flexctl.steps.machine import MachineConfig, machine_of
from flexctl.steps.overlap import public_shares
from flexctl.trust.signing import Trust, is_signed

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "Admission",
    "ScreenConfig",
    "admit",
    "anchor_at_hand",
    "domains_of",
    "look_at",
    "refuse_implausible",
    "screen",
    "untrusted",
]

Admission = Mapping[str, Mapping[str, Estimate]]
"""Domain -> expert -> by how many bits per byte the domain is worse with it, with a 95 % interval."""

MOST_SHARE = 0.9
"""Share of the router's probability on public text from which an expert takes nearly all of it."""

MOST_COST = 0.25
"""Nats a token that public text may cost more with an expert than without it."""

_PUBLIC_TOKENS = 4096

_PUBLIC_BATCH_TOKENS = 1024
"""That go through the model together: public documents are short and of unlike length, so large batches are padding."""


class ScreenConfig(MachineConfig, Protocol):
    """What a command's Config says about looking at experts."""

    @property
    def screen(self) -> bool:
        """Whether each is tried on public text."""

    @property
    def accept(self) -> tuple[str, ...]:
        """Who is taken whatever is found."""

    @property
    def admit(self) -> bool:
        """Whether one that makes a domain worse is refused."""

    @property
    def data(self) -> tuple[str, ...]:
        """The domains."""

    @property
    def text_field(self) -> str:
        """The column or field that holds the text."""

    @property
    def special_as_text(self) -> bool:
        """Whether special tokens that stand in the text are plain text."""

    @property
    def seq_len(self) -> int | None:
        """Window length."""

    @property
    def forward_tokens(self) -> int:
        """Tokens that go through the model together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Trial:
    """A model that is not written yet."""

    model: nn.Module
    names: list[str]
    top_k: int
    seq_len: int
    batch_tokens: int

    def without(self, left_out: Collection[str]) -> nn.Module:
        """Return the model with experts left out, until the next call."""
        model.set_top_k(self.model, min(self.top_k, len(self.names) - len(left_out)))
        model.exclude(self.model, [self.names.index(name) for name in left_out])
        return self.model


def anchor_at_hand(path: Path, composition: Composition) -> Anchor | None:
    """Return the experts' anchor; None where the directory holds none, or another, or one that is not calibrated."""
    if not path.is_dir() or (anchor := open_anchor(path)).digest != composition.anchor.digest:
        return None
    return anchor if anchor.is_calibrated else None


def look_at(
    composition: Composition,
    new: Sequence[str],
    anchor: Anchor | None,
    trust: Trust | None,
    config: ScreenConfig,
    reporter: Reporter,
) -> dict[str, dict[str, float]]:
    """Refuse new experts that are not as experts are, and return what those that were tried do to public text.

    Bytes and rows are looked at where no trusted key has signed. Tried on public text are all where that is asked for,
    else those, as far as it was said whom to trust and the anchor is at hand.

    Args:
        composition: What they are to be part of.
        new: Whom to look at.
        anchor: As from ``anchor_at_hand``.
        trust: Whom to trust; None is nobody in particular.
        config: What is asked for, and who is accepted.
        reporter: Hears of progress, and of what is found in those who are accepted.

    Raises:
        UsageError: Somebody is accepted who is not there, or the anchor is not at hand.
        BundleError: One is refused; the message says why.
    """
    strangers = untrusted(composition, new, trust)
    refuse_implausible(composition, strangers, anchor, config, reporter)
    tried = new if config.screen else strangers if trust and anchor else []
    return screen(composition, tried, anchor, config, reporter)


def untrusted(composition: Composition, new: Collection[str], trust: Trust | None) -> list[str]:
    """Return those of the new experts that no trusted key has signed."""
    parts = [part for part in composition.parts[1:] if part.entry.name in new]
    return [part.entry.name for part in parts if trust is None or not is_signed(part, trust)]


def refuse_implausible(
    composition: Composition, names: Collection[str], anchor: Anchor | None, config: ScreenConfig, reporter: Reporter
) -> None:
    """Refuse experts whose matrices are out of proportion, or whose rows take nearly all public text; runs no model.

    Args:
        composition: What they are to be part of.
        names: Whom to look at.
        anchor: The anchor, whose router space tells what rows take; None leaves rows unseen.
        config: Who is accepted.
        reporter: Hears of what is found in those.

    Raises:
        UsageError: Somebody is accepted who is not there.
        BundleError: One is refused; the message says why.
    """
    for name in config.accept:
        if name not in (part.entry.name for part in composition.parts[1:]):
            raise UsageError(f"there is no expert {name!r} to accept", field="accept")
    rows = {name: row for name, row in composition.closed_rows().items() if name in names}
    shares = public_shares(anchor, rows) if anchor is not None and rows else {}
    public = sizes_of(composition.parts[0]) if names else {}
    for part in composition.parts[1:]:
        name = part.entry.name
        if name not in names:
            continue
        found = list(implausible_sizes(part, public))
        if shares.get(name, 0.0) >= MOST_SHARE:
            found.append(f"by its rows it takes {shares[name]:.0%} of public text")
        _refuse(part.source, name, found, config, reporter)


def screen(
    composition: Composition, names: Sequence[str], anchor: Anchor | None, config: ScreenConfig, reporter: Reporter
) -> dict[str, dict[str, float]]:
    """Try experts on the anchor's public sample, each against the model without it, and refuse those that ruin it.

    Args:
        composition: What they are to be part of.
        names: Whom to try.
        anchor: The anchor, whose sample it is.
        config: What to run on, and who is accepted.
        reporter: Hears of progress.

    Returns:
        Expert -> its ``public_share`` of the router's probability and its ``public_cost``, nats a token.

    Raises:
        UsageError: The anchor is not at hand.
        BundleError: One is refused; the message says why.
    """
    if not names:
        return {}
    if anchor is None:
        raise UsageError("needs the anchor's public sample", hint="give `anchor`", field="screen")
    sample = text.PublicSample.from_tensors(anchor.public_sample())
    documents = text.leading(sample.held_out, _PUBLIC_TOKENS)
    trial, parts = _trial(composition, config), Parts(reporter)
    ways = [[], *([name] for name in names), *([list(names)] if len(names) > 1 else [])]
    parts.expect(len(ways) * _windows(documents, trial))
    scores = [_on_public(trial, documents, way, parts) for way in ways]
    whole, alone = scores[0], dict(zip(names, scores[1:], strict=False))
    shares = dict(zip(trial.names, whole.routing(), strict=True))
    figures = {name: {"public_share": shares[name], "public_cost": whole.nll - alone[name].nll} for name in names}
    sources = {part.entry.name: part.source for part in composition.parts}
    ruins = {name: list(_ruins(found)) for name, found in figures.items()}
    together = whole.nll - scores[-1].nll
    if not any(ruins.values()) and not together <= MOST_COST:
        for name in ruins:
            others = ", ".join(other for other in names if other != name)
            ruins[name] = [f"with {others} it costs public text {together:.3g} nats a token"]
    for name, found in ruins.items():
        _refuse(sources[name], name, found, config, reporter)
    return figures


def domains_of(config: ScreenConfig) -> list[evaluation.Domain]:
    """Return the domains that experts must not make worse, after refusing settings that cannot be scored with.

    Raises:
        UsageError: There are none, or there is no text.
    """
    if config.admit and not config.data:
        raise UsageError("needs text to try experts on", hint="add `data`", field="admit")
    if not config.data:
        return []
    machine_of(config)
    return evaluation.parse_domains(config.data, config.text_field)


def admit(
    composition: Composition,
    names: Sequence[str],
    domains: Sequence[evaluation.Domain],
    config: ScreenConfig,
    reporter: Reporter,
    *,
    before: Composition | None = None,
) -> Admission:
    """Score domains with and without each expert; where that is asked for, refuse those that make one worse, clearly.

    Args:
        composition: What they are to be part of.
        names: Whom to try.
        domains: Test text.
        config: What to run on, and who is accepted.
        reporter: Hears of progress.
        before: What a replaced expert is held against; None is the model without it.

    Returns:
        Domain -> expert -> the change, above 0 where the domain is worse with it.

    Raises:
        UsageError: There is no text.
        BundleError: One is refused; the message names the domain.
    """
    parts = Parts(reporter)
    ways: list[list[str]] = [[], *([name] for name in names)] if before is None else [[]]
    parts.expect((len(ways) + (before is not None)) * sum(domain.size_bytes() for domain in domains))
    tokenizer = model.load_tokenizer(_tokenizer_folder(composition), special_as_text=config.special_as_text)
    trial = _trial(composition, config)
    drawn = [{domain.name: _drawn(trial, tokenizer, domain, way, parts) for domain in domains} for way in ways]
    if before is not None:
        trial = _trial(before, config)
        old = {domain.name: _drawn(trial, tokenizer, domain, [], parts) for domain in domains}
        drawn += [old for _ in names]
    changes = {
        domain.name: {
            name: drawn[0][domain.name].above(other[domain.name]) for name, other in zip(names, drawn[1:], strict=True)
        }
        for domain in domains
    }
    sources = {part.entry.name: part.source for part in composition.parts}
    for name in names if config.admit else ():
        worse = [
            f"it makes {domain} worse by {change[name].value:.3f} bits per byte"
            f" ({change[name].low:.3f} to {change[name].high:.3f})"
            for domain, change in changes.items()
            if change[name].is_above()
        ]
        _refuse(sources[name], name, worse, config, reporter)
    return changes


def _trial(composition: Composition, config: ScreenConfig) -> _Trial:
    weights = composed_weights(composition)
    return _Trial(
        model=machine_of(config, weights.shared).build(weights),
        names=list(weights.experts),
        top_k=weights.num_experts_per_tok,
        seq_len=evaluation.window_length(weights.dense_config, config.seq_len),
        batch_tokens=config.forward_tokens,
    )


def _on_public(
    trial: _Trial, documents: Sequence[text.Framed], without: Sequence[str], reporter: Reporter
) -> evaluation.Score:
    title = f"public text without {', '.join(without)}" if without else "public text with all"
    with reporter.progress(title, _windows(documents, trial), "windows") as bar:
        return evaluation.score_documents(
            trial.without(without),
            documents,
            seq_len=trial.seq_len,
            batch_tokens=min(trial.batch_tokens, _PUBLIC_BATCH_TOKENS),
            scored=lambda windows, _: bar.advance(windows),
        )


def _windows(documents: Sequence[text.Framed], trial: _Trial) -> int:
    return sum(-(-(len(document.tokens) - 1) // trial.seq_len) for document in documents)


def _drawn(
    trial: _Trial, tokenizer: object, domain: evaluation.Domain, without: Sequence[str], reporter: Reporter
) -> evaluation.Resampled:
    title = f"scoring {domain.name}{f' without {without[0]}' if without else ''}"
    score = evaluation.score_domain(
        trial.without(without),
        tokenizer,
        domain,
        seq_len=trial.seq_len,
        batch_tokens=trial.batch_tokens,
        reporter=reporter,
        title=title,
    )
    return evaluation.resample(score.per_document)


def _ruins(figures: Mapping[str, float]) -> Iterator[str]:
    if not figures["public_share"] < MOST_SHARE:
        yield f"it takes {figures['public_share']:.0%} of public text"
    if not figures["public_cost"] <= MOST_COST:
        yield f"it costs public text {figures['public_cost']:.3g} nats a token"


def _refuse(source: Path, name: str, found: Sequence[str], config: ScreenConfig, reporter: Reporter) -> None:
    """Refuse an expert for the first thing that was found, or say it where the expert is accepted."""
    if not found:
        return
    more = and_more(len(found))
    said = f"{source}: expert {name}: {found[0]}{more}"
    if name in config.accept:
        reporter.warn(f"{said}; accepted")
        return
    raise BundleError(said, hint=f"`accept` {name} takes it all the same")


def _tokenizer_folder(composition: Composition) -> Path:
    return next(iter(composition.stock.values()))[0].parent
