"""Manifests: what every bundle says about itself, and the digest that binds its content.

Schema version 1. A manifest is canonical JSON: in ``flexctl.json`` for directories, under the one metadata key
``flexctl`` for files. Law: ``read_manifest(write_manifest(m), where) == m``, and the bytes are the only ones.
"""

from __future__ import annotations

import datetime
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flexctl.bundle.codec import canonical_json, decode, encode, parse_json
from flexctl.bundle.names import PUBLIC, check_anchor_name, check_expert_name, check_file_name, shown
from flexctl.bundle.tensors import ITEM_SIZES, Typed
from flexctl.errors import BundleError

__all__ = [
    "MANIFEST_FILE",
    "MANIFEST_KEY",
    "OTHER_LICENSE",
    "SCHEMA_VERSION",
    "TOLERATED",
    "AnchorManifest",
    "AnchorRef",
    "Architecture",
    "DataInfo",
    "ExpertEntry",
    "ExpertManifest",
    "Manifest",
    "MergedManifest",
    "PrivacyInfo",
    "RouterInfo",
    "RouterManifest",
    "RouterState",
    "TensorInfo",
    "Tombstone",
    "digest_of",
    "has_expired",
    "read_manifest",
    "write_manifest",
]

SCHEMA_VERSION = 1
MANIFEST_FILE = "flexctl.json"
MANIFEST_KEY = "flexctl"

TOLERATED = ("run.json", "results.json", ".gitattributes", "*.sig", "*.sigstore.json")
"""Names of files that may lie beside a bundle although nothing binds them. Anything else unknown is refused."""

OTHER_LICENSE = "other"
"""What the Hub calls a license that it has no id for."""

_SHA256 = re.compile(r"[0-9a-f]{64}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: dtype (name in safetensors), shape, and the bare hex SHA-256 of its bytes."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class AnchorRef:
    """Which anchor something was made for: its digest binds, ``model_type`` and ``name`` are for people."""

    digest: str
    model_type: str
    name: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """The sizes that an expert and its anchor share, and the dtype of every feed-forward matrix."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    vocab_size: int
    dtype: str


@dataclass(frozen=True, kw_only=True, slots=True)
class DataInfo:
    """What an owner says about the text behind an expert.

    Attributes:
        documents: How many; None where saying so would break a privacy guarantee. Likewise the next two.
        tokens: Distinct tokens of the anchor's tokenizer.
        bytes: UTF-8 bytes.
        label: The owner's words for it.
        license: SPDX id or text; None is unknown.
        purposes: What the expert may be used for; none listed means not restricted here.
        expires: Last day (YYYY-MM-DD) on which it may be merged; None is never.
        contact: Whom to ask.
    """

    documents: int | None
    tokens: int | None
    bytes: int | None
    label: str | None = None
    license: str | None = None
    purposes: tuple[str, ...] = ()
    expires: str | None = None
    contact: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterInfo:
    """How router rows came about.

    Attributes:
        kind: ``discriminant``, ``hidden`` or ``encoder``.
        samples: Documents behind them.
        encoder: The sentence encoder's name, for that kind.
        trained: Whether they trained with the expert afterwards.
        bias: Mean logit on public text of each layer's row, (num_hidden_layers,), at most 0.
    """

    kind: str
    samples: int
    encoder: str | None
    trained: bool
    bias: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class PrivacyInfo:
    """The differential-privacy guarantee that an owner claims; ``unit`` is whom it protects ("document")."""

    mechanism: str
    epsilon: float
    delta: float
    unit: str
    accountant: str
    noise_multiplier: float
    sampling_rate: float
    steps: int
    max_grad_norm: float


@dataclass(frozen=True, kw_only=True, slots=True)
class AnchorManifest:
    """``flexctl.json`` of an anchor.

    Attributes:
        tensors: Weights by their names in the checkpoint, and router-space's with the prefix ``router_space.``.
        files: Every other file that the digest covers -> SHA-256 of its bytes.
        license: SPDX id or text of the anchor itself; None is unknown.
        moe_config: config.json of the merged model but for its counts.
    """

    schema_version: int = SCHEMA_VERSION
    kind: str = "anchor"
    name: str
    model_type: str
    digest: str
    license: str | None
    architecture: Architecture
    moe_config: Mapping[str, Any]
    files: Mapping[str, str]
    tensors: Mapping[str, TensorInfo]

    @property
    def ref(self) -> AnchorRef:
        """How others name this anchor."""
        return AnchorRef(digest=self.digest, model_type=self.model_type, name=self.name)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertManifest:
    """The manifest inside an expert's file; field by field as design.md section 4 has it."""

    schema_version: int = SCHEMA_VERSION
    kind: str = "expert"
    name: str
    digest: str
    anchor: AnchorRef
    architecture: Architecture
    data: DataInfo
    training: Mapping[str, Any]
    router: RouterInfo
    privacy: PrivacyInfo | None
    rank: int | None
    parents: tuple[str, ...]
    software: Mapping[str, str]
    tensors: Mapping[str, TensorInfo]


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterManifest:
    """The manifest inside a router file: rows made before, or apart from, their expert."""

    schema_version: int = SCHEMA_VERSION
    kind: str = "router"
    name: str
    digest: str
    anchor: AnchorRef
    router: RouterInfo
    tensors: Mapping[str, TensorInfo]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertEntry:
    """One expert of a merged model.

    The public expert's ``digest`` and ``manifest_sha256`` are the anchor's, so that they bind its ``moe_config``
    too. ``manifest_sha256`` is of the manifest's bytes.
    """

    name: str
    index: int
    digest: str
    manifest_sha256: str
    license: str | None
    purposes: tuple[str, ...]
    expires: str | None
    privacy: PrivacyInfo | None


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterState:
    """Whose presence the router was tuned with; None is untuned: every row as its owner made it."""

    tuned_with: tuple[str, ...] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Tombstone:
    """An expert that was here and was removed, kept only where somebody asked for it."""

    name: str
    digest: str


@dataclass(frozen=True, kw_only=True, slots=True)
class MergedManifest:
    """``flexctl.json`` of a merged model. Everything in it is a function of the set of experts and the anchor.

    Attributes:
        experts: ``public`` first, then by name.
        license: What all inputs share, else ``other``.
        num_experts_per_tok_requested: What was asked for; config.json has it clamped to the number of experts.
        files: Every file but this one and the tolerated. For a file whose tensors are listed in ``tensors`` the
            SHA-256 is of the bytes before them; so every byte of the directory is covered once.
    """

    schema_version: int = SCHEMA_VERSION
    kind: str = "merged"
    digest: str
    anchor: AnchorRef
    architecture: Architecture
    experts: tuple[ExpertEntry, ...]
    license: str
    num_experts_per_tok_requested: int
    router: RouterState
    removed: tuple[Tombstone, ...]
    files: Mapping[str, str]
    tensors: Mapping[str, TensorInfo]


Manifest = AnchorManifest | ExpertManifest | MergedManifest | RouterManifest

_CLASSES: dict[str, type[Manifest]] = {
    "anchor": AnchorManifest,
    "expert": ExpertManifest,
    "merged": MergedManifest,
    "router": RouterManifest,
}


def digest_of(tensors: Mapping[str, TensorInfo], files: Mapping[str, str] | None = None) -> str:
    """Return the digest that binds a bundle's content.

    Args:
        tensors: As in the manifest.
        files: As in the manifest, for directories.

    Returns:
        ``sha256:`` and the hex SHA-256 of the canonical JSON of both, or of ``tensors`` alone.
    """
    content = {"tensors": encode(tensors)} if files is None else {"files": encode(files), "tensors": encode(tensors)}
    return "sha256:" + hashlib.sha256(canonical_json(content)).hexdigest()


def write_manifest(manifest: Manifest) -> bytes:
    """Return the manifest's only bytes.

    Raises:
        BundleError: It holds NaN, infinity or invalid Unicode.
    """
    return canonical_json(encode(manifest))


def read_manifest(data: bytes, where: str) -> Manifest:
    """Return the manifest that ``data`` holds, every field checked and the digest recomputed.

    Args:
        data: Bytes as from ``write_manifest``.
        where: File, for messages.

    Raises:
        BundleError: It is not canonical JSON, of an unknown schema version or kind, a field is missing, unknown,
            or has a value that it may not have, or the digest is not that of ``tensors`` and ``files``.
    """
    value = parse_json(data, where)
    if not isinstance(value, dict):
        raise BundleError(f"{where}: the manifest is {shown(value)}; expected an object")
    version, kind = value.get("schema_version"), value.get("kind")
    if type(version) is not int or version != SCHEMA_VERSION:
        raise BundleError(
            f"{where}: schema_version is {shown(version)}; this flexctl reads {SCHEMA_VERSION}", hint="update flexctl"
        )
    if not isinstance(kind, str) or kind not in _CLASSES:
        raise BundleError(f"{where}: kind is {shown(kind)}; expected one of {', '.join(_CLASSES)}")
    manifest: Manifest = decode(_CLASSES[kind], value, where)
    _check(manifest, where)
    if canonical_json(value) != data:
        raise BundleError(f"{where}: the manifest is not canonical JSON (sorted keys, no spaces)")
    return manifest


def has_expired(expires: str | None, today: datetime.date) -> bool:
    """Return whether rights that last through ``expires`` (YYYY-MM-DD) are over on ``today``."""
    return expires is not None and datetime.date.fromisoformat(expires) < today


def _check(manifest: Manifest, where: str) -> None:
    for name, info in manifest.tensors.items():
        _check_tensor(info, f"{where}: tensors.{shown(name)}")
    files = manifest.files if isinstance(manifest, (AnchorManifest, MergedManifest)) else None
    for name, sha256 in (files or {}).items():
        check_file_name(name, f"{where}: files")
        _check_pattern(sha256, _SHA256, f"{where}: files.{name}")
    if digest_of(manifest.tensors, files) != manifest.digest:
        raise BundleError(
            f"{where}: digest is {shown(manifest.digest)}, but its content has another", hint="the file was changed"
        )
    if isinstance(manifest, AnchorManifest):
        check_anchor_name(manifest.name, f"{where}: name")
        _check_architecture(manifest.architecture, where)
        return
    _check_pattern(manifest.anchor.digest, _DIGEST, f"{where}: anchor.digest")
    check_anchor_name(manifest.anchor.name, f"{where}: anchor.name")
    if isinstance(manifest, MergedManifest):
        _check_architecture(manifest.architecture, where)
        _check_merged(manifest, where)
        return
    check_expert_name(manifest.name, f"{where}: name")
    if isinstance(manifest, ExpertManifest):
        _check_architecture(manifest.architecture, where)
        _check_date(manifest.data.expires, f"{where}: data.expires")
        for index, parent in enumerate(manifest.parents):
            _check_pattern(parent, _DIGEST, f"{where}: parents.{index}")
        if manifest.rank is not None and manifest.rank < 1:
            raise BundleError(f"{where}: rank is {manifest.rank}; expected null or at least 1")
        if len(manifest.router.bias) != manifest.architecture.num_hidden_layers:
            raise BundleError(f"{where}: router.bias has {len(manifest.router.bias)} entries; expected one a layer")


def _check_merged(manifest: MergedManifest, where: str) -> None:
    names = [entry.name for entry in manifest.experts]
    if names[:1] != [PUBLIC] or names[1:] != sorted(set(names[1:])):
        raise BundleError(f"{where}: experts is {shown(names)}; expected public first, then each once, by name")
    for index, entry in enumerate(manifest.experts):
        field = f"{where}: experts.{index}"
        if entry.index != index:
            raise BundleError(f"{field}.index is {entry.index}; expected {index}")
        if index:
            check_expert_name(entry.name, f"{field}.name")
        _check_pattern(entry.digest, _DIGEST, f"{field}.digest")
        _check_pattern(entry.manifest_sha256, _SHA256, f"{field}.manifest_sha256")
        _check_date(entry.expires, f"{field}.expires")
    if manifest.num_experts_per_tok_requested < 1:
        raise BundleError(
            f"{where}: num_experts_per_tok_requested is {manifest.num_experts_per_tok_requested}; expected at least 1"
        )
    for index, tombstone in enumerate(manifest.removed):
        check_expert_name(tombstone.name, f"{where}: removed.{index}.name")
        _check_pattern(tombstone.digest, _DIGEST, f"{where}: removed.{index}.digest")


def _check_tensor(info: Typed, where: str) -> None:
    if info.dtype not in ITEM_SIZES:
        raise BundleError(f"{where}.dtype is {shown(info.dtype)}; expected one of {', '.join(ITEM_SIZES)}")
    if any(size < 0 for size in info.shape):
        raise BundleError(f"{where}.shape is {shown(info.shape)}; expected sizes of at least 0")
    if isinstance(info, TensorInfo):
        _check_pattern(info.sha256, _SHA256, f"{where}.sha256")


def _check_architecture(architecture: Architecture, where: str) -> None:
    for name, size in encode(architecture).items():
        if name != "dtype" and not 0 < size < 2**32:
            raise BundleError(f"{where}: architecture.{name} is {size}; expected at least 1")
    if architecture.num_hidden_layers > 9999:
        raise BundleError(f"{where}: architecture.num_hidden_layers is {architecture.num_hidden_layers}; at most 9999")


def _check_pattern(text: str, pattern: re.Pattern[str], where: str) -> None:
    if not pattern.fullmatch(text):
        raise BundleError(f"{where} is {shown(text)}; expected {pattern.pattern}")


def _check_date(text: str | None, where: str) -> None:
    if text is None:
        return
    try:
        datetime.date.fromisoformat(text if _DATE.fullmatch(text) else "")
    except ValueError:
        raise BundleError(f"{where} is {shown(text)}; expected a date as YYYY-MM-DD") from None
