"""Replace one expert of a merged model by another of the same name, and say what changed."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from flexctl import evaluation, flags, model, workspace
from flexctl.bundle.codec import encode
from flexctl.bundle.composition import compose_merged
from flexctl.bundle.expert import Expert, open_expert
from flexctl.bundle.manifest import ExpertManifest
from flexctl.bundle.merged import Merged, open_merged
from flexctl.bundle.store import check_directory_target
from flexctl.errors import BundleError, UsageError
from flexctl.options import Config, argument
from flexctl.runtime import SILENT, Parts, Reporter
from flexctl.steps.change import assemble, open_to_change, place_of_change, warn_of_tuned
from flexctl.steps.claims import refuse_false_claims
from flexctl.steps.machine import machine_of
from flexctl.steps.removal import recorded, recorder
from flexctl.steps.screening import admit, anchor_at_hand, domains_of, look_at
from flexctl.steps.sources import localise
from flexctl.steps.trusting import refuse_untrusted, trust_of

__all__ = ["Change", "ReplaceConfig", "ReplaceResult", "replace"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplaceConfig(Config):
    """What to replace.

    With `data` also how each domain's bits per byte changed, scored as evaluate does. With `tombstone`, `reason`
    and `key` the owner gets a signed record of the version that went, NAME.removed.json beside the model.

    Examples:
        flexctl replace law law-2.st
        flexctl replace law law-2.st --data law=heldout/law --data news=heldout/news
    """

    name: Annotated[str, argument("NAME", "Name of the expert to replace.")]
    expert: Annotated[Path, argument("EXPERT", "The expert's new file (.st) or hf://OWNER/NAME, of the same name.")]
    data: flags.Domains = ()
    source: flags.Source = None
    output: flags.OutputElsewhere = None
    overwrite: flags.Overwrite = False
    dry_run: flags.DryRun = False
    tombstone: flags.Tombstone = False
    reason: flags.Reason = None
    key: flags.Key = None
    passphrase_file: flags.PassphraseFile = None
    trust: flags.Trust = None
    require_signed: flags.RequireSigned = False
    screen: flags.Screen = False
    admit: flags.Admit = False
    accept: flags.Accept = ()
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
class Change:
    """A field of an owner's manifest that differs, ``data.license`` for example, as JSON has it; None is none."""

    field: str
    old: Any
    new: Any


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplaceResult:
    """What changed.

    Attributes:
        path: Directory of the merged model.
        digest: Its digest; None after a dry run.
        name: The expert.
        old_digest: Of the one that went.
        new_digest: Of the one that came.
        changes: Every field of the owner's manifest that differs, hashes aside.
        bytes_written: Bytes copied; what was linked or shares blocks with the old files does not count. After a dry
            run, what the weights would take.
        dry_run: Whether nothing was written.
        bits_per_byte: Domain -> {before, after} on its test text; empty without data, and after a dry run.
        records: The signed record for the owner, where it was asked for.
    """

    path: Path
    digest: str | None
    name: str
    old_digest: str
    new_digest: str
    changes: tuple[Change, ...]
    bytes_written: int
    dry_run: bool
    bits_per_byte: Mapping[str, Mapping[str, float]]
    records: tuple[Path, ...] = ()


def replace(config: ReplaceConfig, reporter: Reporter = SILENT, *, today: datetime.date | None = None) -> ReplaceResult:
    """Replace an expert; the result is what a merge with the new one writes.

    Args:
        config: What to replace.
        reporter: Where progress and warnings go.
        today: The day that rights are compared with; the real one if None.

    Raises:
        UsageError: The merged model has no such expert, has this very one already, the target may not be replaced, or
            a setting or the data is wrong.
        BundleError: The new expert bears another name or does not fit, or bytes are not those of a manifest.
    """
    domains = domains_of(config)
    source = config.source or workspace.find().merged
    merged = open_to_change(source, dry_run=config.dry_run)
    expert = open_expert(localise(config.expert, reporter))
    if expert.manifest.name != config.name:
        raise BundleError(
            f"{config.expert}: name is {expert.manifest.name!r}; expected {config.name!r}",
            hint="an expert is replaced by one of the same name; remove and merge for any other",
        )
    warn_of_tuned(merged, reporter)
    composition = compose_merged(merged).without([config.name], tombstone=config.tombstone).adding([expert])
    old = _old_manifest(merged, expert)
    if domains:
        _warn_of_length(config, merged, reporter)
    if not config.allow_expired:
        composition.refuse_expired(today or datetime.date.today())
    target, replaces_own = place_of_change(source, config.output)
    overwrite = config.overwrite or replaces_own
    check_directory_target(target, kind="merged", overwrite=overwrite)
    trust = trust_of(config, today)
    refuse_untrusted(config, composition, trust)
    refuse_false_claims(composition, [config.name])
    recording = recorder(merged, [config.name], target, config, reporter)
    look_at(composition, [config.name], anchor_at_hand(workspace.find().anchor, composition), trust, config, reporter)
    if config.admit and not config.dry_run:
        admit(composition, [config.name], domains, config, reporter, before=compose_merged(merged))
    # One model is in memory at a time: the old one is scored and gone before the new one is.
    scoring = Parts(reporter)
    scoring.expect(2 * sum(domain.size_bytes() for domain in domains))
    before = _score(source, domains, config, scoring, "before")
    with recorded(recording, "replace", today or datetime.date.today()) as records:
        digest, written = assemble(
            target,
            composition,
            overwrite=overwrite,
            trust_cache=config.trust_cache,
            dry_run=config.dry_run,
            reporter=reporter,
            ready=records.write,
        )
    after = _score(target, domains, config, scoring, "after")
    return ReplaceResult(
        path=target,
        digest=digest,
        name=config.name,
        old_digest=old.digest,
        new_digest=expert.digest,
        changes=tuple(_changes(old, expert.manifest)),
        bytes_written=written,
        dry_run=config.dry_run,
        bits_per_byte={name: {"before": before[name], "after": after[name]} for name in before},
        records=records.files,
    )


def _score(
    path: Path, domains: Sequence[evaluation.Domain], config: ReplaceConfig, reporter: Reporter, when: str
) -> dict[str, float]:
    """Return the bits per byte of the merged model in a directory on each domain, as ``evaluate`` finds them."""
    if not domains or config.dry_run:
        return {}

    weights = open_merged(path).weights()
    tokenizer = model.load_tokenizer(path, special_as_text=config.special_as_text)
    merged = machine_of(config, weights.shared).build(weights)
    sizes: dict[str, Any] = {
        "seq_len": evaluation.window_length(weights.dense_config, config.seq_len),
        "batch_tokens": config.forward_tokens,
    }
    return {
        domain.name: evaluation.score_domain(
            merged, tokenizer, domain, **sizes, reporter=reporter, title=f"scoring {domain.name} {when}"
        ).bits_per_byte
        for domain in domains
    }


def _warn_of_length(config: ReplaceConfig, merged: Merged, reporter: Reporter) -> None:
    model.warn_of_length(config.seq_len, merged.config, reporter)


def _old_manifest(merged: Merged, expert: Expert) -> ExpertManifest:
    """Return the manifest of the expert that goes."""
    index = merged.names.index(expert.manifest.name) + 1
    manifest, text = merged.owner_manifest(index)
    if text == expert.manifest_text:
        raise UsageError(f"{merged.path}: {manifest.name} is the expert in {expert.path} already")
    return manifest


def _changes(old: ExpertManifest, new: ExpertManifest) -> Iterator[Change]:
    before, after = dict(_leaves(encode(old))), dict(_leaves(encode(new)))
    for field in sorted(before.keys() | after.keys()):
        if before.get(field) != after.get(field):
            yield Change(field=field, old=before.get(field), new=after.get(field))


def _leaves(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, item in value.items():
        if not prefix and name == "tensors":
            continue
        if isinstance(item, Mapping):
            yield from _leaves(item, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", item
