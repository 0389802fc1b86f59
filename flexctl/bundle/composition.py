"""What a merged model is made of: the anchor's weights and a set of experts, wherever their bytes lie now.

merge, remove and replace are the same act: take such a set from bundles, change it, write it. So a merged model is
a function of the set, whatever way led to it.
"""

from __future__ import annotations

import datetime
import hashlib
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from flexctl.bundle.anchor import Anchor
from flexctl.bundle.expert import Expert, check_fits
from flexctl.bundle.hashing import StoredTensor
from flexctl.bundle.layout import LOW_RANK_PARTS, ROUTER_TENSOR, feed_forward_keys
from flexctl.bundle.licenses import conflicts
from flexctl.bundle.manifest import (
    OTHER_LICENSE,
    PUBLIC_SAMPLE_FILE,
    AnchorRef,
    Architecture,
    ExpertEntry,
    ExpertManifest,
    Tombstone,
    has_expired,
    write_manifest,
)
from flexctl.bundle.merged import (
    CARD_FILE,
    CONFIG_FILE,
    INDEX_FILE,
    SHARED_FILE,
    UNTUNED_ROUTER_FILE,
    Merged,
    expert_file,
    weight_files,
)
from flexctl.bundle.names import PUBLIC
from flexctl.bundle.rights import Rights
from flexctl.bundle.signatures import Envelope, kept_signature_file, read_signature, signature_path
from flexctl.bundle.stock import DENSE_PREFIX
from flexctl.bundle.tensors import RawTensor, Span
from flexctl.errors import BundleError, UsageError
from flexctl.families import Family, family_of, feed_forward_names

__all__ = ["DEFAULT_TOP_K", "Composition", "LowRank", "Part", "compose_anchor", "compose_merged"]

_SPDX = re.compile(r"[A-Za-z0-9.+-]+")

DEFAULT_TOP_K = 4
"""num_experts_per_tok unless told otherwise. Source: FlexOlmo table 8, docs/how-it-works.md, section 6."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """The expert tensor ``name``, to be expanded from ``a`` (rank, in), ``b`` (out, rank) and the public expert's."""

    name: str
    a: StoredTensor
    b: StoredTensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One expert, ready to be laid into a merged model.

    Attributes:
        entry: What the merged manifest says about it; its index is set on writing.
        source: Bundle that it comes from, for messages.
        manifest: The owner's manifest, verbatim; None for the public expert.
        feed_forward: By expert tensor name, in the order of expert files.
        rows: Where its router rows lie, a layer each; None are zeros, the public expert's.
        rows_sha256: What the owner's manifest promises of all rows together.
        signature: The owner's, where there is one; who made it is not known here.
    """

    entry: ExpertEntry
    source: Path
    manifest: str | None
    feed_forward: Mapping[str, StoredTensor | LowRank]
    rows: tuple[Span, ...] | None
    rows_sha256: str | None
    signature: Envelope | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Composition:
    """All that a merged model is a function of.

    Attributes:
        anchor: The common anchor.
        architecture: Its sizes.
        moe_config: config.json of the merged model but for its counts.
        stock: Files taken over as they are: name -> (where it lies, SHA-256).
        shared: Dense name -> weight outside the feed-forward networks.
        parts: ``public`` first, then by name.
        top_k: num_experts_per_tok as asked for.
        removed: Tombstones.
        tuned: All router rows after tuning, a layer each, (num_experts, hidden_size), F32; None where each is as its
            owner made it. They are of this very set, so another set has none.
    """

    anchor: AnchorRef
    architecture: Architecture
    moe_config: Mapping[str, Any]
    stock: Mapping[str, tuple[Path, str]]
    shared: Mapping[str, StoredTensor]
    parts: tuple[Part, ...]
    top_k: int = DEFAULT_TOP_K
    removed: tuple[Tombstone, ...] = ()
    tuned: tuple[RawTensor, ...] | None = None

    @property
    def family(self) -> Family:
        """The anchor's family."""
        return family_of(self.anchor.model_type)

    @property
    def license(self) -> str:
        """The SPDX id that all inputs have, as the anchor spells it, else ``other``; unknown is no match."""
        first = self.parts[0].entry.license
        if first is None or not _SPDX.fullmatch(first):
            return OTHER_LICENSE
        same = all((part.entry.license or "").lower() == first.lower() for part in self.parts)
        return first if same else OTHER_LICENSE

    def license_conflicts(self) -> list[str]:
        """Return what of the inputs' licenses does not go together, as far as their ids tell."""
        entries = (part.entry for part in self.parts)
        return conflicts([Rights(entry.name, entry.license, entry.purposes, entry.expires) for entry in entries])

    def closed_rows(self) -> dict[str, RawTensor]:
        """Return each closed expert's router rows, as its owner made them, (num_hidden_layers, hidden_size), F32."""
        shape = (self.architecture.num_hidden_layers, self.architecture.hidden_size)
        return {
            part.entry.name: RawTensor("F32", shape, np.concatenate([span.read().data for span in part.rows]))
            for part in self.parts
            if part.rows is not None
        }

    def adding(self, experts: Iterable[Expert]) -> Composition:
        """Return this with more experts.

        Raises:
            BundleError: One was made for another anchor, or has a name or digest that is there already.
        """
        parts = list(self.parts)
        for expert in experts:
            part = self._part(expert)
            for other in parts[1:]:
                if other.entry.name == part.entry.name:
                    raise BundleError(
                        f"{expert.path}: name is {part.entry.name!r}, and so is that of {other.source}",
                        hint=f"flexctl replace {part.entry.name} {expert.path} swaps one expert for another",
                    )
                if other.entry.digest == part.entry.digest:
                    raise BundleError(f"{expert.path}: digest is {part.entry.digest}, and so is that of {other.source}")
            parts.append(part)
        present = {part.entry.digest for part in parts}
        return replace(
            self,
            parts=(parts[0], *sorted(parts[1:], key=lambda part: part.entry.name)),
            removed=tuple(stone for stone in self.removed if stone.digest not in present),
            tuned=None,
        )

    def without(self, names: Collection[str], *, tombstone: bool = False) -> Composition:
        """Return this with fewer experts.

        Args:
            names: Closed experts to leave out.
            tombstone: Whether their names and digests stay in the manifest.

        Raises:
            UsageError: One is not there, or is the public expert.
        """
        present = [part.entry.name for part in self.parts[1:]]
        for name in names:
            if name == PUBLIC:
                raise UsageError("the public expert is the anchor's own and cannot be removed")
            if name not in present:
                raise UsageError(
                    f"{self.parts[0].source}: has no expert {name!r}", hint=f"it has {', '.join(present) or 'none'}"
                )
        gone = [part.entry for part in self.parts if part.entry.name in names]
        stones = [Tombstone(name=entry.name, digest=entry.digest) for entry in gone] if tombstone else []
        return replace(
            self,
            parts=tuple(part for part in self.parts if part.entry not in gone),
            removed=tuple(sorted([*self.removed, *stones], key=lambda stone: (stone.name, stone.digest))),
            tuned=None,
        )

    def refuse_expired(self, today: datetime.date) -> None:
        """Refuse rights that are over.

        Raises:
            BundleError: An expert's are; the message names the first.
        """
        for part in self.parts:
            if has_expired(part.entry.expires, today):
                raise BundleError(
                    f"{part.source}: data.expires of {part.entry.name} is {part.entry.expires}, which is past",
                    hint="ask its owner for a newer one, or give `allow_expired`",
                )

    def _part(self, expert: Expert) -> Part:
        check_fits(expert, self.anchor, self.architecture)
        manifest = expert.manifest
        span = expert.spans[ROUTER_TENSOR]
        return Part(
            entry=_entry(manifest, expert.manifest_text),
            source=expert.path,
            manifest=expert.manifest_text,
            feed_forward=_expert_pieces(expert),
            rows=tuple(span.rows(layer, layer + 1) for layer in range(manifest.architecture.num_hidden_layers)),
            rows_sha256=manifest.tensors[ROUTER_TENSOR].sha256,
            signature=read_signature(signature_path(expert.path), manifest),
        )


def compose_anchor(anchor: Anchor) -> Composition:
    """Return the merged model of an anchor alone."""
    manifest = anchor.manifest

    def pieces(spans: Mapping[str, Span], prefix: str = "") -> dict[str, StoredTensor]:
        return {
            name: StoredTensor(prefix + name, span, manifest.tensors[prefix + name]) for name, span in spans.items()
        }

    entry = ExpertEntry(
        name=PUBLIC,
        index=0,
        digest=manifest.digest,
        manifest_sha256=hashlib.sha256(write_manifest(manifest)).hexdigest(),
        license=manifest.license,
        purposes=(),
        expires=None,
        privacy=None,
    )
    public = Part(
        entry=entry,
        source=anchor.path,
        manifest=None,
        feed_forward=pieces(anchor.feed_forward(), DENSE_PREFIX),
        rows=None,
        rows_sha256=None,
    )
    left_behind = (CONFIG_FILE, PUBLIC_SAMPLE_FILE)
    return Composition(
        anchor=manifest.ref,
        architecture=manifest.architecture,
        moe_config=manifest.moe_config,
        stock={file: (anchor.path / file, sha) for file, sha in manifest.files.items() if file not in left_behind},
        shared=pieces(anchor.shared()),
        parts=(public,),
    )


def compose_merged(merged: Merged) -> Composition:
    """Return what a merged model is made of, with the router rows as their owners made them.

    Raises:
        BundleError: What it says of an expert is not what the expert's own manifest says.
    """
    manifest = merged.manifest
    made = {CONFIG_FILE, INDEX_FILE, CARD_FILE, UNTUNED_ROUTER_FILE, *weight_files(manifest)}
    return Composition(
        anchor=manifest.anchor,
        architecture=manifest.architecture,
        moe_config=merged.config,
        stock={file: (merged.path / file, sha) for file, sha in manifest.files.items() if file not in made},
        shared={
            name: StoredTensor(name, span, manifest.tensors[name])
            for name, span in merged.headers[SHARED_FILE].tensors.items()
        },
        parts=tuple(_merged_part(merged, entry) for entry in manifest.experts),
        top_k=manifest.num_experts_per_tok_requested,
        removed=manifest.removed,
    )


def _merged_part(merged: Merged, entry: ExpertEntry) -> Part:
    tensors = merged.headers[expert_file(entry.name)].tensors
    keys = feed_forward_keys(merged.family, merged.manifest.architecture.num_hidden_layers, entry.index)
    pieces = {name: StoredTensor(key, tensors[key], merged.manifest.tensors[key]) for name, key in keys.items()}
    if entry.index == 0:
        return Part(entry=entry, source=merged.path, manifest=None, feed_forward=pieces, rows=None, rows_sha256=None)
    owner, text = merged.owner_manifest(entry.index)
    where = f"{merged.path}: experts.{entry.index} ({entry.name})"
    found = _entry(owner, text, entry.index)
    # Models of before say nothing of a contact.
    if entry not in (found, replace(found, contact=None)):
        raise BundleError(f"{where}: is not what the expert's own manifest says", hint="merge the owners' files anew")
    for name, piece in pieces.items():
        if owner.rank is None and owner.tensors[name] != piece.info:
            raise BundleError(f"{where}: tensor {piece.name}: sha256 is not that of the expert's own manifest")
    return Part(
        entry=found,
        source=merged.path,
        manifest=text,
        feed_forward=pieces,
        rows=merged.rows(entry.index),
        rows_sha256=owner.tensors[ROUTER_TENSOR].sha256,
        signature=read_signature(merged.path / kept_signature_file(entry.name), owner),
    )


def _entry(manifest: ExpertManifest, text: str, index: int = 0) -> ExpertEntry:
    return ExpertEntry(
        name=manifest.name,
        index=index,
        digest=manifest.digest,
        manifest_sha256=hashlib.sha256(text.encode("utf-8")).hexdigest(),
        license=manifest.data.license,
        purposes=manifest.data.purposes,
        expires=manifest.data.expires,
        privacy=manifest.privacy,
        contact=manifest.data.contact,
    )


def _expert_pieces(expert: Expert) -> dict[str, StoredTensor | LowRank]:
    manifest = expert.manifest

    def piece(name: str) -> StoredTensor:
        return StoredTensor(name, expert.spans[name], manifest.tensors[name])

    names = [name for _, _, name in feed_forward_names(manifest.architecture.num_hidden_layers)]
    if manifest.rank is None:
        return {name: piece(name) for name in names}
    a, b = LOW_RANK_PARTS
    return {name: LowRank(name, piece(f"{name}.{a}"), piece(f"{name}.{b}")) for name in names}
