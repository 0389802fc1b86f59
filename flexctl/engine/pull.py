"""Bring a bundle from the Hugging Face Hub into place, after checking all of it."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flexctl import hub, workspace
from flexctl.bundle.anchor import open_anchor
from flexctl.bundle.checks import check_bundle
from flexctl.bundle.manifest import AnchorManifest, ExpertManifest, Manifest, MergedManifest
from flexctl.bundle.merged import CARD_FILE
from flexctl.bundle.store import (
    check_directory_target,
    check_file_target,
    copy_range,
    new_directory,
    new_file,
    require_space,
)
from flexctl.errors import BundleError, UsageError
from flexctl.runtime import SILENT, Reporter

__all__ = ["PullConfig", "PullResult", "pull"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PullConfig:
    """What to bring, and where to.

    Attributes:
        repository: ``owner/name`` on the Hub, or ``hf://owner/name@revision/FILE.st``.
        revision: Branch, tag or commit; None is the main branch.
        output: Directory of an anchor or merged model, file of an expert; its place in the workspace if None.
        allow_expired: Take experts whose rights are over.
        overwrite: Replace what is there.
        dry_run: Check manifest and file names, say what would be fetched, fetch nothing else.
    """

    repository: str
    revision: str | None = None
    output: Path | None = None
    allow_expired: bool = False
    overwrite: bool = False
    dry_run: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class PullResult:
    """What was brought.

    Attributes:
        path: Where it is.
        digest: Its digest.
        kind: ``anchor``, ``expert`` or ``merged``.
        repository: Where it came from.
        commit: Which commit of it.
        files: {name, size_bytes} each.
        size_bytes: Of all of them.
        dry_run: Whether nothing was written.
    """

    path: Path
    digest: str
    kind: str
    repository: str
    commit: str
    files: tuple[Mapping[str, Any], ...]
    size_bytes: int
    dry_run: bool


def pull(config: PullConfig, reporter: Reporter = SILENT, *, today: datetime.date | None = None) -> PullResult:
    """Fetch a bundle and verify it beside its target; only what is right is moved into place.

    Args:
        config: What to bring.
        reporter: Where progress goes.
        today: The day that rights are compared with; the real one if None.

    Raises:
        UsageError: There is no such repository or revision, or the target exists.
        BundleError: The bundle does not verify, or the repository holds files that are no part of one.
        FlexctlError: The Hub cannot be reached, or refuses.
    """
    remote = hub.look(_address(config))
    manifest = hub.manifest_of(remote)
    names = _names(remote, manifest)
    size = sum(remote.sizes[name] for name in names)
    target = config.output or _place(manifest)
    if isinstance(manifest, (AnchorManifest, MergedManifest)):
        check_directory_target(target, kind=manifest.kind, overwrite=config.overwrite)
    else:
        check_file_target(target, overwrite=config.overwrite)
    if not config.dry_run:
        require_space(target, size)
        _write(target, remote, names, manifest, config, reporter, today)
    return PullResult(
        path=target,
        digest=manifest.digest,
        kind=manifest.kind,
        repository=remote.address.repository,
        commit=remote.commit,
        files=tuple({"name": name, "size_bytes": remote.sizes[name]} for name in names),
        size_bytes=size,
        dry_run=config.dry_run,
    )


def _address(config: PullConfig) -> hub.Address:
    address = hub.parse(config.repository)
    if config.revision is None:
        return address
    if address.revision not in (None, config.revision):
        raise UsageError(f"--revision is {config.revision!r}, but {config.repository} names another")
    return replace(address, revision=config.revision)


def _names(remote: hub.Remote, manifest: Manifest) -> list[str]:
    """Return the files to bring. Cards of anchors and experts stay: they are the Hub's, and nothing binds them."""
    if remote.file is not None:
        return [remote.file]
    unbound = hub.IGNORED if isinstance(manifest, MergedManifest) else (*hub.IGNORED, CARD_FILE)
    return sorted(set(remote.sizes) - set(unbound))


def _place(manifest: Manifest) -> Path:
    """Return where a bundle of this kind is in the workspace."""
    space = workspace.find()
    if isinstance(manifest, AnchorManifest):
        return space.anchor
    if isinstance(manifest, MergedManifest):
        return space.merged
    if isinstance(manifest, ExpertManifest):
        return space.experts / f"{manifest.name}.st"
    raise UsageError(f"a {manifest.kind} file has no place in a workspace", hint="give one with -o FILE.st")


def _write(
    target: Path,
    remote: hub.Remote,
    names: list[str],
    manifest: Manifest,
    config: PullConfig,
    reporter: Reporter,
    today: datetime.date | None,
) -> None:
    """Fetch, copy beside the target, verify, move into place."""
    is_directory = isinstance(manifest, (AnchorManifest, MergedManifest))
    if is_directory:
        place = new_directory(target, kind=manifest.kind, overwrite=config.overwrite)
    else:
        place = new_file(target, overwrite=config.overwrite)
    with place as temporary:
        fetched = hub.fetch(remote, reporter)
        for name in names:
            _copy(fetched / name if is_directory else fetched, temporary / name if is_directory else temporary)
        _verify(temporary, remote, manifest, config, reporter, today)


def _copy(source: Path, target: Path) -> None:
    with target.open("xb") as file:
        copy_range(source, 0, file.fileno(), 0, source.stat().st_size)


def _verify(
    path: Path,
    remote: hub.Remote,
    manifest: Manifest,
    config: PullConfig,
    reporter: Reporter,
    today: datetime.date | None,
) -> None:
    """Check everything; what goes into a workspace must also fit the anchor that is there."""
    own = workspace.find().anchor
    fits = config.output is None and own.is_dir() and not isinstance(manifest, AnchorManifest)
    with reporter.progress("hashing", sum(remote.sizes.values()), "bytes") as progress:
        digest, checks = check_bundle(
            path,
            anchor=open_anchor(own) if fits else None,
            absent={},
            today=None if config.allow_expired else today or datetime.date.today(),
            advance=progress.advance,
        )
    for check in checks:
        if not check.ok:
            hint = "; --allow-expired takes it all the same" if check.name == "rights" else ""
            # The temporary sibling's name says nothing to anyone.
            detail = check.detail.replace(str(path), str(remote.address))
            raise BundleError(detail, hint=f"nothing was written{hint}")
    if digest != manifest.digest:
        raise BundleError(f"{remote.address}: digest is {digest}; expected {manifest.digest}")
