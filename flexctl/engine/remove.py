"""Remove experts from a merged model, exactly: what is left is what a merge without them would have written."""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from flexctl import flags, workspace
from flexctl.bundle.composition import Composition, compose_merged
from flexctl.bundle.merged import Merged
from flexctl.errors import UsageError
from flexctl.options import Config, argument
from flexctl.runtime import SILENT, Reporter
from flexctl.steps.change import assemble, open_to_change, place_of_change, warn_of_tuned
from flexctl.steps.removal import recorded, recorder

__all__ = ["RemoveConfig", "RemoveResult", "remove"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoveConfig(Config):
    """What to remove.

    Works on the workspace's merged model, which is replaced in one step. With `output` the result goes elsewhere.
    With `tombstone`, `reason` and `key` each owner gets a signed record, NAME.removed.json beside the model.

    Examples:
        flexctl remove law
        flexctl remove law news --from merged -o without-law-and-news
        flexctl remove law --tombstone --reason "withdrawn by its owner" --key coordinator.key
    """

    names: Annotated[tuple[str, ...], argument("NAME", "Names of the experts to remove.")]
    source: flags.Source = None
    output: flags.OutputElsewhere = None
    tombstone: flags.Tombstone = False
    reason: flags.Reason = None
    key: flags.Key = None
    passphrase_file: flags.PassphraseFile = None
    overwrite: flags.Overwrite = False
    dry_run: flags.DryRun = False
    trust_cache: flags.TrustCache = False


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoveResult:
    """What is left.

    Attributes:
        path: Directory of the merged model.
        digest: Its digest; None after a dry run.
        removed: Names that are gone.
        remaining: Closed experts that are left.
        num_experts_per_tok: As config.json has it: clamped to the number of experts.
        bytes_written: Bytes copied; what was linked or shares blocks with the old files does not count. After a dry
            run, what the weights would take.
        exact: Whether every byte is what a merge of the remaining experts writes; a tombstone is the one exception.
        records: Signed records for the owners, where they were asked for.
        dry_run: Whether nothing was written.
    """

    path: Path
    digest: str | None
    removed: tuple[str, ...]
    remaining: tuple[str, ...]
    num_experts_per_tok: int
    bytes_written: int
    exact: bool
    dry_run: bool
    records: tuple[Path, ...] = ()


def remove(config: RemoveConfig, reporter: Reporter = SILENT, *, today: datetime.date | None = None) -> RemoveResult:
    """Remove experts. What is kept is hashed again, and renumbered.

    Args:
        config: What to remove.
        reporter: Where progress and warnings go.
        today: The day that stands in records; the real one if None.

    Raises:
        UsageError: A name is not there or reserved, the target or a record exists and may not be replaced, or the key
            cannot be opened.
        BundleError: The merged model is invalid, or a kept tensor's bytes are not those of the manifest.
    """
    if not config.names:
        raise UsageError("remove needs the NAME of an expert", hint="flexctl list shows them")
    source = config.source or workspace.find().merged
    merged = open_to_change(source, dry_run=config.dry_run)
    composition = compose_merged(merged).without(config.names, tombstone=config.tombstone)
    target, replaces_own = place_of_change(source, config.output)
    _say(merged, composition, reporter)
    recording = recorder(merged, _unique(config.names), target, config, reporter)
    with recorded(recording, "remove", today or datetime.date.today()) as records:
        digest, written = assemble(
            target,
            composition,
            overwrite=config.overwrite or replaces_own,
            trust_cache=config.trust_cache,
            dry_run=config.dry_run,
            reporter=reporter,
            ready=records.write,
        )
    return RemoveResult(
        path=target,
        digest=digest,
        removed=_unique(config.names),
        remaining=tuple(part.entry.name for part in composition.parts[1:]),
        num_experts_per_tok=min(composition.top_k, len(composition.parts)),
        bytes_written=written,
        exact=not composition.removed,
        dry_run=config.dry_run,
        records=records.files,
    )


def _say(merged: Merged, composition: Composition, reporter: Reporter) -> None:
    before = min(composition.top_k, len(merged.manifest.experts))
    after = min(composition.top_k, len(composition.parts))
    if after < before:
        reporter.warn(f"num_experts_per_tok goes from {before} to {after}: there are no more experts")
    warn_of_tuned(merged, reporter)


def _unique(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))
