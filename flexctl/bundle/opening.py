"""Opening a bundle of whatever kind."""

from __future__ import annotations

from pathlib import Path

from flexctl.bundle.anchor import Anchor, open_anchor
from flexctl.bundle.expert import Expert, embedded_manifest, open_expert
from flexctl.bundle.manifest import (
    AnchorManifest,
    ExpertManifest,
    Manifest,
    MergedManifest,
)
from flexctl.bundle.merged import Merged, open_merged
from flexctl.bundle.router import RouterFile, open_router_file
from flexctl.bundle.validation import read_directory_manifest
from flexctl.errors import UsageError

__all__ = ["open_bundle", "read_manifest_of"]


def open_bundle(path: Path) -> Anchor | Expert | Merged | RouterFile:
    """Return the bundle at ``path``: an anchor's or merged model's directory, an expert's or a router's file.

    Raises:
        UsageError: There is nothing.
        BundleError: It is not valid; the message names file and field.
    """
    manifest = read_manifest_of(path)
    if isinstance(manifest, AnchorManifest):
        return open_anchor(path)
    if isinstance(manifest, MergedManifest):
        return open_merged(path)
    return open_expert(path) if isinstance(manifest, ExpertManifest) else open_router_file(path)


def read_manifest_of(path: Path) -> Manifest:
    """Return the manifest of the bundle at ``path``; nothing else of a directory is read.

    Raises:
        UsageError: There is nothing.
        BundleError: There is no manifest, or it is not valid.
    """
    if not path.exists():
        raise UsageError(f"{path}: no such file or directory", hint="flexctl list shows the bundles of the workspace")
    return read_directory_manifest(path) if path.is_dir() else embedded_manifest(path)[0]
