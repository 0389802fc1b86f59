"""Merge an anchor and experts into one mixture-of-experts model that stock software loads."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from flexctl import flags, workspace
from flexctl.bundle.anchor import open_anchor
from flexctl.bundle.composition import Composition, compose_anchor, compose_merged
from flexctl.bundle.expert import open_expert
from flexctl.bundle.manifest import OTHER_LICENSE
from flexctl.bundle.store import check_directory_target
from flexctl.errors import BundleError
from flexctl.evaluation.figures import Estimate
from flexctl.hub import is_remote
from flexctl.options import MODEL, Config, argument, flag
from flexctl.routing.overlap import Routing
from flexctl.runtime import SILENT, Reporter, peak_rss_bytes
from flexctl.steps.change import assemble, open_to_change, place_of_change, warn_of_tuned
from flexctl.steps.claims import refuse_false_claims
from flexctl.steps.overlap import expected_between, warn_of_overlaps
from flexctl.steps.screening import admit, anchor_at_hand, domains_of, look_at
from flexctl.steps.sources import localise
from flexctl.steps.trusting import refuse_untrusted, trust_of

__all__ = ["MergeConfig", "MergeResult", "MergedExpert", "merge"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeConfig(Config):
    """What to merge.

    No training: bytes are copied and checked against each owner's manifest. The same set gives the same
    bytes in whatever order. A merged model as first argument is added to; no expert at all gives the
    anchor alone.

    Experts whose size or rows are out of proportion, or whose own figures refute their privacy claim, are refused.
    With `trust`, those that no trusted key has signed are tried on public text as well, as `screen` does for all;
    `admit` tries them on your own.

    Examples:
        flexctl merge experts/*.st
        flexctl merge merged experts/news.st -o merged-2
        flexctl merge experts/*.st --require-signed --trust trust.toml
        flexctl merge merged news.st -o merged-2 --screen --admit --data law=tests/law
    """

    experts: Annotated[
        tuple[Path, ...],
        argument("EXPERT", "Expert files (.st), or hf://OWNER/NAME; the first may be a merged model."),
    ] = ()
    output: Annotated[
        Path | None,
        flags.output("DIR", "Where to write (default: the merged model that is added to, or the workspace's)."),
    ] = None
    anchor: flags.Anchor = None
    top_k: Annotated[
        int | None,
        flag("K", "Experts active for a token (default: those of the model added to, or 4).", MODEL, above=0),
    ] = None
    overwrite: flags.Overwrite = False
    dry_run: flags.DryRun = False
    trust: flags.Trust = None
    require_signed: flags.RequireSigned = False
    screen: flags.Screen = False
    admit: flags.Admit = False
    accept: flags.Accept = ()
    data: flags.Domains = ()
    text_field: flags.TextField = "text"
    special_as_text: flags.SpecialAsText = False
    seq_len: flags.SeqLen = None
    forward_tokens: flags.ForwardTokens = 8192
    threads: flags.Threads = None
    device: flags.Device = "auto"
    dtype: flags.Dtype = "auto"
    allow_expired: flags.AllowExpired = False
    trust_cache: flags.TrustCache = False


@dataclass(frozen=True, kw_only=True, slots=True)
class MergedExpert:
    """An expert in a merged model, and its place there."""

    name: str
    index: int
    digest: str


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeResult:
    """What was written.

    Attributes:
        path: Directory of the merged model.
        digest: Its digest; None after a dry run.
        num_experts: Including the public one.
        num_experts_per_tok: As config.json has it: clamped to num_experts.
        experts: ``public`` first, then by name.
        license: What all inputs share, else ``other``.
        bytes_written: Bytes copied or made; what shares blocks with the experts' files does not count. After a dry
            run, what the weights would take.
        expected_routing: Text of whom -> expert -> share of the router's probability that is expected, from router
            rows alone; None where the anchor is not at hand, or was adopted without public text.
        peak_rss_bytes: The process's largest resident size.
        dry_run: Whether nothing was written.
        screening: Expert -> what it does to public text: its public_share of the router's probability, and its
            public_cost in nats a token; empty where none was tried.
        admission: Domain -> expert -> by how many bits per byte the domain is worse with it; empty without data.
    """

    path: Path
    digest: str | None
    num_experts: int
    num_experts_per_tok: int
    experts: tuple[MergedExpert, ...]
    license: str
    bytes_written: int
    expected_routing: Routing | None
    peak_rss_bytes: int
    dry_run: bool
    screening: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    admission: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)


def merge(config: MergeConfig, reporter: Reporter = SILENT, *, today: datetime.date | None = None) -> MergeResult:
    """Merge experts; the same set gives the same bytes, in whatever order and by whatever steps.

    Args:
        config: What to merge.
        reporter: Where progress and warnings go.
        today: The day that rights are compared with; the real one if None.

    Raises:
        UsageError: The target exists and may not be replaced, or a setting is out of range.
        BundleError: A bundle is invalid, does not fit, has expired, or its bytes are not those of its manifest.
    """
    domains = domains_of(config)
    composition, base, new = _compose(config, reporter)
    target, overwrite = config.output or workspace.find().merged, config.overwrite
    # A merged model on the Hub is added to here, not in the cache that it was fetched into.
    if base is not None and not is_remote(config.experts[0]):
        target, replaces_own = place_of_change(base, config.output)
        overwrite = overwrite or replaces_own
    if not config.allow_expired:
        composition.refuse_expired(today or datetime.date.today())
    trust = trust_of(config, today)
    refuse_untrusted(config, composition, trust)
    refuse_false_claims(composition, new)
    _warn(composition, config, reporter)
    check_directory_target(target, kind="merged", overwrite=overwrite)
    own = localise(config.anchor, reporter) if config.anchor else workspace.find().anchor
    anchor = anchor_at_hand(own, composition)
    screening = look_at(composition, new, anchor, trust, config, reporter)
    routing = None if anchor is None else expected_between(anchor, composition.closed_rows())
    warn_of_overlaps(routing or {}, reporter)
    admission = admit(composition, new, domains, config, reporter) if domains else {}
    digest, written = assemble(
        target,
        composition,
        overwrite=overwrite,
        trust_cache=config.trust_cache,
        dry_run=config.dry_run,
        reporter=reporter,
    )
    return MergeResult(
        path=target,
        digest=digest,
        num_experts=len(composition.parts),
        num_experts_per_tok=min(composition.top_k, len(composition.parts)),
        experts=tuple(
            MergedExpert(name=part.entry.name, index=index, digest=part.entry.digest)
            for index, part in enumerate(composition.parts)
        ),
        license=composition.license,
        bytes_written=written,
        expected_routing=routing,
        peak_rss_bytes=peak_rss_bytes(),
        dry_run=config.dry_run,
        screening=screening,
        admission=admission,
    )


def _compose(config: MergeConfig, reporter: Reporter) -> tuple[Composition, Path | None, list[str]]:
    """Return what to write, the merged model that is added to, if there is one, and who is added."""
    files, base = tuple(localise(file, reporter) for file in config.experts), None
    anchor = config.anchor and localise(config.anchor, reporter)
    if files and files[0].is_dir():
        base, *rest = files
        files = tuple(rest)
        composition = _compose_base(base, anchor, config, reporter)
    else:
        composition = compose_anchor(open_anchor(anchor or workspace.find().anchor))
    experts = [open_expert(file) for file in files]
    composition = composition.adding(experts)
    new = sorted(expert.manifest.name for expert in experts)
    return replace(composition, top_k=config.top_k or composition.top_k), base, new


def _compose_base(base: Path, anchor: Path | None, config: MergeConfig, reporter: Reporter) -> Composition:
    merged = open_to_change(base, dry_run=config.dry_run)
    expected = merged.manifest.anchor
    if anchor is not None and (found := open_anchor(anchor).digest) != expected.digest:
        raise BundleError(f"{anchor}: digest is {found}; {base} was made of {expected.digest} ({expected.name})")
    warn_of_tuned(merged, reporter)
    return compose_merged(merged)


def _warn(composition: Composition, config: MergeConfig, reporter: Reporter) -> None:
    count = len(composition.parts)
    if config.top_k is not None and config.top_k > count:
        reporter.warn(f"`top_k` {config.top_k} is more than there are experts: {count} are used")
    if all(part.entry.license is None for part in composition.parts):
        reporter.note("license: unknown, as the inputs' are")
    elif composition.license == OTHER_LICENSE:
        listed = ", ".join(f"{part.entry.name}: {part.entry.license or 'unknown'}" for part in composition.parts)
        reporter.warn(f"the inputs have no license in common ({listed}); the merged model's is 'other'")
    for conflict in (found := composition.license_conflicts())[:1]:
        more = f" (and {len(found) - 1} more: flexctl check-rights)" if len(found) > 1 else ""
        reporter.warn(f"licenses that may not go together: {conflict}{more}")
