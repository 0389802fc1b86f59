"""Replace one expert of a merged model by another of the same name, and say what changed."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexctl import workspace
from flexctl.bundle.assembly import assemble
from flexctl.bundle.codec import encode
from flexctl.bundle.composition import compose_merged
from flexctl.bundle.expert import Expert, open_expert
from flexctl.bundle.manifest import ExpertManifest
from flexctl.bundle.merged import Merged, open_merged
from flexctl.bundle.store import place_of_change
from flexctl.errors import BundleError, UsageError
from flexctl.hub import localise
from flexctl.runtime import SILENT, Reporter

__all__ = ["ReplaceConfig", "ReplaceResult", "replace"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplaceConfig:
    """What to replace.

    Attributes:
        name: The expert that goes.
        expert: File of the one that comes, or ``hf://owner/name``; it must bear the same name.
        source: Directory of the merged model; the workspace's if None.
        output: Directory to write; if None the source is replaced.
        allow_expired: Take experts whose rights are over.
        overwrite: Replace a merged model that exists; a workspace's own needs none.
        dry_run: Check everything that headers and manifests tell, write nothing.
        trust_cache: Do not hash files that were hashed before and did not change since.
    """

    name: str
    expert: Path
    source: Path | None = None
    output: Path | None = None
    allow_expired: bool = False
    overwrite: bool = False
    dry_run: bool = False
    trust_cache: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplaceResult:
    """What changed.

    Attributes:
        path: Directory of the merged model.
        digest: Its digest; None after a dry run.
        name: The expert.
        old_digest: Of the one that went.
        new_digest: Of the one that came.
        changes: {field, old, new} for every field of the owner's manifest that differs, hashes aside.
        bytes_written: Bytes copied; what was linked does not count. After a dry run, what the weights would take.
        dry_run: Whether nothing was written.
    """

    path: Path
    digest: str | None
    name: str
    old_digest: str
    new_digest: str
    changes: tuple[Mapping[str, Any], ...]
    bytes_written: int
    dry_run: bool


def replace(config: ReplaceConfig, reporter: Reporter = SILENT, *, today: datetime.date | None = None) -> ReplaceResult:
    """Replace an expert; the result is what a merge with the new one writes.

    Args:
        config: What to replace.
        reporter: Where progress and warnings go.
        today: The day that rights are compared with; the real one if None.

    Raises:
        UsageError: The merged model has no such expert, has this very one already, or the target may not be replaced.
        BundleError: The new expert bears another name or does not fit, or bytes are not those of a manifest.
    """
    source = config.source or workspace.find().merged
    merged = open_merged(source)
    expert = open_expert(localise(config.expert, reporter))
    if expert.manifest.name != config.name:
        raise BundleError(
            f"{config.expert}: name is {expert.manifest.name!r}; expected {config.name!r}",
            hint="an expert is replaced by one of the same name; remove and merge for any other",
        )
    composition = compose_merged(merged).without([config.name]).adding([expert])
    old = _old_manifest(merged, expert)
    if not config.allow_expired:
        composition.refuse_expired(today or datetime.date.today())
    target, replaces_own = place_of_change(source, config.output)
    digest, written = assemble(
        target,
        composition,
        overwrite=config.overwrite or replaces_own,
        trust_cache=config.trust_cache,
        dry_run=config.dry_run,
        reporter=reporter,
    )
    return ReplaceResult(
        path=target,
        digest=digest,
        name=config.name,
        old_digest=old.digest,
        new_digest=expert.digest,
        changes=tuple(_changes(old, expert.manifest)),
        bytes_written=written,
        dry_run=config.dry_run,
    )


def _old_manifest(merged: Merged, expert: Expert) -> ExpertManifest:
    """Return the manifest of the expert that goes."""
    index = merged.names.index(expert.manifest.name) + 1
    manifest, text = merged.owner_manifest(index)
    if text == expert.manifest_text:
        raise UsageError(f"{merged.path}: {manifest.name} is the expert in {expert.path} already")
    return manifest


def _changes(old: ExpertManifest, new: ExpertManifest) -> Iterator[dict[str, Any]]:
    before, after = dict(_leaves(encode(old))), dict(_leaves(encode(new)))
    for field in sorted(before.keys() | after.keys()):
        if before.get(field) != after.get(field):
            yield {"field": field, "old": before.get(field), "new": after.get(field)}


def _leaves(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, item in value.items():
        if not prefix and name == "tensors":
            continue
        if isinstance(item, Mapping):
            yield from _leaves(item, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", item
