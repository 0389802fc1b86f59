"""Show what a bundle says about itself. Nothing is hashed, so it takes no time; verify is for belief."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from flexctl import flags, hub
from flexctl.bundle.codec import encode
from flexctl.bundle.manifest import Manifest, MergedManifest
from flexctl.bundle.opening import open_bundle, read_manifest_of
from flexctl.bundle.router import RouterFile
from flexctl.bundle.sbom import bill_of_materials
from flexctl.errors import UsageError
from flexctl.options import OUTPUT, Config, flag
from flexctl.runtime import SILENT, Reporter

__all__ = ["InspectConfig", "InspectResult", "inspect"]


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectConfig(Config):
    """What to look at.

    Sizes, experts, licenses and how it was trained. Nothing is hashed: see verify.

    Examples:
        flexctl inspect experts/law.st
        flexctl inspect hf://acme/law-expert
        flexctl inspect merged --sbom cyclonedx
    """

    path: flags.BundlePath
    sbom: Annotated[
        Literal["cyclonedx"] | None,
        flag("FORMAT", "Print a bill of materials instead: cyclonedx is CycloneDX 1.6 for machine learning.", OUTPUT),
    ] = None


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectResult:
    """What it says.

    Attributes:
        path: The bundle; text for one on the Hub.
        kind: ``anchor``, ``expert``, ``router`` or ``merged``.
        name: Its name; a merged model has none.
        digest: Its digest, recomputed from what the manifest lists.
        size_bytes: Of its file, or of all files in its directory.
        num_tensors: How many tensors the manifest lists.
        num_parameters: Their elements.
        manifest: All of it.
        sbom: The bill of materials, where one was asked for.
    """

    path: Path | str
    kind: str
    name: str | None
    digest: str
    size_bytes: int
    num_tensors: int
    num_parameters: int
    manifest: Mapping[str, Any]
    sbom: Mapping[str, object] | None = None


def inspect(config: InspectConfig, reporter: Reporter = SILENT) -> InspectResult:
    """Read a bundle's manifest; of one on the Hub, nothing but that is fetched.

    Raises:
        UsageError: There is nothing at the path, or a bill of materials is asked for of what has none.
        BundleError: There is no manifest, or it is not valid.
        FlexctlError: The Hub cannot be reached, or refuses.
    """
    del reporter
    if config.sbom is not None:
        bill = _bill(config.path)
        return replace(inspect(InspectConfig(path=config.path)), sbom=bill)
    if hub.is_remote(config.path):
        remote = hub.look(hub.parse(config.path))
        size_bytes = remote.sizes[remote.file] if remote.file else sum(remote.sizes.values())
        return _result(str(remote.address), hub.manifest_of(remote), size_bytes)
    files = list(config.path.iterdir()) if config.path.is_dir() else [config.path]
    manifest = read_manifest_of(config.path)
    return _result(config.path, manifest, sum(file.stat().st_size for file in files if file.is_file()))


def _bill(path: Path) -> dict[str, Any]:
    if hub.is_remote(path):
        raise UsageError(
            f"{hub.parse(path)}: a bill is made of what is here", hint="flexctl pull brings it", field="sbom"
        )
    bundle = open_bundle(path)
    if isinstance(bundle, RouterFile):
        raise UsageError(f"{path}: is a router file and no model", field="sbom")
    return bill_of_materials(bundle)


def _result(path: Path | str, manifest: Manifest, size_bytes: int) -> InspectResult:
    return InspectResult(
        path=path,
        kind=manifest.kind,
        name=None if isinstance(manifest, MergedManifest) else manifest.name,
        digest=manifest.digest,
        size_bytes=size_bytes,
        num_tensors=len(manifest.tensors),
        num_parameters=sum(math.prod(info.shape) for info in manifest.tensors.values()),
        manifest=encode(manifest),
    )
