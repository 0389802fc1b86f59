"""Merged models: a stock mixture-of-experts checkpoint with one file an expert."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexctl.bundle.codec import parse_json, read_bytes
from flexctl.bundle.headers import Header, read_header
from flexctl.bundle.layout import expert_layout, feed_forward_keys
from flexctl.bundle.manifest import (
    MANIFEST_FILE,
    MANIFEST_KEY,
    Architecture,
    ExpertManifest,
    MergedManifest,
)
from flexctl.bundle.names import PUBLIC
from flexctl.bundle.stock import CARD_FILE, CONFIG_FILE, INDEX_FILE
from flexctl.bundle.tensors import Span, TensorType, check_agreement
from flexctl.bundle.validation import read_directory_manifest, read_manifest
from flexctl.bundle.weights import Weights
from flexctl.errors import BundleError
from flexctl.families import Family, family_of

__all__ = [
    "CARD_FILE",
    "CONFIG_FILE",
    "INDEX_FILE",
    "ROUTER_FILE",
    "SHARED_FILE",
    "UNTUNED_ROUTER_FILE",
    "Merged",
    "expert_file",
    "open_merged",
    "router_layout",
    "weight_files",
]

SHARED_FILE = "model-shared.safetensors"
ROUTER_FILE = "model-router.safetensors"
UNTUNED_ROUTER_FILE = "router-untuned.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class Merged:
    """A merged model on disk, its headers read and checked, its bytes not yet.

    Attributes:
        path: Directory.
        manifest: What it says about itself.
        config: config.json of the mixture class.
        headers: Head of every safetensors file, by file name.
    """

    path: Path
    manifest: MergedManifest
    config: Mapping[str, Any]
    headers: Mapping[str, Header]

    @property
    def digest(self) -> str:
        """What binds every byte of the directory but the manifest's own."""
        return self.manifest.digest

    @property
    def family(self) -> Family:
        """The anchor's family."""
        return family_of(self.manifest.anchor.model_type)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the closed experts."""
        return tuple(entry.name for entry in self.manifest.experts[1:])

    def feed_forward(self, index: int) -> dict[str, Span]:
        """Return {expert tensor name: where it lies} of one expert, in the order of expert files."""
        tensors = self.headers[expert_file(self.manifest.experts[index].name)].tensors
        keys = feed_forward_keys(self.family, self.manifest.architecture.num_hidden_layers, index)
        return {name: tensors[key] for name, key in keys.items()}

    def untuned_router(self) -> tuple[Span, ...]:
        """Return where all router rows lie as their owners made them, a layer each, (num_experts, hidden_size), F32."""
        tuned = self.manifest.router.tuned_with is not None
        tensors = self.headers[UNTUNED_ROUTER_FILE if tuned else ROUTER_FILE].tensors
        return tuple(tensors[key] for key in self.router_layout())

    def rows(self, index: int) -> tuple[Span, ...]:
        """Return where an expert's router rows lie as its owner made them, a layer each, (hidden_size,), F32."""
        return tuple(span.rows(index, index + 1) for span in self.untuned_router())

    def owner_manifest(self, index: int) -> tuple[ExpertManifest, str]:
        """Return a closed expert's own manifest, which its file carries verbatim, and its text.

        Raises:
            BundleError: The file carries another than the merged model's manifest lists.
        """
        entry = self.manifest.experts[index]
        path = self.path / expert_file(entry.name)
        text = self.headers[path.name].metadata.get(MANIFEST_KEY, "")
        data = text.encode("utf-8", errors="replace")
        if hashlib.sha256(data).hexdigest() != entry.manifest_sha256:
            raise BundleError(f"{path}: __metadata__.{MANIFEST_KEY} is not the manifest that {MANIFEST_FILE} lists")
        manifest = read_manifest(data, str(path))
        if not isinstance(manifest, ExpertManifest) or manifest.name != entry.name:
            raise BundleError(f"{path}: __metadata__.{MANIFEST_KEY} is not the manifest of expert {entry.name}")
        return manifest, text

    def router_layout(self) -> dict[str, TensorType]:
        """Return the tensors of model-router: see the function of the same name."""
        return router_layout(self.family, self.manifest.architecture, len(self.manifest.experts))

    def weights(self) -> Weights:
        """Return the model, memory-mapped."""
        manifest = self.manifest
        router = self.headers[ROUTER_FILE].tensors
        return Weights(
            dense_config=self.family.dense_config(self.config),
            shared={name: span.read() for name, span in self.headers[SHARED_FILE].tensors.items()},
            experts={
                entry.name: {name: span.read() for name, span in self.feed_forward(entry.index).items()}
                for entry in manifest.experts
            },
            router=tuple(router[key].read() for key in self.router_layout()),
            num_experts_per_tok=min(manifest.num_experts_per_tok_requested, len(manifest.experts)),
        )


def expert_file(name: str) -> str:
    """Return the file of an expert inside a merged model; it never changes with the index."""
    return f"model-expert-{name}.safetensors"


def weight_files(manifest: MergedManifest) -> tuple[str, ...]:
    """Return the files whose tensors the manifest lists: those of the index."""
    return (SHARED_FILE, ROUTER_FILE, *(expert_file(entry.name) for entry in manifest.experts))


def router_layout(family: Family, architecture: Architecture, num_experts: int) -> dict[str, TensorType]:
    """Return the tensors of model-router: each layer's rows, (num_experts, hidden_size), F32, layers in order."""
    rows = TensorType("F32", (num_experts, architecture.hidden_size))
    return {family.router_name(layer): rows for layer in range(architecture.num_hidden_layers)}


def open_merged(path: Path) -> Merged:
    """Return the merged model in a directory, after checking manifest, config.json and every header.

    The tensors' bytes and the other files are verify's to hash.

    Raises:
        UsageError: There is no such directory.
        BundleError: It is no merged model, or manifest, headers and config.json do not agree.
    """
    manifest = read_directory_manifest(path)
    if not isinstance(manifest, MergedManifest):
        raise BundleError(f"{path / MANIFEST_FILE}: kind is {manifest.kind!r}; expected 'merged'")
    config_bytes = read_bytes(path / CONFIG_FILE)
    if hashlib.sha256(config_bytes).hexdigest() != manifest.files.get(CONFIG_FILE):
        raise BundleError(f"{path / CONFIG_FILE}: its bytes are not those of the manifest", hint="fetch it again")
    untuned = () if manifest.router.tuned_with is None else (UNTUNED_ROUTER_FILE,)
    headers = {file: read_header(path / file) for file in (*weight_files(manifest), *untuned)}
    _check_headers(headers, manifest)
    config = parse_json(config_bytes, str(path / CONFIG_FILE))
    return Merged(path=path, manifest=manifest, config=config, headers=headers)


def _check_headers(headers: Mapping[str, Header], manifest: MergedManifest) -> None:
    """Compare each file's tensors with those of its role, all of them with the manifest, and each head's hash."""
    family = family_of(manifest.anchor.model_type)
    layers = manifest.architecture.num_hidden_layers
    layout = expert_layout(manifest.architecture)
    routers = router_layout(family, manifest.architecture, len(manifest.experts))
    for file in weight_files(manifest):
        if hashlib.sha256(headers[file].head).hexdigest() != manifest.files.get(file):
            raise BundleError(f"{headers[file].path}: its header is not that of the manifest", hint="fetch it again")
    for entry in manifest.experts:
        header = headers[expert_file(entry.name)]
        keys = feed_forward_keys(family, layers, entry.index)
        check_agreement(header.tensors, {key: layout[name] for name, key in keys.items()}, str(header.path))
    for file in (ROUTER_FILE, UNTUNED_ROUTER_FILE):
        if file in headers:
            check_agreement(headers[file].tensors, routers, str(headers[file].path))
    found = {name: span for file in weight_files(manifest) for name, span in headers[file].tensors.items()}
    check_agreement(found, manifest.tensors, str(headers[SHARED_FILE].path.parent))
    if manifest.experts[0].digest != manifest.anchor.digest:
        raise BundleError(f"{headers[SHARED_FILE].path.parent}: expert {PUBLIC}: digest is not that of the anchor")
