"""Who is in a model, as the manifests say it."""

from __future__ import annotations

from collections.abc import Sequence

from flexctl.bundle import PUBLIC, Anchor, Expert, Merged
from flexctl.bundle.manifest import AnchorRef, PrivacyInfo, Tombstone
from flexctl.evaluation.figures import Lineage, Member

__all__ = ["lineage"]


def lineage(bundles: Sequence[Anchor | Expert | Merged], without: Sequence[str]) -> Lineage:
    """Return what a model is and who is in it.

    Args:
        bundles: As of a ``Runnable``: the bundle itself, and the anchor that an expert runs beside.
        without: Experts that are left out.

    Raises:
        BundleError: An expert inside a merged model carries another manifest than is listed.
    """
    bundle = bundles[0]
    if isinstance(bundle, Merged):
        members = [_of_merged(bundle, index, without) for index in range(len(bundle.manifest.experts))]
        manifest = bundle.manifest
        return _lineage(bundle, manifest.anchor, members, license=manifest.license, removed=manifest.removed)
    if isinstance(bundle, Expert):
        (anchor,) = (other for other in bundles[1:] if isinstance(other, Anchor))
        return _lineage(bundle, anchor.manifest.ref, [_of_anchor(anchor), _of_expert(bundle, without)], license=None)
    return _lineage(bundle, bundle.manifest.ref, [_of_anchor(bundle)], license=bundle.manifest.license)


def _lineage(
    bundle: Anchor | Expert | Merged,
    anchor: AnchorRef,
    members: Sequence[Member],
    *,
    license: str | None,
    removed: Sequence[Tombstone] = (),
) -> Lineage:
    return Lineage(
        kind=bundle.manifest.kind,
        anchor=anchor.name,
        model_type=anchor.model_type,
        license=license,
        members=tuple(members),
        removed=tuple(removed),
    )


def _of_anchor(anchor: Anchor) -> Member:
    return Member(name=PUBLIC, digest=anchor.digest, license=anchor.manifest.license)


def _of_expert(expert: Expert, without: Sequence[str]) -> Member:
    manifest = expert.manifest
    return Member(
        name=manifest.name,
        digest=manifest.digest,
        license=manifest.data.license,
        purposes=manifest.data.purposes,
        expires=manifest.data.expires,
        privacy=_privacy(manifest.privacy),
        label=manifest.data.label,
        left_out=manifest.name in without,
    )


def _of_merged(merged: Merged, index: int, without: Sequence[str]) -> Member:
    entry = merged.manifest.experts[index]
    return Member(
        name=entry.name,
        digest=entry.digest,
        license=entry.license,
        purposes=entry.purposes,
        expires=entry.expires,
        privacy=_privacy(entry.privacy),
        label=merged.owner_manifest(index)[0].data.label if index else None,
        left_out=entry.name in without,
    )


def _privacy(privacy: PrivacyInfo | None) -> str | None:
    return None if privacy is None else f"epsilon {privacy.epsilon:g}, delta {privacy.delta:g} a {privacy.unit}"
