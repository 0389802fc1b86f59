"""Say what a workspace holds: its anchor, its experts, its merged model."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from flexctl import workspace
from flexctl.bundle.manifest import AnchorManifest, ExpertManifest, MergedManifest, has_expired
from flexctl.bundle.opening import read_manifest_of
from flexctl.errors import BundleError
from flexctl.options import Config, argument
from flexctl.runtime import SILENT, Reporter

__all__ = ["ListConfig", "ListResult", "list"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ListConfig(Config):
    """Where to look.

    Examples:
        flexctl list
    """

    path: Annotated[Path | None, argument("PATH", "A workspace; the current one by default.")] = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ListResult:
    """What is there. Each bundle has ``error``: None, or why it cannot be read.

    Attributes:
        path: The workspace's directory.
        anchor: {path, name, digest, size_bytes, model_type, license, error}; None if there is none.
        experts: {name, path, digest, size_bytes, rank, license, expires, expired, in_merged, other_in_merged, error}
            each, by file name; ``in_merged`` is whether this very expert, by digest, is in the merged model,
            ``other_in_merged`` whether another of its name is; ``rank`` is None for a full expert.
        merged: {path, digest, size_bytes, experts, num_experts_per_tok, license, error}; None if there is none.
    """

    path: Path
    anchor: Mapping[str, Any] | None
    experts: tuple[Mapping[str, Any], ...]
    merged: Mapping[str, Any] | None


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
    return ListResult(
        path=space.root,
        anchor=_anchor(space.anchor),
        experts=tuple(_expert(*found, inside, today) for found in _expert_files(space.experts)),
        merged=merged,
    )


def _anchor(path: Path) -> dict[str, Any] | None:
    if not path.is_dir():
        return None
    unknown = dict.fromkeys(("name", "digest", "model_type", "license", "error"))
    fields: dict[str, Any] = {"path": path, "size_bytes": _size_bytes(path), **unknown}
    try:
        manifest = read_manifest_of(path)
    except BundleError as error:
        return fields | {"error": error.message}
    if not isinstance(manifest, AnchorManifest):
        return fields | {"error": f"{path}: kind is {manifest.kind!r}; expected 'anchor'"}
    return fields | {
        "name": manifest.name,
        "digest": manifest.digest,
        "model_type": manifest.model_type,
        "license": manifest.license,
    }


def _merged(path: Path) -> tuple[dict[str, Any] | None, dict[str, str]]:
    """Return what there is to say of the merged model, and {name: digest} of its experts."""
    if not path.is_dir():
        return None, {}
    unknown = dict.fromkeys(("digest", "num_experts_per_tok", "license", "error"))
    fields: dict[str, Any] = {"path": path, "size_bytes": _size_bytes(path), "experts": (), **unknown}
    try:
        manifest = read_manifest_of(path)
    except BundleError as error:
        return fields | {"error": error.message}, {}
    if not isinstance(manifest, MergedManifest):
        return fields | {"error": f"{path}: kind is {manifest.kind!r}; expected 'merged'"}, {}
    found = fields | {
        "digest": manifest.digest,
        "experts": tuple(entry.name for entry in manifest.experts),
        "num_experts_per_tok": min(manifest.num_experts_per_tok_requested, len(manifest.experts)),
        "license": manifest.license,
    }
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
) -> dict[str, Any]:
    unknown = dict.fromkeys(("digest", "rank", "license", "expires", "error"))
    flags = dict.fromkeys(("expired", "in_merged", "other_in_merged"), False)
    fields: dict[str, Any] = {"name": path.stem, "path": path, "size_bytes": path.stat().st_size, **unknown, **flags}
    if isinstance(manifest, str):
        return fields | {"error": manifest}
    is_inside = manifest.digest in inside.values()
    return fields | {
        "name": manifest.name,
        "digest": manifest.digest,
        "rank": manifest.rank,
        "license": manifest.data.license,
        "expires": manifest.data.expires,
        "expired": has_expired(manifest.data.expires, today),
        "in_merged": is_inside,
        "other_in_merged": manifest.name in inside and not is_inside,
    }


def _size_bytes(folder: Path) -> int:
    return sum(item.stat().st_size for item in folder.iterdir() if item.is_file())
