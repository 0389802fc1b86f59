"""Merge an anchor and experts into one mixture-of-experts model that stock software loads."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flexctl import workspace
from flexctl.bundle.anchor import open_anchor
from flexctl.bundle.assembly import assemble
from flexctl.bundle.composition import Composition, compose_anchor, compose_merged
from flexctl.bundle.expert import open_expert
from flexctl.bundle.manifest import OTHER_LICENSE
from flexctl.bundle.merged import open_merged
from flexctl.bundle.store import place_of_change
from flexctl.errors import BundleError, UsageError
from flexctl.hub import is_remote, localise
from flexctl.runtime import SILENT, Reporter, peak_rss_bytes

__all__ = ["MergeConfig", "MergeResult", "merge"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeConfig:
    """What to merge.

    Attributes:
        experts: Files of experts; a merged model's directory may stand first, and is added to. None at all gives
            the anchor alone. Each may be on the Hub: ``hf://owner/name``.
        anchor: Directory of the anchor, or where it is on the Hub; the workspace's if None. Not needed when adding
            to a merged model.
        output: Directory to write; if None the merged model that is added to, else the workspace's.
        top_k: num_experts_per_tok; if None what the merged model that is added to had, else 4.
        allow_expired: Take experts whose rights are over.
        overwrite: Replace a merged model that exists.
        dry_run: Check everything that headers and manifests tell, write nothing.
        trust_cache: Do not hash files that were hashed before and did not change since.
    """

    experts: tuple[Path, ...] = ()
    anchor: Path | None = None
    output: Path | None = None
    top_k: int | None = None
    allow_expired: bool = False
    overwrite: bool = False
    dry_run: bool = False
    trust_cache: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeResult:
    """What was written.

    Attributes:
        path: Directory of the merged model.
        digest: Its digest; None after a dry run.
        num_experts: Including the public one.
        num_experts_per_tok: As config.json has it: clamped to num_experts.
        experts: {name, index, digest} each, ``public`` first, then by name.
        license: What all inputs share, else ``other``.
        bytes_written: Bytes copied or made; after a dry run, what the weights would take.
        peak_rss_bytes: The process's largest resident size.
        dry_run: Whether nothing was written.
    """

    path: Path
    digest: str | None
    num_experts: int
    num_experts_per_tok: int
    experts: tuple[Mapping[str, Any], ...]
    license: str
    bytes_written: int
    peak_rss_bytes: int
    dry_run: bool


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
    if config.top_k is not None and config.top_k < 1:
        raise UsageError(f"--top-k: is {config.top_k}; expected at least 1")
    composition, base = _compose(config, reporter)
    target, overwrite = config.output or workspace.find().merged, config.overwrite
    # A merged model on the Hub is added to here, not in the cache that it was fetched into.
    if base is not None and not is_remote(config.experts[0]):
        target, replaces_own = place_of_change(base, config.output)
        overwrite = overwrite or replaces_own
    if not config.allow_expired:
        composition.refuse_expired(today or datetime.date.today())
    _warn(composition, config, reporter)
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
            {"name": part.entry.name, "index": index, "digest": part.entry.digest}
            for index, part in enumerate(composition.parts)
        ),
        license=composition.license,
        bytes_written=written,
        peak_rss_bytes=peak_rss_bytes(),
        dry_run=config.dry_run,
    )


def _compose(config: MergeConfig, reporter: Reporter) -> tuple[Composition, Path | None]:
    """Return what to write, and the merged model that is added to, if there is one."""
    files, base = tuple(localise(file, reporter) for file in config.experts), None
    anchor = config.anchor and localise(config.anchor, reporter)
    if files and files[0].is_dir():
        base, *rest = files
        files = tuple(rest)
        composition = _compose_base(base, anchor, reporter)
    else:
        composition = compose_anchor(open_anchor(anchor or workspace.find().anchor))
    composition = composition.adding(open_expert(file) for file in files)
    return replace(composition, top_k=config.top_k or composition.top_k), base


def _compose_base(base: Path, anchor: Path | None, reporter: Reporter) -> Composition:
    merged = open_merged(base)
    expected = merged.manifest.anchor
    if anchor is not None and (found := open_anchor(anchor).digest) != expected.digest:
        raise BundleError(f"{anchor}: digest is {found}; {base} was made of {expected.digest} ({expected.name})")
    if merged.manifest.router.tuned_with is not None:
        reporter.warn(f"{base}: its router was tuned; the result has the owners' own rows again")
    return compose_merged(merged)


def _warn(composition: Composition, config: MergeConfig, reporter: Reporter) -> None:
    count = len(composition.parts)
    if config.top_k is not None and config.top_k > count:
        reporter.warn(f"--top-k {config.top_k} is more than there are experts: {count} are used")
    if all(part.entry.license is None for part in composition.parts):
        reporter.note("license: unknown, as the inputs' are")
    elif composition.license == OTHER_LICENSE:
        listed = ", ".join(f"{part.entry.name}: {part.entry.license or 'unknown'}" for part in composition.parts)
        reporter.warn(f"the inputs have no license in common ({listed}); the merged model's is 'other'")
