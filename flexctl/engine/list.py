"""Say what a workspace holds: its anchor, its experts, its merged model."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from flexctl import workspace
from flexctl.bundle.manifest import AnchorManifest, ExpertManifest, MergedManifest, has_expired
from flexctl.bundle.opening import read_manifest_of
from flexctl.errors import BundleError, UsageError
from flexctl.options import RIGHTS, Config, argument, flag
from flexctl.runtime import SILENT, Reporter

__all__ = ["ListConfig", "ListResult", "ListedAnchor", "ListedExpert", "ListedMerged", "list"]


def _days(text: str, field: str) -> int:
    """Return a number of days, written 30d."""
    found = re.fullmatch(r"(\d{1,5})d", text)
    if found is None:
        raise UsageError(f"is {text!r}; expected days, as 30d", field=field)
    return int(found[1])


@dataclass(frozen=True, kw_only=True, slots=True)
class ListConfig(Config):
    """Where to look.

    Examples:
        flexctl list
        flexctl list --expiring 30d
    """

    path: Annotated[Path | None, argument("PATH", "A workspace; the current one by default.")] = None
    expiring: Annotated[
        str | None,
        flag("DAYS", "Only experts whose rights end within so many days, as 30d, or are over.", RIGHTS, check=_days),
    ] = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ListedAnchor:
    """The workspace's anchor. Where ``error`` says why it cannot be read, all else but place and size is None."""

    path: Path
    size_bytes: int
    name: str | None = None
    digest: str | None = None
    model_type: str | None = None
    license: str | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ListedExpert:
    """An expert's file.

    Attributes:
        name: Its name; the file's where it cannot be read.
        rank: Of a low-rank expert; None of a full one.
        expired: Its rights are over.
        in_merged: This very expert, by digest, is in the merged model.
        other_in_merged: Another of its name is.
        contact: Whom to ask; None where the owner named nobody.
        error: Why it cannot be read; None where it can.
    """

    name: str
    path: Path
    size_bytes: int
    digest: str | None = None
    rank: int | None = None
    license: str | None = None
    expires: str | None = None
    error: str | None = None
    expired: bool = False
    in_merged: bool = False
    other_in_merged: bool = False
    contact: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ListedMerged:
    """The workspace's merged model.

    Attributes:
        experts: Their names, ``public`` first.
        num_experts_per_tok: How many are active for a token.
        error: Why it cannot be read; None where it can.
    """

    path: Path
    size_bytes: int
    experts: tuple[str, ...] = ()
    digest: str | None = None
    num_experts_per_tok: int | None = None
    license: str | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ListResult:
    """What is there; None where there is none.

    Attributes:
        path: The workspace's directory.
        anchor: The anchor.
        experts: The experts, by file name.
        merged: The merged model.
        expiring: The days that experts were chosen by; None where all are listed.
    """

    path: Path
    anchor: ListedAnchor | None
    experts: tuple[ListedExpert, ...]
    merged: ListedMerged | None
    expiring: str | None = None


def list(config: ListConfig, reporter: Reporter = SILENT, *, today: datetime.date | None = None) -> ListResult:
    """Read the manifests of a workspace. A bundle that is broken is listed with its error.

    Args:
        config: Where to look.
        reporter: Not needed; every command takes one.
        today: The day that rights are compared with; the real one if None.

    Raises:
        UsageError: flexctl.toml is invalid.
    """
    del reporter
    space = workspace.find(config.path)
    merged, inside = _merged(space.merged)
    today = today or datetime.date.today()
    last = config.expiring and (today + datetime.timedelta(_days(config.expiring, "expiring"))).isoformat()
    return ListResult(
        path=space.root,
        anchor=_anchor(space.anchor),
        experts=tuple(
            expert
            for expert in (_expert(*found, inside, today) for found in _expert_files(space.experts))
            if last is None or (expert.expires is not None and expert.expires <= last)
        ),
        merged=merged,
        expiring=config.expiring,
    )


def _anchor(path: Path) -> ListedAnchor | None:
    if not path.is_dir():
        return None
    found = ListedAnchor(path=path, size_bytes=_size_bytes(path))
    try:
        manifest = read_manifest_of(path)
    except BundleError as error:
        return replace(found, error=error.message)
    if not isinstance(manifest, AnchorManifest):
        return replace(found, error=f"{path}: kind is {manifest.kind!r}; expected 'anchor'")
    return replace(
        found,
        name=manifest.name,
        digest=manifest.digest,
        model_type=manifest.model_type,
        license=manifest.license,
    )


def _merged(path: Path) -> tuple[ListedMerged | None, dict[str, str]]:
    """Return what there is to say of the merged model, and {name: digest} of its experts."""
    if not path.is_dir():
        return None, {}
    found = ListedMerged(path=path, size_bytes=_size_bytes(path))
    try:
        manifest = read_manifest_of(path)
    except BundleError as error:
        return replace(found, error=error.message), {}
    if not isinstance(manifest, MergedManifest):
        return replace(found, error=f"{path}: kind is {manifest.kind!r}; expected 'merged'"), {}
    found = replace(
        found,
        experts=tuple(entry.name for entry in manifest.experts),
        digest=manifest.digest,
        num_experts_per_tok=min(manifest.num_experts_per_tok_requested, len(manifest.experts)),
        license=manifest.license,
    )
    return found, {entry.name: entry.digest for entry in manifest.experts}


def _expert_files(folder: Path) -> Iterator[tuple[Path, ExpertManifest | str]]:
    """Yield each expert's file and its manifest, or why there is none; router files are passed over."""
    for path in sorted(folder.glob("*.st")):
        try:
            manifest = read_manifest_of(path)
        except BundleError as error:
            yield path, error.message
            continue
        if isinstance(manifest, ExpertManifest):
            yield path, manifest


def _expert(
    path: Path, manifest: ExpertManifest | str, inside: Mapping[str, str], today: datetime.date
) -> ListedExpert:
    if isinstance(manifest, str):
        return ListedExpert(name=path.stem, path=path, size_bytes=path.stat().st_size, error=manifest)
    is_inside = manifest.digest in inside.values()
    return ListedExpert(
        name=manifest.name,
        path=path,
        size_bytes=path.stat().st_size,
        digest=manifest.digest,
        rank=manifest.rank,
        license=manifest.data.license,
        expires=manifest.data.expires,
        expired=has_expired(manifest.data.expires, today),
        in_merged=is_inside,
        other_in_merged=manifest.name in inside and not is_inside,
        contact=manifest.data.contact,
    )


def _size_bytes(folder: Path) -> int:
    return sum(item.stat().st_size for item in folder.iterdir() if item.is_file())
