"""Publish a bundle on the Hugging Face Hub, in one commit, with a model card."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from flexctl import flags, hub
from flexctl.bundle.anchor import Anchor
from flexctl.bundle.card import anchor_card, expert_card, is_hub_license
from flexctl.bundle.codec import parse_json, read_bytes
from flexctl.bundle.expert import Expert
from flexctl.bundle.manifest import MANIFEST_FILE, ExpertManifest, Manifest, MergedManifest
from flexctl.bundle.merged import CARD_FILE, Merged
from flexctl.bundle.opening import open_bundle
from flexctl.bundle.signatures import signature_path
from flexctl.errors import BundleError, UsageError
from flexctl.options import HUB, Config, argument, flag, switch
from flexctl.runtime import SILENT, Reporter
from flexctl.steps.proof import check_all

__all__ = ["PushConfig", "PushResult", "push"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PushConfig(Config):
    """What to publish, and where.

    Verifies all of it first, then sends it in one commit, with a model card. The repository is made if it
    is not there; it then holds this bundle and nothing else. The token is HF_TOKEN's, or hf auth login's.

    Examples:
        flexctl push experts/law.st acme/law-expert --base-model acme/anchor
        flexctl push merged acme/merged --private --dry-run
    """

    path: Annotated[Path, argument("PATH", "Anchor, expert (.st) or merged model.")]
    repository: Annotated[str, argument("REPO", "Repository on the Hub: OWNER/NAME.")]
    private: Annotated[bool, switch("Make a new repository private; refuse a public one.", HUB)] = False
    base_model: Annotated[
        str | None,
        flag("OWNER/NAME", "For the card: the expert's anchor, or the anchor's origin.", HUB),
    ] = None
    message: Annotated[str | None, flag("TEXT", "Message of the commit (default: says what it is).", HUB)] = None
    revision: Annotated[
        str | None, flag("BRANCH", "Branch to publish on; made if it is not there (default: the main branch).", HUB)
    ] = None
    dry_run: flags.DryRun = False
    allow_expired: flags.AllowExpired = False


@dataclass(frozen=True, kw_only=True, slots=True)
class PushResult:
    """What was published.

    Attributes:
        path: The bundle here.
        digest: Its digest.
        kind: ``anchor``, ``expert`` or ``merged``.
        repository: Where it is now.
        revision: The branch; None is the main one.
        commit: The commit; None after a dry run.
        files: All that the repository now holds of it.
        size_bytes: Of all of them.
        dry_run: Whether nothing was sent.
    """

    path: Path
    digest: str
    kind: str
    repository: str
    revision: str | None
    commit: str | None
    files: tuple[hub.BundleFile, ...]
    size_bytes: int
    dry_run: bool


def push(config: PushConfig, reporter: Reporter = SILENT, *, today: datetime.date | None = None) -> PushResult:
    """Publish a bundle after hashing all of it.

    Args:
        config: What to publish.
        reporter: Where progress and warnings go.
        today: The day that rights are compared with; the real one if None.

    Raises:
        UsageError: There is no such bundle or repository, the repository holds something else, or is public.
        BundleError: The bundle does not verify.
        FlexctlError: The Hub cannot be reached, or refuses.
    """
    address = hub.parse(config.repository)
    if address.file or address.revision:
        raise UsageError(
            f"is {config.repository!r}; expected OWNER/NAME", hint="a branch is `revision`", field="repository"
        )
    address = hub.Address(repository=address.repository, revision=config.revision)
    bundle = _verified(config, reporter, today)
    files = _files(bundle, config, address, reporter)
    _warn_of_license(bundle, reporter)
    commit = None
    if not config.dry_run:
        head = hub.prepare(address, private=config.private)
        _check_replaceable(head, bundle.manifest, reporter)
        commit = hub.send(
            head,
            files,
            message=config.message or f"Publish {_title(bundle.manifest)} {bundle.digest}",
            reporter=reporter,
        )
    sizes = {name: len(f) if isinstance(f, bytes) else f.stat().st_size for name, f in files.items()}
    return PushResult(
        path=config.path,
        digest=bundle.digest,
        kind=bundle.manifest.kind,
        repository=address.repository,
        revision=config.revision,
        commit=commit,
        files=tuple(hub.BundleFile(name=name, size_bytes=size) for name, size in sizes.items()),
        size_bytes=sum(sizes.values()),
        dry_run=config.dry_run,
    )


def _verified(config: PushConfig, reporter: Reporter, today: datetime.date | None) -> Anchor | Expert | Merged:
    """Return the bundle after checking everything in it."""
    bundle = open_bundle(config.path)
    if not isinstance(bundle, (Anchor, Expert, Merged)):
        raise UsageError(f"{config.path}: is a router file; an anchor, an expert or a merged model can be published")
    _, checks = check_all(config.path, config, reporter, today=today)
    for check in checks:
        if not check.ok:
            hint = (
                "`allow_expired` sends it all the same" if check.name == "rights" else f"flexctl verify {config.path}"
            )
            raise BundleError(check.detail, hint=f"nothing was sent; {hint}")
    return bundle


def _files(
    bundle: Anchor | Expert | Merged, config: PushConfig, address: hub.Address, reporter: Reporter
) -> dict[str, Path | bytes]:
    """Return {name in the repository: what to send}, in that order."""
    base_model = None if config.base_model is None else hub.parse(config.base_model).repository
    if isinstance(bundle, Expert):
        files: dict[str, Path | bytes] = {f"{bundle.manifest.name}.st": bundle.path}
        results = bundle.path.with_suffix(".results.json")
        if results.is_file() and not _is_of_another(results, bundle, reporter):
            files["results.json"] = results
        signature = signature_path(bundle.path)
        if signature.exists():
            files[f"{bundle.manifest.name}.st.sig"] = signature
        card = expert_card(bundle.manifest, address.repository, base_model)
        return {CARD_FILE: card.encode("utf-8"), **files}
    files = {item.name: item for item in sorted(bundle.path.iterdir()) if item.name not in hub.IGNORED}
    if isinstance(bundle, Anchor) and CARD_FILE not in files:
        files[CARD_FILE] = anchor_card(bundle.manifest, address.repository, base_model).encode("utf-8")
    elif base_model is not None:
        raise UsageError("the card is written already, it lies beside the model", field="base_model")
    return files


def _is_of_another(results: Path, expert: Expert, reporter: Reporter) -> bool:
    """Return whether figures beside an expert are of an earlier one, which the file had before it was written anew."""
    figures = parse_json(read_bytes(results), str(results))
    digest = figures.get("digest") if isinstance(figures, dict) else None
    if digest in (None, expert.digest):
        return False
    reporter.warn(f"{results}: is of {digest}; it is not sent (flexctl evaluate {expert.path} makes a new one)")
    return True


def _warn_of_license(bundle: Anchor | Expert | Merged, reporter: Reporter) -> None:
    license = bundle.manifest.data.license if isinstance(bundle, Expert) else bundle.manifest.license
    if license is None:
        reporter.warn(f"{bundle.path}: its license is unknown; the card says 'other'")
    elif not is_hub_license(license):
        reporter.warn(f"{bundle.path}: the Hub has no id for its license ({license}); the card says 'other'")


def _title(manifest: Manifest) -> str:
    if isinstance(manifest, MergedManifest):
        return f"{manifest.anchor.name} with {', '.join(entry.name for entry in manifest.experts[1:]) or 'no expert'}"
    return f"{manifest.kind} {manifest.name}"


def _check_replaceable(head: hub.Remote, manifest: Manifest, reporter: Reporter) -> None:
    """Refuse a repository that holds anything but an earlier version, and warn of experts that its history keeps."""
    others = set(head.sizes) - {CARD_FILE, *hub.IGNORED}
    if not others:
        return
    if MANIFEST_FILE not in others and not any(name.endswith(".st") for name in others):
        hint = "choose another repository"
        raise UsageError(f"{head.address}: holds {min(others)} and no bundle; flexctl replaces nothing else", hint=hint)
    before = hub.manifest_of(head)
    renamed = (
        isinstance(before, ExpertManifest) and isinstance(manifest, ExpertManifest) and before.name != manifest.name
    )
    if before.kind != manifest.kind or renamed:
        hint = "a repository holds one bundle: choose another"
        raise UsageError(f"{head.address}: holds {_title(before)}; this is {_title(manifest)}", hint=hint)
    if isinstance(before, MergedManifest) and isinstance(manifest, MergedManifest):
        kept = {entry.digest for entry in manifest.experts}
        earlier = [before, *(old for old in hub.earlier_manifests(head) if isinstance(old, MergedManifest))]
        gone = {entry.name for old in earlier for entry in old.experts[1:] if entry.digest not in kept}
        if gone:
            repository = head.address.repository
            reporter.warn(
                f"{repository}: its history still holds {', '.join(sorted(gone))}, and anyone who may read it can "
                f"fetch that; to purge it: HfApi().super_squash_history({repository!r}), then delete the old files "
                "under Settings, Storage (docs/hub.md)"
            )
