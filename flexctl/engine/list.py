"""Say what a workspace holds: its anchor, its experts, its merged model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexctl import workspace
from flexctl.bundle.manifest import AnchorManifest, ExpertManifest, MergedManifest
from flexctl.bundle.opening import read_manifest_of
from flexctl.errors import BundleError
from flexctl.runtime import SILENT, Reporter

__all__ = ["ListConfig", "ListResult", "list"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ListConfig:
    """Where to look.

    Attributes:
        path: A directory in a workspace; the current one if None.
    """

    path: Path | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ListResult:
    """What is there. Each bundle has ``error``: None, or why it cannot be read.

    Attributes:
        path: The workspace's directory.
        anchor: {path, name, digest, model_type, error}; None if there is none.
        experts: {name, path, digest, size_bytes, license, expires, in_merged, error} each, by file name;
            ``in_merged`` is whether this very expert, by digest, is in the merged model.
        merged: {path, digest, experts, num_experts_per_tok, license, error}; None if there is none.
    """

    path: Path
    anchor: Mapping[str, Any] | None
    experts: tuple[Mapping[str, Any], ...]
    merged: Mapping[str, Any] | None


def list(config: ListConfig, reporter: Reporter = SILENT) -> ListResult:
    """Read the manifests of a workspace. A bundle that is broken is listed with its error.

    Raises:
        UsageError: flexctl.toml is invalid.
    """
    del reporter
    space = workspace.find(config.path)
    merged, inside = _merged(space.merged)
    return ListResult(
        path=space.root, anchor=_anchor(space.anchor), experts=tuple(_experts(space.experts, inside)), merged=merged
    )


def _anchor(path: Path) -> dict[str, Any] | None:
    if not path.is_dir():
        return None
    fields: dict[str, Any] = {"path": path, "name": None, "digest": None, "model_type": None, "error": None}
    try:
        manifest = read_manifest_of(path)
    except BundleError as error:
        return fields | {"error": error.message}
    if not isinstance(manifest, AnchorManifest):
        return fields | {"error": f"{path}: kind is {manifest.kind!r}; expected 'anchor'"}
    return fields | {"name": manifest.name, "digest": manifest.digest, "model_type": manifest.model_type}


def _merged(path: Path) -> tuple[dict[str, Any] | None, frozenset[str]]:
    """Return what there is to say of the merged model, and the digests of its experts."""
    if not path.is_dir():
        return None, frozenset()
    fields: dict[str, Any] = {"path": path, "digest": None, "experts": (), "num_experts_per_tok": None, "license": None}
    try:
        manifest = read_manifest_of(path)
    except BundleError as error:
        return fields | {"error": error.message}, frozenset()
    if not isinstance(manifest, MergedManifest):
        return fields | {"error": f"{path}: kind is {manifest.kind!r}; expected 'merged'"}, frozenset()
    found = fields | {
        "digest": manifest.digest,
        "experts": tuple(entry.name for entry in manifest.experts),
        "num_experts_per_tok": min(manifest.num_experts_per_tok_requested, len(manifest.experts)),
        "license": manifest.license,
        "error": None,
    }
    return found, frozenset(entry.digest for entry in manifest.experts)


def _experts(folder: Path, inside: frozenset[str]) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("*.st")):
        fields: dict[str, Any] = {
            "name": path.stem,
            "path": path,
            "digest": None,
            "size_bytes": path.stat().st_size,
            "license": None,
            "expires": None,
            "in_merged": False,
            "error": None,
        }
        try:
            manifest = read_manifest_of(path)
        except BundleError as error:
            yield fields | {"error": error.message}
            continue
        if isinstance(manifest, ExpertManifest):
            yield fields | {
                "name": manifest.name,
                "digest": manifest.digest,
                "license": manifest.data.license,
                "expires": manifest.data.expires,
                "in_merged": manifest.digest in inside,
            }
