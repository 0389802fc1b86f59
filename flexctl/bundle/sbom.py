"""Bills of materials: what a bundle is made of, as CycloneDX 1.6 has it for machine-learning models.

Written here, as cyclonedx-python-lib models no model cards; its schema check is what the tests hold this to. The same
bundle gives the same bill: there is no time in it.

Source: https://cyclonedx.org/docs/1.6/json/
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

from flexctl.bundle.anchor import Anchor
from flexctl.bundle.codec import encode
from flexctl.bundle.expert import Expert
from flexctl.bundle.manifest import AnchorRef, ExpertManifest
from flexctl.bundle.merged import Merged
from flexctl.families import family_of
from flexctl.runtime import software_versions

__all__ = ["bill_of_materials"]

_SCHEMA = "http://cyclonedx.org/schema/bom-1.6.schema.json"
Component = dict[str, Any]


def bill_of_materials(bundle: Anchor | Expert | Merged) -> dict[str, Any]:
    """Return a bundle's bill of materials as an object of JSON.

    The bundle itself is its subject; the anchor and every expert are components, each with digest, license, an
    account of the text behind it, privacy, and what it was made from.

    Raises:
        BundleError: A merged model carries another manifest of an expert than it lists.
    """
    if isinstance(bundle, Anchor):
        subject, parts = _anchor(bundle.manifest.ref, bundle.manifest.license), []
    elif isinstance(bundle, Expert):
        subject, parts = _expert(bundle.manifest), [_anchor(bundle.manifest.anchor, None)]
    else:
        subject, parts = _merged(bundle), _parts(bundle)
    references = [part["bom-ref"] for part in parts]
    anchor = references[:1]
    return {
        "$schema": _SCHEMA,
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": uuid.uuid5(uuid.NAMESPACE_URL, bundle.digest).urn,
        "version": 1,
        "metadata": {
            "tools": {
                "components": [
                    {"type": "application", "name": "flexctl", "version": software_versions().get("flexctl", "unknown")}
                ]
            },
            "component": subject,
        },
        "components": parts,
        "dependencies": [
            {"ref": subject["bom-ref"], "dependsOn": references},
            *({"ref": reference, "dependsOn": anchor} for reference in references[1:]),
            *({"ref": reference} for reference in anchor),
        ],
    }


def _parts(merged: Merged) -> list[Component]:
    entries = merged.manifest.experts
    experts = (merged.owner_manifest(entry.index)[0] for entry in entries[1:])
    return [_anchor(merged.manifest.anchor, entries[0].license), *map(_expert, experts)]


def _merged(merged: Merged) -> Component:
    manifest = merged.manifest
    names = ", ".join(merged.names)
    family = family_of(manifest.anchor.model_type)
    stones = {f"removed.{stone.name}": stone.digest for stone in manifest.removed}
    return {
        **_model(f"{manifest.anchor.name} with {names}" if names else manifest.anchor.name, manifest.digest),
        **_licenses(manifest.license),
        "modelCard": _card(family.moe_type, family.moe_architecture, [], ()),
        **_properties(
            {"kind": "merged", "num_experts": len(manifest.experts), **stones},
        ),
    }


def _anchor(anchor: AnchorRef, license: str | None) -> Component:
    return {
        **_model(anchor.name, anchor.digest),
        **_licenses(license),
        "modelCard": _card(anchor.model_type, "dense", [], ()),
        **_properties({"kind": "anchor"}),
    }


def _expert(manifest: ExpertManifest) -> Component:
    data, privacy = manifest.data, encode(manifest.privacy) or {}
    counts = ((data.documents, "documents"), (data.tokens, "tokens"), (data.bytes, "bytes"))
    dataset: dict[str, Any] = {
        "type": "dataset",
        "name": data.label or f"text behind {manifest.name}",
        "description": ", ".join(f"{count} {unit}" for count, unit in counts if count is not None) or "not told",
    }
    if data.contact:
        dataset["governance"] = {"owners": [{"contact": {"name": data.contact}}]}
    parents = [_model(f"parent of {manifest.name}", parent) for parent in manifest.parents]
    facts = {"kind": "expert", "rank": manifest.rank, "expires": data.expires, "router": manifest.router.kind}
    card = _card(manifest.anchor.model_type, "feed-forward expert", [dataset], data.purposes)
    if privacy:
        said = f"epsilon {privacy['epsilon']}, delta {privacy['delta']}, unit {privacy['unit']}"
        guarantee = {"name": "differential privacy, as its owner claims", "mitigationStrategy": said}
        card["considerations"] = {**card.get("considerations", {}), "ethicalConsiderations": [guarantee]}
    return {
        **_model(manifest.name, manifest.digest),
        **_licenses(data.license),
        "pedigree": {"ancestors": [_model(manifest.anchor.name, manifest.anchor.digest, refer=False), *parents]},
        "modelCard": card,
        **_properties({**facts, **{f"privacy.{name}": value for name, value in privacy.items()}}),
    }


def _model(name: str, digest: str, *, refer: bool = True) -> Component:
    """Return what every component has; ``refer`` is whether others may point at it."""
    return {
        "type": "machine-learning-model",
        **({"bom-ref": f"flexctl:{digest}"} if refer else {}),
        "name": name,
        "version": digest,
        "hashes": [{"alg": "SHA-256", "content": digest.removeprefix("sha256:")}],
    }


def _card(family: str, architecture: str, datasets: list[Any], purposes: tuple[str, ...]) -> dict[str, Any]:
    parameters = {"task": "text-generation", "architectureFamily": family, "modelArchitecture": architecture}
    return {
        "modelParameters": {**parameters, **({"datasets": datasets} if datasets else {})},
        **({"considerations": {"useCases": list(purposes)}} if purposes else {}),
    }


def _licenses(license: str | None) -> Component:
    """Return a license by its SPDX id, as an expression, or by its name; nothing where it is unknown."""
    if license is None:
        return {}
    try:
        spdx = canonicalize_license_expression(license)
    except (InvalidLicenseExpression, ValueError):
        return {"licenses": [{"license": {"name": license}}]}
    if "LicenseRef-" in spdx:
        return {"licenses": [{"license": {"name": license}}]}
    return {"licenses": [{"expression": spdx} if " " in spdx else {"license": {"id": spdx}}]}


def _properties(facts: Mapping[str, Any]) -> Component:
    shown = [
        {"name": f"flexctl:{name}", "value": str(value)} for name, value in facts.items() if value not in (None, "")
    ]
    return {"properties": shown}
