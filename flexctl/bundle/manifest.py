"""Manifests: what every bundle says about itself, and the digest that binds its content.

Schema version 1. A manifest is canonical JSON: in ``flexctl.json`` for directories, under the one metadata key
``flexctl`` for files. Reading one, with every field checked, is validation.py's.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flexctl.bundle.codec import OPTIONAL, canonical_json, encode, json_digest

__all__ = [
    "MANIFEST_FILE",
    "MANIFEST_KEY",
    "OTHER_LICENSE",
    "PUBLIC_SAMPLE_FILE",
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
    "write_manifest",
]

SCHEMA_VERSION = 1
MANIFEST_FILE = "flexctl.json"
MANIFEST_KEY = "flexctl"
PUBLIC_SAMPLE_FILE = "public-sample.safetensors"

TOLERATED = ("run.json", "results.json", ".gitattributes", "*.sig", "*.sigstore.json")
"""Names of files that may lie beside a bundle although nothing binds them. Anything else unknown is refused."""

OTHER_LICENSE = "other"
"""What the Hub calls a license that it has no id for."""


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
        samples: Passages behind them.
        encoder: The sentence encoder's name, for that kind.
        trained: Whether they trained with the expert afterwards, as they did in early versions.
        bias: Mean logit on public text of each layer's row, (num_hidden_layers,), at most 0.
        own_covariance: Share of the owner's own covariance beside public text's; None, and not written, for kinds
            without, and for rows of early versions, which had none.
    """

    kind: str
    samples: int
    encoder: str | None
    trained: bool
    bias: tuple[float, ...]
    own_covariance: float | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, kw_only=True, slots=True)
class PrivacyInfo:
    """The differential-privacy guarantee that an owner claims, and all that epsilon is a function of.

    Attributes:
        mechanism: ``dp-sgd``.
        epsilon: At most this, with probability of all but ``delta``.
        delta: Below one over the number of documents.
        unit: Whom it protects: a ``document``.
        accountant: What counted.
        noise_multiplier: Standard deviation of a step's noise, in ``max_grad_norm``.
        sampling_rate: Probability that a document takes part in a step, by Poisson sampling.
        steps: Of them.
        max_grad_norm: Clip of a document's gradient.
        adjacency: Which corpora are neighbours: ``add or remove one``. None, and not written, in early versions.
        row_noise_multiplier: Standard deviation of the noise on router rows, in their own clip. Likewise.
    """

    mechanism: str
    epsilon: float
    delta: float
    unit: str
    accountant: str
    noise_multiplier: float
    sampling_rate: float
    steps: int
    max_grad_norm: float
    adjacency: str | None = field(default=None, metadata=OPTIONAL)
    row_noise_multiplier: float | None = field(default=None, metadata=OPTIONAL)


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

    @property
    def is_calibrated(self) -> bool:
        """Whether it has a public sample and a router space; one that was adopted without public text has neither."""
        return PUBLIC_SAMPLE_FILE in self.files


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertManifest:
    """The manifest inside an expert's file; field by field as docs/format.md has it."""

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
    too. ``manifest_sha256`` is of the manifest's bytes. ``contact`` is written only where an owner gave one.
    """

    name: str
    index: int
    digest: str
    manifest_sha256: str
    license: str | None
    purposes: tuple[str, ...]
    expires: str | None
    privacy: PrivacyInfo | None
    contact: str | None = field(default=None, metadata=OPTIONAL)


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

    The digest binds all of it: ``files`` has the card, and the card the hash of every other field.

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


def digest_of(tensors: Mapping[str, TensorInfo], files: Mapping[str, str] | None = None) -> str:
    """Return the digest that binds a bundle's content.

    Args:
        tensors: As in the manifest.
        files: As in the manifest, for directories.

    Returns:
        ``sha256:`` and the hex SHA-256 of the canonical JSON of both, or of ``tensors`` alone.
    """
    content = {"tensors": encode(tensors)} if files is None else {"files": encode(files), "tensors": encode(tensors)}
    return json_digest(content)


def write_manifest(manifest: Manifest) -> bytes:
    """Return the manifest's only bytes.

    Raises:
        BundleError: It holds NaN, infinity or invalid Unicode.
    """
    return canonical_json(encode(manifest))


def has_expired(expires: str | None, today: datetime.date) -> bool:
    """Return whether rights that last through ``expires`` (YYYY-MM-DD) are over on ``today``."""
    return expires is not None and datetime.date.fromisoformat(expires) < today
