"""Bring a bundle from the Hugging Face Hub into place, after checking all of it."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from flexctl import flags, hub, workspace
from flexctl.bundle.anchor import open_anchor
from flexctl.bundle.copying import copy_range
from flexctl.bundle.manifest import AnchorManifest, ExpertManifest, Manifest, MergedManifest
from flexctl.bundle.merged import CARD_FILE
from flexctl.bundle.signatures import Envelope, read_signature, signature_path
from flexctl.bundle.store import (
    check_directory_target,
    check_file_target,
    new_directory,
    new_file,
    require_space,
)
from flexctl.errors import BundleError, UsageError
from flexctl.options import HUB, Config, argument, flag
from flexctl.runtime import SILENT, Reporter
from flexctl.steps.proof import check_all

__all__ = ["PullConfig", "PullResult", "pull"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PullConfig(Config):
    """What to bring, and where to.

    Verifies all of it before it is moved into place. Files that are no part of a bundle are refused. An
    interrupted pull goes on where it broke off.

    Examples:
        flexctl pull acme/anchor
        flexctl pull acme/merged --revision v2 -o merged-v2
    """

    repository: Annotated[str, argument("REPO", "OWNER/NAME on the Hub, or hf://OWNER/NAME@REVISION/FILE.st.")]
    output: Annotated[Path | None, flags.output("PATH", "Where to write (default: its place in the workspace).")] = None
    revision: Annotated[str | None, flag("REV", "Branch, tag or commit (default: the main branch).", HUB)] = None
    overwrite: flags.Overwrite = False
    dry_run: flags.DryRun = False
    allow_expired: flags.AllowExpired = False


@dataclass(frozen=True, kw_only=True, slots=True)
class PullResult:
    """What was brought.

    Attributes:
        path: Where it is.
        digest: Its digest.
        kind: ``anchor``, ``expert`` or ``merged``.
        repository: Where it came from.
        commit: Which commit of it.
        files: What it is made of.
        size_bytes: Of all of them.
        dry_run: Whether nothing was written.
    """

    path: Path
    digest: str
    kind: str
    repository: str
    commit: str
    files: tuple[hub.BundleFile, ...]
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
        files=tuple(hub.BundleFile(name=name, size_bytes=remote.sizes[name]) for name in names),
        size_bytes=size,
        dry_run=config.dry_run,
    )


def _address(config: PullConfig) -> hub.Address:
    address = hub.parse(config.repository)
    if config.revision is None:
        return address
    if address.revision not in (None, config.revision):
        raise UsageError(f"is {config.revision!r}, but {config.repository} names another", field="revision")
    return replace(address, revision=config.revision)


def _names(remote: hub.Remote, manifest: Manifest) -> list[str]:
    """Return the files to bring. Cards of anchors and experts stay: they are the Hub's, and nothing binds them."""
    if remote.file is not None:
        return [remote.file, *([remote.signature] if remote.signature else [])]
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
    raise UsageError(f"a {manifest.kind} file has no place in a workspace", hint="give one with `output`")


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
    if isinstance(manifest, (AnchorManifest, MergedManifest)):
        with new_directory(target, kind=manifest.kind, overwrite=config.overwrite) as temporary:
            fetched = hub.fetch(remote, reporter)
            for name in names:
                _copy(fetched / name, temporary / name)
            _verify(temporary, remote, manifest, config, reporter, today)
        return
    fetched = hub.fetch(remote, reporter)
    signature = read_signature(signature_path(fetched), manifest)
    with _signed_by(target, signature), new_file(target, overwrite=config.overwrite) as temporary:
        _copy(fetched, temporary)
        _verify(temporary, remote, manifest, config, reporter, today)


@contextmanager
def _signed_by(target: Path, signature: Envelope | None) -> Iterator[None]:
    """Put what was signed of a file beside it as the block ends; what signed the one before goes."""
    place = signature_path(target)
    if signature is None:
        yield
        place.unlink(missing_ok=True)
        return
    with new_file(place, overwrite=True) as temporary:
        temporary.write_bytes(signature.data)
        yield


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
    digest, checks = check_all(path, config, reporter, today=today, anchor=open_anchor(own) if fits else None)
    for check in checks:
        if not check.ok:
            hint = "; `allow_expired` takes it all the same" if check.name == "rights" else ""
            # The temporary sibling's name says nothing to anyone.
            detail = check.detail.replace(str(path), str(remote.address))
            raise BundleError(detail, hint=f"nothing was written{hint}")
    if digest != manifest.digest:
        raise BundleError(f"{remote.address}: digest is {digest}; expected {manifest.digest}")
